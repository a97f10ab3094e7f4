"""Charge that a request asks of the backend, and the backend's answer.

A backend knows these values and nothing of HTTP, plans or API keys.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from ratelimit_mw._internal.model.header_window import HeaderWindow
from ratelimit_mw._internal.model.limits import DEFAULT_LEASE, Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.metered import Meter, Units, meter_places, meters_of
from ratelimit_mw._internal.model.periods import period_at
from ratelimit_mw._internal.model.reservation import Metering, Reservation, ReservationKey
from ratelimit_mw._internal.model.status import Status

if TYPE_CHECKING:
    from ratelimit_mw._internal.model.outcome import Outcome

Clock = Callable[[], int]
"""Microseconds since 1970. A backend's own clock decides; tests hand in one of their own."""
MAX_AHEAD = 2**32 - 1
"""Microseconds: what the header of a window has room for."""
CODE_SCOPE = "c:"
"""Beginning of the scope of a limit that the app declares in code; its name follows."""


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
    owner: Literal["caller", "reported", "address", "key", "everyone"] = "caller"
    """Owner of the limit: all callers share a limit of `everyone`, those with one key a limit of a `key`.

    A `reported` limit is the caller's, too, but never refuses, and no header tells of it.
    """

    @property
    def name(self) -> str:
        """Name of a limit that the app declares in code; "" of any other."""
        return self.scope[len(CODE_SCOPE) :] if self.scope.startswith(CODE_SCOPE) else ""


class Charge:
    """The limits that decide about a request, all together, and the cost that each window is charged.

    That is one cost for all, but for windows of a metered unit: these are charged the request's estimate of
    the unit. Where it has none nothing is charged, and one unit has to be left. And a limit that the app
    declares in code may have a cost of its own.

    Made once for a caller and a route, and used for every request. The caller's own counters come first,
    those that all callers share last.
    """

    __slots__ = (
        "_counters",
        "_own_costs",
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
        "keys",
        "last",
        "lease_seconds",
        "max_hold",
        "meter_places",
        "meters",
        "model",
        "parts",
        "prepared",
        "slots",
        "unit_windows",
        "warn_amounts",
        "windows",
    )

    def __init__(  # noqa: PLR0915 - all that requests of a caller have in common
        self,
        counters: Iterable[Counter],
        cost: int = 1,
        *,
        ahead: int = 0,
        lease_seconds: float = DEFAULT_LEASE,
        estimates: Units | None = None,
    ) -> None:
        """Of windows alone: `ahead` is for how many microseconds the units may be used later than they are
        taken, at most an eighth of each window and `MAX_AHEAD`; they leave it a window's length after the end
        of that time. The estimate of a charge without slots lasts for `lease_seconds`. `estimates` are of
        metered units; of one that is left out nothing is charged until it is settled. Those with a scope in
        place of a unit are the costs of limits in code.
        """
        self._counters: tuple[Counter, ...] | None = tuple(counters)
        self.model: Charge | None = None
        """The charge that this one was made from, by `for_caller`; None for one made of counters."""
        self.caller: str = ""
        self.address: str = ""
        """Partitions of a model that each charge made from it replaces by its own caller's."""
        self.keys: tuple[str, ...] = ()
        """Partitions of a model for limits that count by another key, replaced in the same way."""
        self.cost: int = cost
        self.ahead: int = ahead
        if ahead and not all([isinstance(each.limit, Window) for each in self.counters]):
            raise ValueError("only units of windows are taken ahead")
        if ahead > MAX_AHEAD:
            raise ValueError(f"units are taken at most {MAX_AHEAD} us ahead, not {ahead}")
        held = [each for each in self.counters if isinstance(each.limit, Slots)]
        limits = [each.limit for each in held if isinstance(each.limit, Slots)]
        self.slots: tuple[ReservationKey, ...] = tuple(
            [ReservationKey(each.partition, each.scope) for each in held]
        )
        # A request's slots are renewed and freed together, so the shortest counts for all.
        self.lease_seconds: float = min([limit.lease_seconds for limit in limits], default=lease_seconds)
        self.max_hold: float | None = min(
            [limit.max_hold for limit in limits if limit.max_hold], default=None
        )
        self.allowances: tuple[Counter, ...] = tuple(
            [each for each in self.counters if isinstance(each.limit, Allowance)]
        )
        self.meters: tuple[Meter, ...] = meters_of(self.counters)
        """Metered units among the limits."""
        self.meter_places: tuple[int, ...] = meter_places(self.counters, self.meters) if self.meters else ()
        """For each limit the number of its meter, from 1 on, or 0; empty where there is no meter."""
        self.base: Charge | None = None
        """The charge that this one was made from, by `with_estimates`; None for any other."""
        self.costs: tuple[int, ...] | None = None
        """Cost charged to each limit, in the order of the limits; None if all are charged `cost`."""
        self.estimates: tuple[int, ...] = ()
        """Amount charged to each meter."""
        self._own_costs: dict[str, int] = {}
        """Cost of each limit in code that has one of its own, by its scope."""
        self._estimate(estimates or {})
        self.is_recorded: bool = bool(self.allowances or self.meters)
        """Whether it leaves a record, by which it is settled."""
        self.is_held: bool = bool(self.slots or self.is_recorded)
        """Whether anything of it lasts until it is given back: slots, money, estimates of units."""
        self.is_of_one: bool = len({counter.partition for counter in self.counters}) <= 1
        """Whether all of it is counted under one partition, which is one node of a cluster."""
        self.windows: list[HeaderWindow]
        self.unit_windows: dict[str, list[HeaderWindow]]
        self.windows, self.unit_windows = self._header_windows()
        """The caller's own windows of requests; and of each metered unit, by its name."""
        self.warn_amounts: list[tuple[int, int]] = [
            (place, math.ceil(Decimal(repr(counter.limit.warn_at)) * counter.limit.amount))
            for place, counter in enumerate(self.counters)
            if isinstance(counter.limit, Allowance) and counter.limit.warn_at is not None
        ]
        """Place of each budget with a `warn_at`, and the amount from which on it is near its end."""
        self.currency: str = "USD"
        for counter in self.allowances:
            if isinstance(counter.limit, Allowance):
                self.currency = counter.limit.currency
        self.prepared: object = None
        """A backend's own: what it has made of this charge once, to use it for every request."""
        self.parts: dict[int, Any] | None = None
        """Charges of the rest of its limits, without some, as far as these were needed."""
        self.last: Outcome | None = None
        """The latest outcome: where this process starts from while the backend is away."""

    def for_caller(self, caller: str, address: str, keys: tuple[str, ...] = ()) -> "Charge":
        """Make the same charge for another caller, with its partitions in place of the model's.

        What doesn't differ is shared, and counters are made only if somebody looks at them.
        """
        made = Charge.__new__(Charge)
        made._counters = made.prepared = made.parts = made.last = None  # noqa: SLF001 - its own
        made.model, made.caller, made.address, made.keys = self, caller, address, keys
        made.cost, made.ahead = self.cost, self.ahead
        made.lease_seconds, made.max_hold, made.is_held = self.lease_seconds, self.max_hold, self.is_held
        made.is_of_one, made.windows, made.currency = self.is_of_one, self.windows, self.currency
        made.warn_amounts = self.warn_amounts
        made.base, made.costs, made.estimates = None, self.costs, self.estimates
        made._own_costs = self._own_costs  # noqa: SLF001 - its own
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
        made = self.for_caller(self.caller, self.address, self.keys)
        made._counters = self.counters  # noqa: SLF001 - its own
        made.model, made.base = None, self
        made.slots, made.allowances, made.meters = self.slots, self.allowances, self.meters
        made._estimate(units)  # noqa: SLF001 - its own
        made.windows, made.unit_windows = made._header_windows()  # noqa: SLF001 - its own
        return made

    def _estimate(self, units: Units) -> None:
        """Charge meters these amounts, and limits in code the costs of their own."""
        own = self._own_costs = self._own_costs | {name: cost for name, cost in units.items() if ":" in name}
        if self.meters:
            self.estimates = tuple([own.get(meter.scope, units.get(meter.unit, 0)) for meter in self.meters])
        if self.meters or any([cost != self.cost for cost in own.values()]):
            numbers = self.meter_places or [0] * len(self.counters)
            self.costs = tuple(
                [
                    self.estimates[number - 1] if number else own.get(counter.scope, self.cost)
                    for number, counter in zip(numbers, self.counters, strict=True)
                ]
            )

    def _header_windows(self) -> "tuple[list[HeaderWindow], dict[str, list[HeaderWindow]]]":
        windows, of_units = list[HeaderWindow](), dict[str, list[HeaderWindow]]()
        for place, counter in enumerate(self.counters):
            if counter.owner == "caller" and isinstance(counter.limit, Window):
                unit = counter.limit.counts
                if counter.limit.counts_answers:
                    continue  # headers tell of requests, whatever comes of them
                kept = of_units.setdefault(unit, []) if counter.limit.is_metered else windows
                kept.append(HeaderWindow(place, counter.limit, self.cost_at(place)))
        return windows, of_units

    def forget(self) -> None:
        """Let go of what was made of it: a backend makes its part anew, where it is needed.

        So it is freed without the garbage collector.
        """
        self.prepared = self.last = None
        parts, self.parts = self.parts, None
        for part in () if parts is None else parts.values():
            if part.charge is not None:
                part.charge.prepared = part.charge.last = None

    def counts(self, unit: str) -> bool:
        """Whether any of its limits counts this metered unit."""
        return any([meter.unit == unit for meter in self.meters])

    @property
    def units(self) -> dict[str, int]:
        """The estimates by unit, and the costs of limits in code by scope."""
        estimates = {
            meter.unit: cost
            for meter, cost in zip(self.meters, self.estimates, strict=True)
            if meter.scope not in self._own_costs
        }
        return estimates | self._own_costs

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
        if self.keys and partition in self.model.keys:
            return self.keys[self.model.keys.index(partition)]
        return self.address if partition == self.model.address else partition

    def nears_budget(self, outcome: "Outcome") -> bool:
        """Whether one of the budgets has reached its `warn_at`."""
        near = False
        for place, amount in self.warn_amounts:
            near = near or outcome.used(place) + outcome.held(place) >= amount
        return near

    def statuses(self, outcome: "Outcome") -> list[Status]:
        """Status of each limit after the decision, in the order of the counters."""
        return [outcome.status(place, counter.limit) for place, counter in enumerate(self.counters)]

    def recorded_reservation(
        self, lease_id: bytes, periods: tuple[ReservationKey, ...], price: int
    ) -> Reservation:
        """Return the reservation of this charge: its slots, these budget periods and its metered units."""
        held = price if periods else 0
        return Reservation(
            lease_id,
            self.slots,
            periods,
            self.lease_seconds,
            held,
            self.currency,
            self.meters,
            self.estimates,
            Metering() if self.meters else None,
        )


def period_key(counter: Counter, now: int) -> ReservationKey:
    """The key of an allowance's counter in its period at `now`."""
    allowance = counter.limit
    if not isinstance(allowance, Allowance):
        raise TypeError(f"only an allowance has periods, not {allowance!r}")
    period = period_at(allowance.period, allowance.timezone, now)
    return ReservationKey(counter.partition, f"{allowance.currency}:{period.label}", period.end)
