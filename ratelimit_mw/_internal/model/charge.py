"""Charge that a request asks of the backend, and the backend's answer.

A backend knows these values and nothing of HTTP, plans or API keys.
"""

import math
import os
import struct
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any, Literal, NamedTuple, Protocol, Self

from ratelimit_mw._internal.model.limits import DEFAULT_LEASE, Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.metered import Meter, Units, meter_places, meters_of
from ratelimit_mw._internal.model.periods import period_at
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.runtime.leaf import Numbers, digits

Clock = Callable[[], int]
"""Microseconds since 1970. A backend's own clock decides; tests hand in one of their own."""

LEASE_ID_SIZE = 16
"""Bytes of a lease id: random, so that nobody can guess another's."""
NO_LEASE_ID = bytes(LEASE_ID_SIZE)
"""In place of one where nothing is held."""

MOST_UNITS = 2**62
"""More than any limit grants; what is larger is compared as this."""
MAX_AHEAD = 2**32 - 1
"""Microseconds: what the header of a window has room for."""

_IDS_AT_ONCE = 256
_cut = struct.Struct(f"{LEASE_ID_SIZE}s" * _IDS_AT_ONCE).unpack
_fresh_ids: list[bytes] = []
if hasattr(os, "register_at_fork"):  # or parent and child would go on with the same ones
    os.register_at_fork(after_in_child=_fresh_ids.clear)


def new_lease_id() -> bytes:
    """A new random lease id. Random bytes are fetched for many ids at once: each fetch is a system call."""
    try:
        return _fresh_ids.pop()
    except IndexError:
        fetched: tuple[bytes, ...] = _cut(os.urandom(LEASE_ID_SIZE * _IDS_AT_ONCE))
        _fresh_ids.extend(fetched[1:])
        return fetched[0]


@dataclass(slots=True, unsafe_hash=True)
class Counter:
    """One limit and where it is counted. A value: nobody changes one.

    Not frozen, which would treble its cost: callers who are not remembered have theirs made again and again.
    """

    partition: str
    """The string the limit is counted under: a caller, an address, a route's total, the application."""
    scope: str
    """Name that tells the limits of one partition apart, besides the window's length: a plan, a route."""
    limit: Limit
    owner: Literal["caller", "address", "everyone"] = "caller"
    """Owner of the limit. All callers share a limit of `everyone`."""


class ReservationKey(NamedTuple):
    """A place where an admitted charge holds a slot or an amount."""

    partition: str
    scope: str
    """The scope of a slot; the currency and label of a period, such as `USD:2026-11-21`."""
    ends: int = 0
    """End of the period in microseconds since 1970; 0 for a slot."""


class Reservation:
    """Reservation of an admitted charge: all that renewing, settling and releasing takes, in any process."""

    __slots__ = (
        "currency",
        "estimates",
        "has_estimate",
        "has_price",
        "id",
        "is_leased",
        "lease",
        "meters",
        "periods",
        "price",
        "slots",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - a value, made for every request
        self,
        id: bytes,  # noqa: A002 - the lease's
        slots: tuple[ReservationKey, ...] = (),
        periods: tuple[ReservationKey, ...] = (),
        lease: float = 0.0,
        price: int = 0,
        currency: str = "USD",
        meters: tuple[Meter, ...] = (),
        estimates: tuple[int, ...] = (),
    ) -> None:
        self.id = id
        self.slots = slots
        self.periods = periods
        self.lease = lease
        """Seconds that the slots last past their last renewal, and the estimate with them."""
        self.price = price
        self.currency = currency
        self.meters = meters
        """Meters of the units that it settles."""
        self.estimates = estimates
        """What each meter was charged at admission."""
        self.has_price = price > 0 and periods != ()
        """Whether it holds an amount in any period."""
        self.has_estimate = self.has_price or (estimates != () and any(estimates))
        """Whether it holds an estimate, of money or of a metered unit."""
        self.is_leased = self.has_estimate or slots != ()
        """Whether anything of it ends where it is not renewed."""

    def with_places(
        self,
        slots: tuple[ReservationKey, ...],
        periods: tuple[ReservationKey, ...],
        meters: tuple[Meter, ...],
        estimates: tuple[int, ...],
    ) -> "Reservation":
        """Make a hold of the same lease on other slots, periods and meters."""
        return Reservation(self.id, slots, periods, self.lease, self.price, self.currency, meters, estimates)

    def without_slots(self) -> "Reservation":
        """Make a hold of all else, or of nothing where there is nothing else."""
        if not (self.periods or self.meters):
            return NO_RESERVATION
        return self.with_places((), self.periods, self.meters, self.estimates)

    def without_meters(self) -> "Reservation":
        """Make a hold of slots and periods alone."""
        if not self.meters:
            return self
        if not (self.slots or self.periods):
            return NO_RESERVATION
        return self.with_places(self.slots, self.periods, (), ())

    def _values(self) -> tuple[object, ...]:
        values = (self.id, self.slots, self.periods, self.lease, self.price, self.currency)
        return (*values, self.meters, self.estimates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reservation) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"Hold{self._values()}"


NO_RESERVATION = Reservation(b"")
"""The hold of a charge that takes neither a slot nor money."""


class HeaderWindow:
    """One of the caller's own windows in a charge, as headers tell of it."""

    __slots__ = ("cost", "length", "limit_header", "place", "quota", "window")

    def __init__(self, place: int, window: Window, cost: int) -> None:
        self.place = place
        """Index of the window among the counters of its charge."""
        self.window = window
        # At least 1, and what is no number of units is not for a header to refuse.
        self.cost = 1 if not cost > 1 else min(cost, MOST_UNITS)
        """Units that one more request needs."""
        self.quota, self.length = window.quota, window.length
        self.limit_header = (b"x-ratelimit-limit", digits(window.quota))


class Charge:
    """The limits that decide about a request, all together, and the cost that each window is charged.

    That is one cost for all, but for windows of a metered unit: these are charged the request's estimate of
    the unit. Where it has none nothing is charged, and one unit has to be left.

    Made once for a caller and a route, and used for every request. The caller's own counters come first,
    those that all callers share last.
    """

    __slots__ = (
        "_counters",
        "address",
        "ahead",
        "allowances",
        "base",
        "caller",
        "cost",
        "costs",
        "currency",
        "estimates",
        "is_held",
        "is_of_one",
        "is_recorded",
        "last",
        "lease",
        "max_hold",
        "meter_places",
        "meters",
        "model",
        "prepared",
        "slots",
        "unit_windows",
        "warn_amounts",
        "windows",
    )

    def __init__(
        self,
        counters: Iterable[Counter],
        cost: int = 1,
        *,
        ahead: int = 0,
        lease: float = DEFAULT_LEASE,
        estimates: Units | None = None,
    ) -> None:
        """Of windows alone: `ahead` is for how many microseconds the units may be used later than they are
        taken, at most an eighth of each window and `MAX_AHEAD`; they leave it a window's length after the end
        of that time. `lease` is how many seconds the estimate of a charge without slots lasts. `estimates`
        are of metered units; of one that is left out nothing is charged until it is settled.
        """
        self._counters: tuple[Counter, ...] | None = tuple(counters)
        self.model: Charge | None = None
        """The charge that this one was made from, by `for_caller`; None for one made of counters."""
        self.caller = self.address = ""
        """Partitions of a model that each charge made from it replaces by its own caller's."""
        self.cost = cost
        self.ahead = ahead
        if ahead and not all([isinstance(each.limit, Window) for each in self.counters]):
            raise ValueError("only units of windows are taken ahead")
        if ahead > MAX_AHEAD:
            raise ValueError(f"units are taken at most {MAX_AHEAD} us ahead, not {ahead}")
        limits = [each.limit for each in self.counters if isinstance(each.limit, Slots)]
        self.slots = tuple(
            [
                ReservationKey(each.partition, each.scope)
                for each in self.counters
                if isinstance(each.limit, Slots)
            ]
        )
        # A request's slots are renewed and freed together, so the shortest counts for all.
        self.lease = min([limit.lease for limit in limits], default=lease)
        self.max_hold = min([limit.max_hold for limit in limits if limit.max_hold], default=None)
        self.allowances = tuple([each for each in self.counters if isinstance(each.limit, Allowance)])
        self.meters = meters_of(self.counters)
        """Metered units among the limits."""
        self.meter_places = meter_places(self.counters, self.meters) if self.meters else ()
        """For each limit the number of its meter, from 1 on, or 0; empty where there is no meter."""
        self.base: Charge | None = None
        """The charge that this one was made from, by `with_estimates`; None for any other."""
        self.costs: tuple[int, ...] | None = None
        """What each limit is charged, in their order; None where it is `cost` for all."""
        self.estimates: tuple[int, ...] = ()
        """What each meter is charged."""
        self._estimate(estimates or {})
        self.is_recorded = bool(self.allowances or self.meters)
        """Whether it leaves a record, by which it is settled."""
        self.is_held = bool(self.slots or self.is_recorded)
        """Whether anything of it lasts until it is given back: slots, money, estimates of units."""
        self.is_of_one = len({counter.partition for counter in self.counters}) <= 1
        """Whether all of it is counted under one partition, which is one node of a cluster."""
        self.windows, self.unit_windows = self._header_windows()
        """The caller's own windows of requests; and of each metered unit, by its name."""
        self.warn_amounts = [
            (place, math.ceil(Decimal(repr(counter.limit.warn_at)) * counter.limit.amount))
            for place, counter in enumerate(self.counters)
            if isinstance(counter.limit, Allowance) and counter.limit.warn_at is not None
        ]
        """Place of each budget with a `warn_at`, and the amount from which on it is near its end."""
        self.currency = "USD"
        for counter in self.allowances:
            if isinstance(counter.limit, Allowance):
                self.currency = counter.limit.currency
        self.prepared: object = None
        """A backend's own: what it has made of this charge once, to use it for every request."""
        self.last: Outcome | None = None
        """The latest outcome: where this process starts from while the backend is away."""

    def for_caller(self, caller: str, address: str) -> "Charge":
        """Make the same charge for another caller, with other partitions for `self.caller` and `.address`.

        What doesn't differ is shared, and counters are made only if somebody looks at them.
        """
        made = Charge.__new__(Charge)
        made._counters = made.prepared = made.last = None  # noqa: SLF001 - its own
        made.model, made.caller, made.address = self, caller, address
        made.cost, made.ahead = self.cost, self.ahead
        made.lease, made.max_hold, made.is_held = self.lease, self.max_hold, self.is_held
        made.is_of_one, made.windows, made.currency = self.is_of_one, self.windows, self.currency
        made.warn_amounts = self.warn_amounts
        made.base, made.costs, made.estimates = None, self.costs, self.estimates
        made.unit_windows, made.is_recorded = self.unit_windows, self.is_recorded
        made.meter_places = self.meter_places
        made.slots = made.allowances = made.meters = ()
        if self.slots:
            made.slots = tuple(
                [ReservationKey(made.partition_of(held.partition), held.scope) for held in self.slots]
            )
        if self.allowances:
            made.allowances = tuple([each for each in made.counters if isinstance(each.limit, Allowance)])
        if self.meters:
            made.meters = tuple([Meter(made.partition_of(each[0]), *each[1:]) for each in self.meters])
        return made

    def with_estimates(self, units: Units) -> "Charge":
        """Make the same charge with other estimates of its metered units."""
        made = self.for_caller(self.caller, self.address)
        made._counters = self.counters  # noqa: SLF001 - its own
        made.model, made.base = None, self
        made.slots, made.allowances, made.meters = self.slots, self.allowances, self.meters
        made._estimate(units)  # noqa: SLF001 - its own
        made.windows, made.unit_windows = made._header_windows()  # noqa: SLF001 - its own
        return made

    def _estimate(self, units: Units) -> None:
        """Charge meters these amounts."""
        if self.meters:
            self.estimates = tuple([units.get(meter.unit, 0) for meter in self.meters])
            self.costs = tuple(
                [self.estimates[number - 1] if number else self.cost for number in self.meter_places]
            )

    def _header_windows(self) -> "tuple[list[HeaderWindow], dict[str, list[HeaderWindow]]]":
        windows, of_units = list[HeaderWindow](), dict[str, list[HeaderWindow]]()
        for place, counter in enumerate(self.counters):
            if counter.owner == "caller" and isinstance(counter.limit, Window):
                unit = counter.limit.counts
                kept = of_units.setdefault(unit, []) if counter.limit.is_metered else windows
                kept.append(HeaderWindow(place, counter.limit, self.cost_at(place)))
        return windows, of_units

    @property
    def units(self) -> dict[str, int]:
        """The estimates by unit."""
        return {meter.unit: cost for meter, cost in zip(self.meters, self.estimates, strict=True)}

    @property
    def too_small(self) -> Counter | None:
        """A window that this charge never fits into, whatever was used; None where it may."""
        for place, counter in enumerate(self.counters):
            if isinstance(counter.limit, Window) and self.cost_at(place) > counter.limit.quota:
                return counter
        return None

    def cost_at(self, place: int) -> int:
        """Units that the window at this place is charged."""
        return self.cost if self.costs is None else self.costs[place]

    @property
    def steps(self) -> list[int]:
        """By how much each limit's `Outcome.used` grows with one more charge of this kind."""
        return [
            self.cost_at(place) if isinstance(each.limit, Window) else 1
            for place, each in enumerate(self.counters)
        ]

    @property
    def counters(self) -> tuple[Counter, ...]:
        """The limits and where they are counted."""
        counters = self._counters
        if counters is None:
            model = () if self.model is None else self.model.counters
            counters = self._counters = tuple(
                [Counter(self.partition_of(c.partition), c.scope, c.limit, c.owner) for c in model]
            )
        return counters

    @property
    def own_partition(self) -> str:
        """Partition that the caller's own limits are counted under; "" for none."""
        return self.caller or (self.counters[0].partition if self.counters else "")

    def partition_of(self, partition: str) -> str:
        """The partition here in place of one of the model's."""
        if self.model is None:
            return partition
        if partition == self.model.caller:
            return self.caller
        return self.address if partition == self.model.address else partition

    def nearest_window(self, outcome: "Outcome") -> HeaderWindow | None:
        """The caller's own window under which the fewest more of this charge fit; of equals the longer.

        Of windows that count requests; `nearest_of` tells it of others.
        """
        return nearest_of(self.windows, outcome)

    def nears_budget(self, outcome: "Outcome") -> bool:
        """Whether one of the budgets has reached its `warn_at`."""
        near = False
        for place, amount in self.warn_amounts:
            near = near or outcome.used(place) + outcome.held(place) >= amount
        return near

    def statuses(self, outcome: "Outcome") -> list[Status]:
        """Status of each limit after the decision, in the order of the counters."""
        return [outcome.status(place, counter.limit) for place, counter in enumerate(self.counters)]

    def hold(self, lease_id: bytes, price: int, now: int) -> Reservation:
        """Return the reservation of this charge, admitted at `now`; of a budget also if the price is 0."""
        if not self.is_recorded:
            return Reservation(lease_id, self.slots, (), self.lease) if self.slots else NO_RESERVATION
        periods = tuple([place_of(counter, now) for counter in self.allowances])
        return self.recorded_hold(lease_id, periods, price)

    def recorded_hold(self, lease_id: bytes, periods: tuple[ReservationKey, ...], price: int) -> Reservation:
        """What this charge holds of slots, of these periods and of metered units."""
        held = price if periods else 0
        return Reservation(
            lease_id, self.slots, periods, self.lease, held, self.currency, self.meters, self.estimates
        )


def nearest_of(windows: list[HeaderWindow], outcome: "Outcome") -> HeaderWindow | None:
    """Find the window under which the fewest more charges fit; of equals the longer."""
    best, fewest = None, 0
    for window in windows:
        left = (window.quota - outcome.used(window.place)) // window.cost
        if best is None or left < fewest or (left == fewest and window.length > best.length):
            best, fewest = window, left
    return best


def place_of(counter: Counter, now: int) -> ReservationKey:
    """The period that an allowance's counter counts in at `now`."""
    allowance = counter.limit
    if not isinstance(allowance, Allowance):
        raise TypeError(f"only an allowance has periods, not {allowance!r}")
    period = period_at(allowance.period, allowance.timezone, now)
    return ReservationKey(counter.partition, f"{allowance.currency}:{period.label}", period.end)


# The row of an `Outcome` has three numbers of each limit. First: units used, active slots or the amount
# spent. Second: of a window the time until its oldest unit leaves, of slots 0, of a budget the amount held.
# Third: 0 where the limit admits; else of a window the time until the charge fits, of slots and budgets 1.
# Whoever decides appends them in this order; only this module counts places in a row.
_WIDTH = 3
_RESET_AFTER = 1
_HELD = 1
_REFUSES = 2

NUMBERS_OF_A_STATUS = _WIDTH
"""How many numbers of a row are one limit's."""


def row_before(row: Numbers, steps: Sequence[int], others: int) -> Numbers:
    """Make the row of a charge as it was before so many others like it were admitted."""
    before = Numbers()
    for place, step in enumerate(steps):
        at = _WIDTH * place
        before.append(row.at(at) - others * step)
        before.append(row.at(at + 1))
        before.append(0)
    return before


class Outcome:
    """A backend's answer to a charge: whether it was admitted, and how each limit stands afterwards."""

    __slots__ = ("_row", "admitted", "hold", "now")

    def __init__(self, admitted: bool, now: int, row: Numbers, hold: Reservation) -> None:
        """`row` has the status of each counter of the charge, in their order, as `_WIDTH` numbers: it is made
        for every request, and mostly little of it is looked at.
        """
        self.admitted = admitted
        self.now = now
        """Time of the decision by the backend's clock, in microseconds since 1970."""
        self._row = row
        self.hold = hold

    @classmethod
    def from_statuses(cls, admitted: bool, now: int, statuses: Iterable[Status], hold: Reservation) -> Self:
        """Make an outcome of the status of each counter."""
        row: list[int] = []
        for status in statuses:
            if isinstance(status, WindowStatus):
                row += (status.used, status.reset_after_us, status.retry_after_us)
            elif isinstance(status, SlotStatus):
                row += (status.active, 0, int(status.is_full))
            else:
                row += (status.spent, status.held, int(status.is_short))
        return cls(admitted, now, Numbers(row), hold)

    def status(self, place: int, limit: Limit) -> Status:
        """Status of the limit at this place of the charge."""
        row, at = self._row, _WIDTH * place
        if isinstance(limit, Window):
            return WindowStatus(row.at(at), row.at(at + _RESET_AFTER), row.at(at + _REFUSES))
        if isinstance(limit, Slots):
            return SlotStatus(row.at(at), row.at(at + _REFUSES) > 0)
        return BudgetStatus(row.at(at), row.at(at + _HELD), row.at(at + _REFUSES) > 0)

    def used(self, place: int) -> int:
        """Units used of the limit at this place: of slots those active, of an allowance the amount spent."""
        return self._row.at(_WIDTH * place)

    def reset_after(self, place: int) -> int:
        """Microseconds until the oldest unit leaves the window at this place."""
        return self._row.at(_WIDTH * place + _RESET_AFTER)

    def held(self, place: int) -> int:
        """Amount that the allowance at this place holds for charges that are not settled yet."""
        return self._row.at(_WIDTH * place + _HELD)

    def __repr__(self) -> str:
        return f"Outcome{self._values()}"

    def _values(self) -> tuple[object, ...]:
        return (self.admitted, self.now, tuple(self._row), self.hold)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())


class EstimateAction(IntEnum):
    """Action on an estimate when its request has ended. The values are the script's."""

    UNTOUCHED = 0
    KEEP = 1
    GIVE_BACK = 2


class Settlement(Enum):
    """Result of a settle. The values are the script's."""

    UNKNOWN = 0
    """No record: it ended undetached, was given back, or its life is over. Nothing was charged."""
    SETTLED = 1
    REPEATED = 2
    """Settled before with the same amount."""
    DIFFERENT = 3
    """Settled before with another amount, which stands."""


class BackendError(Exception):
    """The backend could not be asked, did not answer in time or refused; nobody was decided about."""


class OperationRefusedError(BackendError):
    """The backend is there, and refused this one operation: a key of another type, no memory."""


WAITS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Seconds by which the calls of a backend are told apart."""


class Load(NamedTuple):
    """Load of a backend's connections: operations carried, and operations that wait."""

    batches: int = 0
    """Calls of the script, and in `operations` what they were for."""
    operations: int = 0
    owed: int = 0
    """Releases and settles that wait to be written, and are sent until they arrive."""
    failed: int = 0
    """Operations that the server answered with an error of their own."""
    waited: float = 0.0
    """Seconds that calls took, from the first operation's wait on; all together."""
    waits: tuple[int, ...] = (0,) * (len(WAITS) + 1)
    """Calls by how long they took: up to each of `WAITS`, and longer."""
    mended: int = 0
    """Stored values that could not be true, and were mended."""

    def plus(self, other: "Load") -> "Load":
        """Both together."""
        return Load(
            self.batches + other.batches,
            self.operations + other.operations,
            self.owed + other.owed,
            self.failed + other.failed,
            self.waited + other.waited,
            tuple(map(sum, zip(self.waits, other.waits, strict=True))),
            self.mended + other.mended,
        )


class Holder(Protocol):
    """Keeper of reservations, from their admission on."""

    async def renew(self, hold: Reservation, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before.

        An estimate that has neither lapsed nor been kept lasts for the hold's own lease from now.
        """

    async def renew_all(
        self, renewals: Sequence[tuple[Reservation, float]]
    ) -> "Sequence[bool | BackendError]":
        """Renew many holds, each for its own time, as one operation; the answer to each, or why there is
        none. Raises nothing.
        """

    def finish(self, hold: Reservation, money: EstimateAction) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent.

        It is under way when this returns, whatever becomes of the caller; awaiting waits for the backend.
        """

    async def settle(self, hold: Reservation, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""

    async def settle_units(self, hold: Reservation, units: Units, *, replace: bool = False) -> Settlement:
        """Put what was used of metered units in place of their estimates. Idempotent.

        Of a unit that was settled before the first amount stands, unless `replace` says otherwise.
        """

    def keep(self, hold: Reservation) -> Awaitable[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent.

        It is under way when this returns, as `finish` is.
        """


class Asked(Protocol):
    """A charge on its way to a backend."""

    def __await__(self) -> Generator[Any, None, Outcome]:
        """Wait for the outcome. Raises `BackendError`."""

    def give_up(self) -> None:
        """The request was cancelled: undo the charge, whether its outcome is here or still to come."""


class Backend(Holder, Protocol):
    """Store of counts. Every method that fails raises `BackendError` and nothing else."""

    call_observers: list[Callable[[float], None]]
    """Told of each call to a server, in seconds, when its answer is here. They raise nothing."""

    @property
    def load(self) -> Load:
        """Load of the backend's connections: operations carried, and operations that wait."""

    @property
    def is_away(self) -> bool:
        """Whether it is thought to be away; false where it was not asked yet."""

    async def open(self) -> None:
        """Connect ahead of the first request; without it the first request connects."""

    async def close(self) -> None:
        """Send what still waits and close; a closed backend may be opened again."""

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome | Asked:
        """Charge all of `charge`'s counters, or none: the outcome, or what to await for it."""

    def take_over(self) -> None:
        """Send what event loops that have ended still owed. Waits for nothing."""

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none, and wait for the outcome."""

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere, once however often it is asked for.

        What may have been charged though its answer was lost is not given back: it is asked for again.
        """

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
