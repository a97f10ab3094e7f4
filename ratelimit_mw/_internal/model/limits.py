"""The three kinds of limit, as plain values: what the settings say and what the backend enforces.

Nothing here knows who is calling, HTTP or a backend. Times are whole microseconds, so that Python,
Lua and the tests compare the same integers.
"""

from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal

SECOND = 1_000_000
"""Microseconds in a second."""

UNIT_SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3_600,
    "day": 86_400,
    "month": 30 * 86_400,
    "year": 365 * 86_400,
}
"""Length of each unit of time a rate may name. A month is 30 days and a year 365: only spending
goes by the calendar."""

EXACT_QUOTA = 1_000
"""Up to this quota a window remembers every request to the microsecond. Above it, requests within
the same thousandth of the window share one entry, under the later time."""

DEFAULT_LEASE = 30.0
"""Seconds after which a slot that nobody renews is free again, and an estimate given back."""

REQUESTS = "requests"
"""Unit that a window counts by default: requests, by the cost of their route."""

ANSWERS = "answers:"
"""Begins the unit of a window that counts requests by their answers, such as failures; a name follows.

It is charged as a metered unit is, and settled when the answer is known."""


def part_of(amount: int, share: float) -> int:
    """A share of an amount: rounded down, and at least 1."""
    return max(int(Decimal(repr(share)) * amount), 1)  # as the settings wrote it: 0.29 of 100 is 29


OnFailure = Literal["local", "allow", "deny"]
"""Way to decide while the backend is away: by this process alone, admit everybody, or refuse."""


@dataclass(frozen=True, slots=True)
class Window:
    """`quota` units in any interval of `multiple` `unit`s: an exact sliding window."""

    quota: int
    multiple: int
    unit: str
    counts: str = REQUESTS
    """Unit that the window counts: `requests`, or a metered unit such as `tokens`.

    Requests estimate and settle metered units.
    """
    whole: int = 0
    """Quota of all callers together, where `quota` is a plan's share of it; 0 where it is all of it."""
    seconds: int = field(init=False, compare=False)
    text: str = field(init=False, compare=False)
    """The rate in its shortest notation, such as `60/minute` or `5/2 seconds`."""
    length: int = field(init=False, compare=False, repr=False)
    """Length of the window in microseconds."""
    granule: int = field(init=False, compare=False, repr=False)
    """Microseconds within which requests share an entry; 0 where each one has its own."""

    def __post_init__(self) -> None:
        seconds = self.multiple * UNIT_SECONDS[self.unit]
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "length", seconds * SECOND)
        # All who share a count write it alike.
        granule = 0 if (self.whole or self.quota) <= EXACT_QUOTA else seconds * SECOND // EXACT_QUOTA
        object.__setattr__(self, "granule", granule)
        length = self.unit if self.multiple == 1 else f"{self.multiple} {self.unit}s"
        object.__setattr__(self, "text", f"{self.quota}/{length}")

    def at_share(self, share: float) -> "Window":
        """The part of a shared window that callers of a plan may use: rounded down, and at least 1."""
        return self if share == 1 else replace(self, quota=part_of(self.quota, share), whole=self.quota)

    @property
    def is_metered(self) -> bool:
        """Whether it counts a unit of which only the app knows how much a request uses."""
        return self.counts != REQUESTS

    @property
    def counts_answers(self) -> bool:
        """Whether it counts requests by their answers."""
        return self.counts.startswith(ANSWERS)

    @property
    def counted(self) -> str:
        """Word for what it counts, as callers are told."""
        return REQUESTS if self.counts_answers else self.counts

    @property
    def name(self) -> str:
        """The rate with the unit that it counts, where that is not requests: `100000 tokens/minute`."""
        if self.counted == REQUESTS:
            return self.text
        quota, _, length = self.text.partition("/")
        return f"{quota} {self.counts}/{length}"

    @property
    def phrase(self) -> str:
        """The length in words, such as `1 minute` or `2 seconds`."""
        return f"{self.multiple} {self.unit}{'' if self.multiple == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Slots:
    """So many requests or jobs at once. A slot not renewed for `lease_seconds` frees itself."""

    limit: int
    unit: str = "request"
    """Name of the work that takes a slot, for the refusal's message."""
    lease_seconds: float = DEFAULT_LEASE
    max_hold: float | None = None
    """Seconds after which a slot is no longer renewed, though its work may go on."""
    whole: int = 0
    """Slots of all callers together, where `limit` is a plan's share of them; 0 where it is all of them."""

    def at_share(self, share: float) -> "Slots":
        """The part of shared slots that callers of a plan may hold: rounded down, and at least 1."""
        return self if share == 1 else replace(self, limit=part_of(self.limit, share), whole=self.limit)


@dataclass(frozen=True, slots=True)
class Budget:
    """Money (or tokens) per calendar day and month in a time zone.

    Amounts are whole micro-units of the currency; whole tokens where it is `token`.
    """

    daily: int | None = None
    monthly: int | None = None
    currency: str = "USD"
    timezone: str = "UTC"
    warn_at: float | None = None
    """Share of a budget from which on responses carry `X-Spending-*`."""

    @property
    def allowances(self) -> "tuple[Allowance, ...]":
        """The budget's limits, one for each period that has an amount."""
        periods: tuple[tuple[Literal["daily", "monthly"], int | None], ...] = (
            ("daily", self.daily),
            ("monthly", self.monthly),
        )
        return tuple(
            Allowance(amount, period, self.currency, self.timezone, self.warn_at)
            for period, amount in periods
            if amount is not None
        )


@dataclass(frozen=True, slots=True)
class Allowance:
    """Amount that a budget grants in one calendar day or month, in micro-units (whole tokens for `token`)."""

    amount: int
    period: Literal["daily", "monthly"]
    currency: str = "USD"
    timezone: str = "UTC"
    warn_at: float | None = None


Limit = Window | Slots | Allowance
