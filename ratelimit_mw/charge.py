"""What a request asks of the backend, and the backend's answer.

A backend knows these values and nothing of HTTP, plans or API keys.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from ratelimit_mw.compiled import core
from ratelimit_mw.limits import Allowance, Limit, Slots, Window
from ratelimit_mw.periods import period_at

Clock = Callable[[], int]
"""Microseconds since 1970. A backend's own clock decides; tests hand in one of their own."""

LEASE_ID_SIZE = 16
"""Bytes of a lease id: random, so that nobody can guess another's."""
NO_LEASE_ID = bytes(LEASE_ID_SIZE)
"""In place of one where nothing is held."""

MAX_AHEAD = 2**32 - 1
"""Microseconds: what the header of a window has room for."""

_IDS_AT_ONCE = 256
_fresh_ids: list[bytes] = []
if hasattr(os, "register_at_fork"):  # or parent and child would go on with the same ones
    os.register_at_fork(after_in_child=_fresh_ids.clear)


def new_lease_id() -> bytes:
    """A lease id that was never handed out. Random bytes are fetched for many at once: each fetch is a
    call of the system.
    """
    try:
        return _fresh_ids.pop()
    except IndexError:
        fetched = os.urandom(LEASE_ID_SIZE * (_IDS_AT_ONCE + 1))
        *others, one = [fetched[at : at + LEASE_ID_SIZE] for at in range(0, len(fetched), LEASE_ID_SIZE)]
        _fresh_ids.extend(others)
        return one


if core is not None and not TYPE_CHECKING:
    new_lease_id = core.new_lease_id


@dataclass(frozen=True, slots=True)
class Counter:
    """One limit and where it is counted."""

    partition: str
    """The string the limit is counted under: a caller, an address, a route's total, the application."""
    scope: str
    """What tells the limits of one partition apart, besides the window's length: a plan, a route."""
    limit: Limit
    owner: Literal["caller", "address", "everyone"] = "caller"
    """Whose limit this is: `everyone` shares it."""


class Held(NamedTuple):
    """A place where an admitted charge holds a slot or an amount."""

    partition: str
    scope: str
    """The scope of a slot; the currency and label of a period, such as `USD:2026-11-21`."""
    ends: int = 0
    """End of the period in microseconds since 1970; 0 for a slot."""


class Hold(NamedTuple):
    """What an admitted charge holds: all that renewing, settling and releasing it takes, in any process."""

    id: bytes
    slots: tuple[Held, ...] = ()
    periods: tuple[Held, ...] = ()
    lease: float = 0.0
    """Seconds that the slots last past their last renewal."""
    price: int = 0
    currency: str = "USD"


NOTHING_HELD = Hold(b"")
"""The hold of a charge that takes neither a slot nor money."""


class Charge:
    """The limits that decide about a request, all together, and what it needs of each window.

    Made once for a caller and a route and used for every request. The caller's own counters come first,
    those that everyone shares last.
    """

    __slots__ = (
        "_counters",
        "address",
        "ahead",
        "allowances",
        "caller",
        "cost",
        "currency",
        "is_held",
        "is_of_one",
        "lease",
        "like",
        "max_hold",
        "prepared",
        "shape",
        "slots",
        "told",
        "windows",
    )

    def __init__(self, counters: Iterable[Counter], cost: int = 1, *, ahead: int = 0) -> None:
        """Of windows alone: `ahead` is for how many microseconds the units may be used later than they are
        taken, at most an eighth of each window and `MAX_AHEAD`; they leave it a window's length after the end
        of that time.
        """
        self._counters: tuple[Counter, ...] | None = tuple(counters)
        self.like: Charge | None = None
        """The charge that this one was made from, by `of`; None for one that was made of counters."""
        self.caller = self.address = ""
        """The partitions that others have others in place of, who are made from this one."""
        self.cost = cost
        self.ahead = ahead
        if ahead and not all(isinstance(c.limit, Window) for c in self.counters):
            raise ValueError("only units of windows are taken ahead")
        if ahead > MAX_AHEAD:
            raise ValueError(f"units are taken at most {MAX_AHEAD} us ahead, not {ahead}")
        limits = [c.limit for c in self.counters if isinstance(c.limit, Slots)]
        self.slots = tuple(Held(c.partition, c.scope) for c in self.counters if isinstance(c.limit, Slots))
        # A request's slots are renewed and freed together, so the shortest counts for all.
        self.lease = min((limit.lease for limit in limits), default=0.0)
        self.max_hold = min((limit.max_hold for limit in limits if limit.max_hold), default=None)
        self.allowances = tuple(c for c in self.counters if isinstance(c.limit, Allowance))
        self.is_held = bool(self.slots or self.allowances)
        """Whether anything of it lasts until it is given back: slots, money."""
        self.is_of_one = len({counter.partition for counter in self.counters}) <= 1
        """Whether all of it is counted under one partition, which is one node of a cluster."""
        self.windows = tuple(
            (3 * place, counter.limit)
            for place, counter in enumerate(self.counters)
            if counter.owner == "caller" and isinstance(counter.limit, Window)
        )
        """The caller's own windows, and where each one's figures begin among an outcome's numbers."""
        self.currency = next(
            (c.limit.currency for c in self.counters if isinstance(c.limit, Allowance)), "USD"
        )
        self.prepared: object = None
        """A backend's own: what it has made of this charge once, to use it for every request."""
        self.shape: object = None
        """The compiled module's own: what it has made of this charge for all that are made from it."""
        self.told: Any = None
        """How it went last, as the backend told it."""

    def of(self, caller: str, address: str) -> "Charge":
        """The same for another caller: with other partitions in place of `self.caller` and `self.address`.

        What doesn't differ is shared, and counters are made only if somebody looks at them.
        """
        made = Charge.__new__(Charge)
        made._counters = made.prepared = made.shape = made.told = None  # noqa: SLF001 - its own
        made.like, made.caller, made.address = self, caller, address
        made.cost, made.ahead = self.cost, self.ahead
        made.lease, made.max_hold, made.is_held = self.lease, self.max_hold, self.is_held
        made.is_of_one, made.windows, made.currency = self.is_of_one, self.windows, self.currency
        made.slots = made.allowances = ()
        if self.slots:
            made.slots = tuple([Held(made.partition_of(held.partition), held.scope) for held in self.slots])
        if self.allowances:
            made.allowances = tuple([each for each in made.counters if isinstance(each.limit, Allowance)])
        return made

    @property
    def last(self) -> "Outcome | None":
        """How it went last: where this process starts from while the backend is away."""
        told = self.told  # another thread may put the next one in its place
        if told is None or isinstance(told, Outcome):
            return told
        outcome: Outcome = told.outcome()
        return outcome

    @last.setter
    def last(self, outcome: "Outcome | None") -> None:
        self.told = outcome

    @property
    def steps(self) -> list[int]:
        """By how much each limit's first figure grows with one more charge of this kind."""
        return [self.cost if isinstance(each.limit, Window) else 1 for each in self.counters]

    @property
    def counters(self) -> tuple[Counter, ...]:
        """The limits and where they are counted."""
        counters = self._counters
        if counters is None:
            model = () if self.like is None else self.like.counters
            counters = self._counters = tuple(
                [Counter(self.partition_of(c.partition), c.scope, c.limit, c.owner) for c in model]
            )
        return counters

    def partition_of(self, partition: str) -> str:
        """What stands here for a partition of the charge that this one was made from."""
        if self.like is None:
            return partition
        if partition == self.like.caller:
            return self.caller
        return self.address if partition == self.like.address else partition

    def hold(self, lease_id: bytes, price: int, now: int) -> Hold:
        """What this charge holds once it is admitted at `now`; of a budget also where the price is 0."""
        if not self.allowances:
            return Hold(lease_id, self.slots, (), self.lease) if self.slots else NOTHING_HELD
        periods = tuple(place_of(counter, now) for counter in self.allowances)
        return Hold(lease_id, self.slots, periods, self.lease, price, self.currency)


def place_of(counter: Counter, now: int) -> Held:
    """The period that an allowance's counter counts in at `now`."""
    allowance = counter.limit
    if not isinstance(allowance, Allowance):
        raise TypeError(f"only an allowance has periods, not {allowance!r}")
    period = period_at(allowance.period, allowance.timezone, now)
    return Held(counter.partition, f"{allowance.currency}:{period.label}", period.end)


class Figures(NamedTuple):
    """How one limit stands after a decision.

    Of a window: units used, microseconds until its oldest unit leaves, microseconds until the charge
    fits. Of slots: how many are active, 0, whether full. Of an allowance: spent, held, whether too little
    is left. `retry_after` is 0 where this limit does not refuse.
    """

    used: int
    reset_after: int
    retry_after: int

    @property
    def held(self) -> int:
        """What an allowance holds for charges that are not settled yet."""
        return self.reset_after


class Outcome(NamedTuple):
    """A backend's answer to a charge."""

    admitted: bool
    now: int
    numbers: Sequence[int]
    """The three `Figures` of each of its counters, in their order, in one row: it is made for every request,
    and mostly little of it is looked at."""
    hold: Hold

    @property
    def figures(self) -> list[Figures]:
        """How each limit stands after the decision, in the order of the charge's counters."""
        numbers = self.numbers
        return [Figures(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)]

    @classmethod
    def of(cls, admitted: bool, now: int, figures: Iterable[Figures], hold: Hold) -> Self:
        """An outcome told by its figures."""
        return cls(admitted, now, tuple(chain.from_iterable(figures)), hold)


class Money(Enum):
    """What becomes of an estimate when its request has ended. The values are the script's."""

    UNTOUCHED = 0
    KEEP = 1
    GIVE_BACK = 2


class Settlement(Enum):
    """What a settle met. The values are the script's."""

    UNKNOWN = 0
    """No record: it ended undetached, was given back, or its life is over. Nothing was charged."""
    SETTLED = 1
    REPEATED = 2
    """Settled before with the same amount."""
    DIFFERENT = 3
    """Settled before with another amount, which stands."""


class BackendError(Exception):
    """The backend could not be asked, did not answer in time or refused; nobody was decided about."""


WAITS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Seconds by which the calls of a backend are told apart."""


class Load(NamedTuple):
    """What a backend's connections have carried, and what waits."""

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
    """Where holds live, from their admission on."""

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent.

        It is under way when this returns, whatever becomes of the caller; awaiting waits for the backend.
        """

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""


class Backend(Holder, Protocol):
    """Where counts live. Every method that fails raises `BackendError` and nothing else."""

    @property
    def load(self) -> Load:
        """What its connections have carried, and what waits."""

    @property
    def is_away(self) -> bool:
        """Whether it is thought to be away; false where it was not asked yet."""

    async def open(self) -> None:
        """Connect ahead of the first request; without it the first request connects."""

    async def close(self) -> None:
        """Send what still waits and close; a closed backend may be opened again."""

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
