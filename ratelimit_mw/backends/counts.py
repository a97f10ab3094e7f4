"""What the memory backend counts: a window's log, a slot set, a period's books.

The same rules as `batch.lua`, which says what is guaranteed.
"""

from array import array
from typing import Any, NamedTuple, Protocol

from ratelimit_mw.charge import Figures, Money, Settlement
from ratelimit_mw.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw.periods import KEPT_AFTER_END


class State(Protocol):
    """How one limit stands. Each kind of state is handed the kind of limit it belongs to."""

    def is_dead(self, now: int) -> bool:
        """Whether it can be forgotten."""

    def fits(self, limit: Any, cost: int, price: int) -> bool:
        """Whether the limit admits the charge."""

    def charge(self, limit: Any, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Count the charge."""

    def figures(self, limit: Any, now: int, cost: int, price: int) -> Figures:
        """How it stands; `retry_after` for a charge of `cost` and `price`."""


class Log:
    """An exact sliding window: the time and cost of every live charge, oldest first."""

    __slots__ = ("_head", "_log", "length", "used")

    def __init__(self, length: int) -> None:
        self.length = length
        self.used = 0
        self._log = array("q")  # time, cost, time, cost, ...
        self._head = 0

    def is_dead(self, now: int) -> bool:
        """Whether everything counted has left the window."""
        return not self._log or self._log[-2] + self.length <= now

    def expire(self, now: int) -> None:
        """Step over the charges that have left the window at `now`."""
        log, head = self._log, self._head
        if len(log) > head and log[-2] > now:
            self._step_back(now)
        horizon = now - self.length
        while head < len(log) and log[head] <= horizon:
            self.used -= log[head + 1]
            head += 2
        if head != self._head:
            if head > 64 and head * 2 > len(log):
                del log[:head]
                head = 0
            self._head = head

    def _step_back(self, now: int) -> None:
        # The clock went back: what was stored as later happened now at the latest.
        for at in range(self._head, len(self._log), 2):
            self._log[at] = min(self._log[at], now)

    def fits(self, limit: Window, cost: int, price: int) -> bool:
        """Whether `cost` more units fit."""
        return self.used + cost <= limit.quota

    def figures(self, limit: Window, now: int, cost: int, price: int) -> Figures:
        """Units used and the waits, in microseconds, until one leaves and until `cost` fits."""
        log, head = self._log, self._head
        reset_after = log[head] + self.length - now if head < len(log) else 0
        needed = self.used + cost - limit.quota
        return Figures(self.used, reset_after, self._wait(needed, now) if needed > 0 else 0)

    def _wait(self, needed: int, now: int) -> int:
        for at in range(self._head, len(self._log), 2):
            needed -= self._log[at + 1]
            if needed <= 0:
                return self._log[at] + self.length - now
        return self.length

    def charge(self, limit: Window, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Count `cost` units at `now`."""
        log, granule = self._log, limit.granule
        if self._head < len(log) and (log[-2] == now or (granule and log[-2] // granule == now // granule)):
            log[-2] = now
            log[-1] += cost
        else:
            log.append(now)
            log.append(cost)
        self.used += cost


class SlotSet:
    """Leases by id, each with the time it expires."""

    __slots__ = ("leases",)

    def __init__(self) -> None:
        self.leases: dict[bytes, int] = {}

    def is_dead(self, now: int) -> bool:
        """Whether no lease is live."""
        return not self.leases or max(self.leases.values()) <= now

    def expire(self, now: int) -> None:
        """Forget the leases that have expired at `now`."""
        leases = self.leases
        if leases and min(leases.values()) <= now:
            self.leases = {lease_id: expires for lease_id, expires in leases.items() if expires > now}

    def fits(self, limit: Slots, cost: int, price: int) -> bool:
        """Whether a slot is free."""
        return len(self.leases) < limit.limit

    def figures(self, limit: Slots, now: int, cost: int, price: int) -> Figures:
        """How many are active, and whether that is all, for a charge that is not admitted yet."""
        return Figures(len(self.leases), 0, int(cost > 0 and not self.fits(limit, cost, price)))

    def charge(self, limit: Slots, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Take a slot until its lease ends."""
        self.leases[lease_id] = now + int(limit.lease * SECOND)

    def renew(self, lease_id: bytes, now: int, lease: float) -> bool:
        """Let a live lease last `lease` seconds from now; an expired one is never revived."""
        live = self.leases.pop(lease_id, 0) > now
        if live:
            self.leases[lease_id] = now + int(lease * SECOND)
        return live


class Book:
    """What one period has spent and what it holds for charges not yet settled."""

    __slots__ = ("ends", "held", "spent")

    def __init__(self, ends: int) -> None:
        self.ends = ends
        self.spent = 0
        self.held = 0

    def is_dead(self, now: int) -> bool:
        """Whether the period can no longer be settled."""
        return self.ends + KEPT_AFTER_END <= now

    def fits(self, limit: Allowance, cost: int, price: int) -> bool:
        """Whether `price` more fits."""
        return self.spent + self.held + price <= limit.amount

    def figures(self, limit: Allowance, now: int, cost: int, price: int) -> Figures:
        """Spent, held, and whether too little is left for `price`."""
        return Figures(self.spent, self.held, int(not self.fits(limit, cost, price)))

    def charge(self, limit: Allowance, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Hold `price`."""
        self.held += price


class Record(NamedTuple):
    """What was held for one charge and what it settled at (None: not yet)."""

    estimate: int
    settled: int | None
    ends: int
    """End of the longest of its periods."""

    def is_dead(self, now: int) -> bool:
        """Whether it can no longer be settled."""
        return self.ends + KEPT_AFTER_END <= now


def settle(record: Record, books: list[Book], amount: int, replace: bool) -> tuple[Record, Settlement]:
    """Put `amount` in place of a record's estimate, once."""
    if record.settled == amount:
        return record, Settlement.REPEATED
    if record.settled is not None and not replace:
        return record, Settlement.DIFFERENT
    for book in books:
        if record.settled is None:
            book.held = max(book.held - record.estimate, 0)
        book.spent = max(book.spent + amount - (record.settled or 0), 0)
    return record._replace(settled=amount), Settlement.SETTLED


def close(record: Record, books: list[Book], money: Money) -> None:
    """Move or give back what an unsettled record holds, once its request has ended."""
    if record.settled is not None:
        return
    for book in books:
        book.held = max(book.held - record.estimate, 0)
        if money is Money.KEEP:
            book.spent += record.estimate
