"""The embedded backend: counts in this process, with the same answers as the script on Redis."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

from ratelimit_mw.backends.counts import Book, Log, Record, SlotSet, State, close, settle
from ratelimit_mw.charge import (
    NOTHING_HELD,
    Charge,
    Clock,
    Counter,
    Held,
    Hold,
    Money,
    Outcome,
    Settlement,
    place_of,
)
from ratelimit_mw.limits import Limit, Slots, Window

MAX_WINDOWS = 200_000
"""Windows remembered per length; beyond it the caller not seen for longest is forgotten."""

Place = tuple[str, str]
K = TypeVar("K")
S = TypeVar("S", Log, SlotSet, Book, Record)


def wall_clock() -> int:
    """Microseconds since 1970, by this machine's clock."""
    return time.time_ns() // 1000


class MemoryBackend:
    """Windows, slots and budgets of one process; nothing to install, nothing shared."""

    def __init__(self, *, clock: Clock = wall_clock, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        # By length, so that within each the least recently used is also the first to expire.
        self._logs: dict[int, OrderedDict[Place, Log]] = {}
        self._slots: OrderedDict[Place, SlotSet] = OrderedDict()
        self._books: OrderedDict[Place, Book] = OrderedDict()
        self._records: OrderedDict[bytes, Record] = OrderedDict()

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
        found: list[tuple[Limit, State]] = [
            (counter.limit, self._load(counter, now)) for counter in charge.counters
        ]
        admitted = all([state.fits(limit, cost, price) for limit, state in found])
        hold = NOTHING_HELD
        if admitted and lease_id is not None:
            for limit, state in found:
                state.charge(limit, now, lease_id, cost, price)
            hold = charge.hold(lease_id, price, now)
            if hold.periods:
                self._open_record(hold, now)
        if admitted:
            cost = price = 0
        return Outcome(
            admitted, now, [state.figures(limit, now, cost, price) for limit, state in found], hold
        )

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        now = self._clock()
        slots = [self._slots.get(_place(held)) for held in hold.slots]
        return all([s is not None and s.renew(hold.id, now, lease) for s in slots])

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        for held in hold.slots:
            slots = self._slots.get(_place(held))
            if slots is not None:
                slots.leases.pop(hold.id, 0)
                if not slots.leases:
                    del self._slots[_place(held)]
        if hold.periods and money is not Money.UNTOUCHED:
            record = self._records.pop(hold.id, None)
            if record is not None:
                close(record, self._periods(hold), money)
        return _DONE

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        record = self._records.get(hold.id)
        if record is None or record.is_dead(self._clock()):
            return Settlement.UNKNOWN
        self._records[hold.id], met = settle(record, self._periods(hold), amount, replace)
        return met

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        now = self._clock()
        for counter in charge.counters:
            place = (counter.partition, counter.scope)
            if isinstance(counter.limit, Window):
                logs = self._logs.get(counter.limit.length)
                if logs is not None:
                    logs.pop(place, None)
            elif isinstance(counter.limit, Slots):
                self._slots.pop(place, None)
            else:
                self._books.pop(_place(place_of(counter, now)), None)

    def _load(self, counter: Counter, now: int) -> State:
        limit = counter.limit
        if isinstance(limit, Window):
            return self._log(counter, limit, now)
        if isinstance(limit, Slots):
            slots = _get(self._slots, (counter.partition, counter.scope), SlotSet, now)
            if len(slots.leases) >= limit.limit:
                slots.expire(now)
            return slots
        period = place_of(counter, now)
        return _get(self._books, _place(period), lambda: Book(period.ends), now)

    def _log(self, counter: Counter, window: Window, now: int) -> Log:
        length = window.length
        logs = self._logs.get(length)
        if logs is None:
            logs = self._logs[length] = OrderedDict()
        log = _get(logs, (counter.partition, counter.scope), lambda: Log(length), now)
        if len(logs) > self._max_windows:
            logs.popitem(last=False)
        log.expire(now)
        return log

    def _open_record(self, hold: Hold, now: int) -> None:
        ends = max(held.ends for held in hold.periods)
        _get(self._records, hold.id, lambda: Record(hold.price, None, ends), now)

    def _periods(self, hold: Hold) -> list[Book]:
        return [self._books.setdefault(_place(held), Book(held.ends)) for held in hold.periods]


class _Done:
    """Awaits nothing: what was asked for is done."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


_DONE = _Done()


def _place(held: Held) -> Place:
    return held[:2]


def _get(states: OrderedDict[K, S], place: K, make: Callable[[], S], now: int) -> S:
    """The state at `place`, made where there is none.

    A newcomer pays for two steps of a hand that goes round and takes away what is dead, so that the dead
    leave faster than the living arrive.
    """
    state = states.get(place)
    if state is not None:
        states.move_to_end(place)
        return state
    for _ in range(2):
        if not states:
            break
        first, oldest = states.popitem(last=False)
        if not oldest.is_dead(now):
            states[first] = oldest
    state = states[place] = make()
    return state
