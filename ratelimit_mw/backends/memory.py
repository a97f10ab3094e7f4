"""The embedded backend: counts in this process, with the same answers as the script on Redis."""

import time
from collections.abc import Awaitable, Generator, Sequence
from typing import Any

from ratelimit_mw.backends.counts import Book, Log, Record, SlotSet, State, close, settle
from ratelimit_mw.backends.store import Store
from ratelimit_mw.charge import (
    NOTHING_HELD,
    BackendError,
    Charge,
    Clock,
    Counter,
    Held,
    Hold,
    Load,
    Money,
    Outcome,
    Settlement,
    place_of,
)
from ratelimit_mw.limits import Limit, Slots, Window

MAX_WINDOWS = 200_000
"""Windows remembered per length, days and months of budgets; beyond it the caller not seen for longest is
forgotten. Also how many charges that were never settled nor ended are remembered."""

Place = tuple[str, str]
Newcomers = list[tuple[Store[Place, Any], Place, State]]
"""States that are kept only if they are charged: who is refused leaves nothing behind."""


def wall_clock() -> int:
    """Microseconds since 1970, by this machine's clock."""
    return time.time_ns() // 1000


class MemoryBackend:
    """Windows, slots and budgets of one process; nothing to install, nothing shared."""

    def __init__(self, *, clock: Clock = wall_clock, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        # Windows by length, days and months apart: the least recently used is also the first to die.
        self._logs: dict[int, Store[Place, Log]] = {}
        self._days: Store[Place, Book] = Store(max_windows)
        self._months: Store[Place, Book] = Store(max_windows)
        self._slots: Store[Place, SlotSet] = Store(rotates=True)
        self._records: Store[bytes, Record] = Store(max_windows, rotates=True)

    load = Load()
    is_away = False

    async def open(self) -> None:
        """There is nothing to connect to."""

    async def close(self) -> None:
        """There is nothing to close; counts stay as long as the object."""

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        return self.decide(charge, lease_id, price)

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        return self.decide(charge, None, price)

    def decide(self, charge: Charge, lease_id: bytes | None, price: int) -> Outcome:
        """The decision, charged where there is a lease id to charge it to."""
        now = self._clock()
        cost = charge.cost
        if not (cost >= 1 and price >= 0):  # NaN compares false with everything
            raise BackendError(f"a cost is at least 1 and a price at least 0, not {cost!r} and {price!r}")
        newcomers: Newcomers = []
        exact = lease_id is None
        found: list[tuple[Limit, State]] = []
        admitted = True
        for counter in charge.counters:
            state = self._load(counter, now, newcomers, exact=exact)
            found.append((counter.limit, state))
            admitted = state.fits(counter.limit, cost, price) and admitted
        hold = NOTHING_HELD
        if admitted and lease_id is not None:
            for limit, state in found:
                state.charge(limit, now, lease_id, cost, price)
            for store, place, state in newcomers:
                store.add(place, state, now)
            hold = charge.hold(lease_id, price, now)
            if hold.periods:
                ends = max(held.ends for held in hold.periods)
                self._records.add(lease_id, Record(price, None, ends), now)
        if admitted:
            cost = price = 0
        return Outcome(
            admitted, now, [state.figures(limit, now, cost, price) for limit, state in found], hold
        )

    def recall(self, counter: Counter, entries: Sequence[tuple[int, int]]) -> None:
        """Take over what a window counted elsewhere, as times and costs, where nothing is counted yet."""
        limit = counter.limit
        if not isinstance(limit, Window) or not entries:
            return
        logs, place = self._logs_of(limit.length), (counter.partition, counter.scope)
        if logs.find(place) is None:
            log = Log(limit.length)
            for at, cost in entries:
                log.charge(limit, at, b"", cost, 0)
            logs.add(place, log, self._clock())

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        now = self._clock()
        slots = [self._slots.find(_place(held)) for held in hold.slots]
        return all([s is not None and s.renew(hold.id, now, lease) for s in slots])

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        for held in hold.slots:
            slots = self._slots.find(_place(held))
            if slots is not None:
                slots.leases.pop(hold.id, 0)
                if not slots.leases:
                    self._slots.remove(_place(held))
        if hold.periods and money is not Money.UNTOUCHED:
            record = self._records.remove(hold.id)
            if record is not None:
                close(record, self._periods(hold), money)
        return _DONE

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        if not amount >= 0:
            raise BackendError(f"an amount is at least 0, not {amount!r}")
        record = self._records.find(hold.id)
        if record is None or record.is_dead(self._clock()):
            return Settlement.UNKNOWN
        settled, met = settle(record, self._periods(hold), amount, replace)
        self._records.replace(hold.id, settled)
        return met

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        now = self._clock()
        for counter in charge.counters:
            place = (counter.partition, counter.scope)
            if isinstance(counter.limit, Window):
                self._logs_of(counter.limit.length).remove(place)
            elif isinstance(counter.limit, Slots):
                self._slots.remove(place)
            else:
                period = place_of(counter, now)
                self._books_of(period).remove(_place(period))

    def _load(self, counter: Counter, now: int, newcomers: Newcomers, *, exact: bool) -> State:
        limit = counter.limit
        place = (counter.partition, counter.scope)
        if isinstance(limit, Window):
            logs = self._logs_of(limit.length)
            log = logs.find(place)
            if log is None:
                log = Log(limit.length)
                newcomers.append((logs, place, log))
            log.expire(now)
            return log
        if isinstance(limit, Slots):
            slots = self._slots.find(place)
            if slots is None:
                slots = SlotSet()
                newcomers.append((self._slots, place, slots))
            if exact or len(slots.leases) >= limit.limit:
                slots.expire(now)
            return slots
        return self._load_book(place_of(counter, now), newcomers)

    def _load_book(self, period: Held, newcomers: Newcomers) -> Book:
        books = self._books_of(period)
        book = books.find(_place(period))
        if book is None:
            book = Book(period.ends)
            newcomers.append((books, _place(period), book))
        return book

    def _logs_of(self, length: int) -> Store[Place, Log]:
        logs = self._logs.get(length)
        if logs is None:
            logs = self._logs[length] = Store(self._max_windows)
        return logs

    def _books_of(self, period: Held) -> Store[Place, Book]:
        return self._days if period.scope.count("-") > 1 else self._months

    def _periods(self, hold: Hold) -> list[Book]:
        """The books of a hold's periods, opened again where they were forgotten and can still be settled."""
        newcomers: Newcomers = []
        books = [self._load_book(period, newcomers) for period in hold.periods]
        now = self._clock()
        for store, place, book in newcomers:
            if not book.is_dead(now):
                store.add(place, book, now)
        return books


class _Done:
    """Awaits nothing: what was asked for is done."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


_DONE = _Done()


def _place(held: Held) -> Place:
    return held[:2]
