"""What a request asks of the backend, and the backend's answer.

A backend knows these values and nothing of HTTP, plans or API keys.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol

from ratelimit_mw.limits import Allowance, Limit, Slots
from ratelimit_mw.periods import period_at

Clock = Callable[[], int]
"""Microseconds since 1970. A backend's own clock decides; tests hand in one of their own."""

LEASE_ID_SIZE = 16
"""Bytes of a lease id: random, so that nobody can guess another's."""


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
        "allowances",
        "cost",
        "counters",
        "currency",
        "last",
        "lease",
        "max_hold",
        "prepared",
        "slots",
    )

    def __init__(self, counters: Iterable[Counter], cost: int = 1) -> None:
        self.counters = tuple(counters)
        self.cost = cost
        limits = [c.limit for c in self.counters if isinstance(c.limit, Slots)]
        self.slots = tuple(Held(c.partition, c.scope) for c in self.counters if isinstance(c.limit, Slots))
        # A request's slots are renewed and freed together, so the shortest counts for all.
        self.lease = min((limit.lease for limit in limits), default=0.0)
        self.max_hold = min((limit.max_hold for limit in limits if limit.max_hold), default=None)
        self.allowances = tuple(c for c in self.counters if isinstance(c.limit, Allowance))
        self.currency = next(
            (c.limit.currency for c in self.counters if isinstance(c.limit, Allowance)), "USD"
        )
        self.prepared: object = None
        """A backend's own: what it has made of this charge once, to use it for every request."""
        self.last: Outcome | None = None
        """How it went last: where this process starts from while the backend is away."""

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
    """A backend's answer to a charge: `figures` in the order of its counters."""

    admitted: bool
    now: int
    figures: Sequence[Figures]
    hold: Hold


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


class Load(NamedTuple):
    """What a backend's connections have carried, and what waits."""

    batches: int = 0
    """Calls of the script, and in `operations` what they were for."""
    operations: int = 0
    owed: int = 0
    """Releases and settles that wait to be written, and are sent until they arrive."""
    failed: int = 0
    """Operations that the server answered with an error of their own."""

    def plus(self, other: "Load") -> "Load":
        """Both together."""
        return Load(*[mine + theirs for mine, theirs in zip(self, other, strict=True)])


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
