"""What the memory backend counts: a window's log, a slot set, a period's books.

The same rules as `batch.lua`, which says what is guaranteed.
"""

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ratelimit_mw.backends.store import Kept
from ratelimit_mw.charge import Money, Settlement
from ratelimit_mw.compiled import core
from ratelimit_mw.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw.periods import KEPT_AFTER_END

_NEVER = 1 << 62
"""Later than any time; the same before zero is earlier than any."""


class State(Protocol):
    """How one limit stands. Each kind of state is handed the kind of limit it belongs to."""

    def is_dead(self, now: int) -> bool:
        """Whether it can be forgotten."""

    def fits(self, limit: Any, now: int, cost: int, price: int, exact: bool) -> bool:
        """Whether the limit admits the charge, asked before all else; `exact` where none will be made."""

    def charge(self, limit: Any, now: int, lease_id: bytes, cost: int, price: int) -> tuple[int, int, int]:
        """Count a charge that fits; its `Figures` are then these."""

    def figures(self, limit: Any, now: int, cost: int, price: int) -> tuple[int, int, int]:
        """Its `Figures`; the last is for a charge of `cost` and `price` that was not admitted, 0 for none."""


class PlainLog(Kept):
    """An exact sliding window: the time and cost of every live charge, oldest first."""

    __slots__ = ("_ahead", "_head", "_log", "_newest", "_oldest", "length", "used")

    def __init__(self, length: int) -> None:
        self.length = length
        self.used = 0
        self._log = array("q")  # time, cost, time, cost, ...
        self._head = 0
        self._oldest, self._newest = _NEVER, -_NEVER
        self._ahead = 0  # how much later than the clock shows an entry may lie

    def is_dead(self, now: int) -> bool:
        """Whether everything counted has left the window."""
        return self._newest + self.length <= now

    def fits(self, limit: Window, now: int, cost: int, price: int, exact: bool) -> bool:
        """Whether `cost` more units fit, once what has left the window is stepped over."""
        if self._oldest <= now - self.length or self._newest > now:
            self._expire(now)
        return self.used + cost <= limit.quota

    def _expire(self, now: int) -> None:
        """Step over the charges that have left the window at `now`."""
        log, head = self._log, self._head
        if self._newest <= now:
            self._ahead = 0
        elif self._newest > now + self._ahead:
            # The clock went back: what was stored as later happened now at the latest, and what was taken
            # ahead is used as much later as it could be when it was taken.
            for at in range(head, len(log), 2):
                log[at] = min(log[at], now + self._ahead)
        horizon = now - self.length
        while head < len(log) and log[head] <= horizon:
            self.used -= log[head + 1]
            head += 2
        if head > 64 and head * 2 > len(log):
            del log[:head]
            head = 0
        self._head = head
        self._oldest, self._newest = (log[head], log[-2]) if head < len(log) else (_NEVER, -_NEVER)

    def figures(self, limit: Window, now: int, cost: int, price: int) -> tuple[int, int, int]:
        """Units used and the waits, in microseconds, until one leaves and until `cost` fits."""
        reset_after = self._oldest + self.length - now if self.used else 0
        needed = self.used + cost - limit.quota
        return self.used, reset_after, self._wait(needed, now) if needed > 0 else 0

    def _wait(self, needed: int, now: int) -> int:
        for at in range(self._head, len(self._log), 2):
            needed -= self._log[at + 1]
            if needed <= 0:
                return self._log[at] + self.length - now
        return self.length

    def charge(self, limit: Window, now: int, lease_id: bytes, cost: int, price: int) -> tuple[int, int, int]:
        """Count `cost` units at `now`."""
        log, newest, granule = self._log, self._newest, limit.granule
        # What another has taken ahead lies later.
        at = now if now > newest else newest  # noqa: FURB136 - a call costs three times as much
        if newest == at or (granule and newest // granule == at // granule):
            log[-2] = at
            log[-1] += cost
            if self._oldest == newest:
                self._oldest = log[self._head]
        else:
            log.extend((at, cost))
            if newest < 0:
                self._oldest = at
        self._newest = at
        self.used += cost
        return self.used, self._oldest + self.length - now, 0

    def take_ahead(self, limit: Window, now: int, cost: int, ahead: int) -> tuple[int, int, int]:
        """Count `cost` units as used so much later."""
        self._ahead = max(self._ahead, ahead)
        self.charge(limit, now + ahead, b"", cost, 0)
        return self.figures(limit, now, 0, 0)


new_log: Callable[[int], PlainLog] = PlainLog if core is None else core.Log
"""A window's log, of so many microseconds."""


class _Slots(Kept):
    """What is counted of slots."""

    __slots__ = ("leases", "soonest")

    def __init__(self) -> None:
        self.leases: dict[bytes, int] = {}
        self.soonest = _NEVER
        """No lease expires before."""


if core is not None and not TYPE_CHECKING:
    _Slots = core.Slots


class SlotSet(_Slots):
    """Leases by id, each with the time it expires."""

    __slots__ = ()

    def is_dead(self, now: int) -> bool:
        """Whether no lease is live."""
        return not self.leases or max(self.leases.values()) <= now

    def fits(self, limit: Slots, now: int, cost: int, price: int, exact: bool) -> bool:
        """Whether a slot is free, once the leases that have expired are forgotten."""
        if self.soonest <= now:
            self.leases = {each: expires for each, expires in self.leases.items() if expires > now}
            self.soonest = min(self.leases.values(), default=_NEVER)
        return len(self.leases) < limit.limit

    def figures(self, limit: Slots, now: int, cost: int, price: int) -> tuple[int, int, int]:
        """How many are active, and whether that is all."""
        active = len(self.leases)
        return active, 0, int(cost > 0 and active >= limit.limit)

    def charge(self, limit: Slots, now: int, lease_id: bytes, cost: int, price: int) -> tuple[int, int, int]:
        """Take a slot until its lease ends."""
        self.leases[lease_id] = expires = now + int(limit.lease * SECOND)
        if expires < self.soonest:  # noqa: PLR1730 - a call costs three times as much
            self.soonest = expires
        return len(self.leases), 0, 0

    def renew(self, lease_id: bytes, now: int, lease: float) -> bool:
        """Let a live lease last `lease` seconds from now; an expired one is never revived."""
        live = self.leases.pop(lease_id, 0) > now
        if live:
            self.leases[lease_id] = expires = now + int(lease * SECOND)
            self.soonest = min(self.soonest, expires)
        return live


class Book(Kept):
    """What one period has spent and what it holds for charges not yet settled."""

    __slots__ = ("ends", "held", "spent")

    def __init__(self, ends: int) -> None:
        self.ends = ends
        self.spent = 0
        self.held = 0

    def is_dead(self, now: int) -> bool:
        """Whether the period can no longer be settled."""
        return self.ends + KEPT_AFTER_END <= now

    def fits(self, limit: Allowance, now: int, cost: int, price: int, exact: bool) -> bool:
        """Whether `price` more fits."""
        return self.spent + self.held + price <= limit.amount

    def figures(self, limit: Allowance, now: int, cost: int, price: int) -> tuple[int, int, int]:
        """Spent, held, and whether too little is left for `price`."""
        return self.spent, self.held, int(self.spent + self.held + price > limit.amount)

    def charge(
        self, limit: Allowance, now: int, lease_id: bytes, cost: int, price: int
    ) -> tuple[int, int, int]:
        """Hold `price`."""
        self.held += price
        return self.spent, self.held, 0


class Record(Kept):
    """What was held for one charge and what it settled at (None: not yet)."""

    __slots__ = ("ends", "estimate", "settled")

    def __init__(self, estimate: int, ends: int) -> None:
        """`ends` is the end of the longest of its periods."""
        self.estimate = estimate
        self.settled: int | None = None
        self.ends = ends

    def is_dead(self, now: int) -> bool:
        """Whether it can no longer be settled."""
        return self.ends + KEPT_AFTER_END <= now


def settle(record: Record, books: list[Book], amount: int, replace: bool) -> Settlement:
    """Put `amount` in place of a record's estimate, once."""
    if record.settled == amount:
        return Settlement.REPEATED
    if record.settled is not None and not replace:
        return Settlement.DIFFERENT
    for book in books:
        if record.settled is None:
            book.held = max(book.held - record.estimate, 0)
        book.spent = max(book.spent + amount - (record.settled or 0), 0)
    record.settled = amount
    return Settlement.SETTLED


def close(record: Record, books: list[Book], money: Money) -> None:
    """Move or give back what an unsettled record holds, once its request has ended."""
    if record.settled is not None:
        return
    for book in books:
        book.held = max(book.held - record.estimate, 0)
        if money is Money.KEEP:
            book.spent += record.estimate
