"""Units taken ahead, so that most requests of a plan with `prefetch` cost the backend nothing.

Why no interval can hold more than the limit: a block is charged like a request, all its windows at once or
none, and counts in them from when it is taken until a window's length after the last moment at which it may
be spent (`Charge.ahead`). This process spends it only before that moment, which it counts from when it sent
the question, and so from before the backend decided. Now look at all units that were spent within an interval
of a window's length. When the last of them was taken, the others still counted, since none was spent more
than that length before; and the backend admits no more than the limit at once. A worker that dies or pauses
spends less, never more. Nor does it matter who else charges these windows, by which settings: until when a
unit counts is written where it is counted.

Why little is lost, though units that nobody spends count all the same: of what was spent in this period and
the one before, each as long as the shortest window, at most a `SHARE`-th is in hand or lost, or a `START`-th
of what is left of the limit where that is more. So it is at most two `SHARE`-ths of a limit, however many
workers there are and whatever becomes of them, and twice a `START`-th for each worker. What is spent from
blocks counts at most a `PART`-th of the window longer. Together at least 90 % of a limit can be used by up to
18 workers, even if all lose as much as they may. Near the limit nothing is taken ahead.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import length_hint
from weakref import WeakSet

from ratelimit_mw._internal.model.backend import Backend, BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, NO_RESERVATION
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.runtime.leaf import Numbers

PART = 40
"""A block is spent within this part of the shortest window, or within `LONGEST`."""
LONGEST = 5 * SECOND
"""Microseconds."""
DRIFT = 50
"""The last such part of a block's life is left out: clocks may differ in speed by that much."""
SHARE = 50
"""Of so many units spent one may be in hand or lost."""
START = 1_024
"""Number of units left of a limit for each unit that may be in hand or lost.

So blocks of large limits need not begin small."""
RESERVE = 8
"""At most such a part of what is left of a limit is taken at once."""
MOST = 256
"""Requests that a block is for at most: more would save nothing that counts."""
GROWTH = 4
"""Largest ratio of a block to the requests spent since the last block was taken."""
REFILL = 2
"""With such a part of a block left the next is taken."""
PATIENCE = 1.0
"""Seconds after which a question whose answer did not come is asked anew."""

SteadyClock = Callable[[], float]


def steady_clock() -> SteadyClock:
    """Seconds that never go back, those included in which the machine slept, where the system counts them."""
    try:
        clock = time.CLOCK_BOOTTIME
        time.clock_gettime(clock)
    except (AttributeError, OSError):
        return time.monotonic
    return partial(time.clock_gettime, clock)


class PrefetchBatch:
    """Units for so many requests of one charge, to be spent before `until`."""

    __slots__ = ("decided", "era", "low", "received", "size", "units", "until", "windows")

    def __init__(self, charge: Charge, outcome: Outcome, size: int, era: object) -> None:
        self.size: int = size
        self.units: Iterator[int] = iter(range(size - 1, -1, -1))
        """Number of requests left after each that is spent.

        Two threads never get the same number: taking one is a single step."""
        self.low: int = size // REFILL
        self.decided: int = outcome.now
        # What is left grows by a unit that leaves, and is looked up only when the block is over.
        self.windows: list[WindowStatus] = [
            WindowStatus(each.used, max(each.reset_after_us, charge.ahead), 0)
            for each in charge.statuses(outcome)
            if isinstance(each, WindowStatus)
        ]
        """Status of each window, this block's units included, until one of its units leaves."""
        self.era: object = era
        self.received: float = 0.0
        self.until: float = 0.0

    @property
    def left(self) -> int:
        """Number of requests that the block is still good for."""
        return length_hint(self.units)


class PrefetchState:
    """Prefetched units of one charge in this process, and the figures that decide how many it takes next."""

    __slots__ = (
        "_before",
        "_began",
        "_lost",
        "_marked",
        "_now",
        "_period",
        "_spent",
        "_started",
        "ahead",
        "asking_until",
        "block",
        "charge",
        "life",
        "spare",
    )

    def __init__(self, charge: Charge) -> None:
        """`charge` is what one request asks, and `is_taken_ahead` is true of it."""
        shortest = min([window.length for window in charge.windows])
        self.charge: Charge = charge
        self.ahead: int = min(shortest // PART, LONGEST)
        self.life: float = self.ahead * (1 - 1 / DRIFT) / SECOND
        """Seconds for which a block may be spent, from when it was asked for."""
        self.block: PrefetchBatch | None = None
        self.spare: PrefetchBatch | None = None
        """Block to spend from when `block` is over."""
        self.asking_until: float = 0.0
        """A question for more is under way, until its answer comes or, at the latest, until then."""
        self._period = shortest / SECOND
        self._spent = self._lost = 0  # of blocks that are over, and of requests that asked for themselves
        self._began, self._started = 0.0, 0  # when the pace was measured from, and what was spent by then
        self._marked = 0.0  # when the present period began
        self._before = self._now = (0, 0)  # what was spent and lost when the last and the present one began

    def admitted(self) -> None:
        """A request was admitted that asked the backend for itself."""
        self._spent += 1

    def lose(self, number: int) -> None:
        """So many requests' units were taken, as far as one knows, and can't be spent."""
        self._lost += number

    def keep(self, block: PrefetchBatch) -> None:
        """Have a block in hand."""
        if self.block is None:
            self.block = block
        else:
            if self.spare is not None:
                self._end(self.spare)
            self.spare = block

    def after(self, block: PrefetchBatch) -> PrefetchBatch | None:
        """The block to spend from when this one is over."""
        if self.block is block:  # and no other thread has seen to it
            self.block, self.spare = self.spare, None
            self._end(block)
        return self.block

    def wanted(self, now: float) -> int:
        """For how many requests to take units now; 0 for none."""
        while self.block is not None and (now >= self.block.until or not self.block.left):
            self.after(self.block)
        block = self.block
        in_hand = 0 if block is None else block.left
        if self.spare is not None or (block is not None and in_hand > block.low):
            return 0
        spent = self._spent + (0 if block is None else block.size - in_hand)
        self._turn(now, spent)
        elapsed, recent = now - self._began, spent - self._started
        if elapsed > self.life:  # a pace of long ago, or none
            self._began, self._started = now, spent
            return 0
        # What half a block's life takes at the present pace, so that a block is gone before its time is.
        pace = min(self.life / 2 / max(elapsed, 1e-6), GROWTH)
        rest = self._rest()
        most = max((spent - self._before[0]) // SHARE, rest // START)
        allowed = most - (self._lost - self._before[1]) - in_hand
        number = min(int(recent * pace), allowed, rest // RESERVE, MOST)
        if number < 2:
            return 0
        self._began, self._started = now, spent
        return number

    def _turn(self, now: float, spent: int) -> None:
        """Begin a new period where the present one is over."""
        since = now - self._marked
        if since >= self._period:
            present = spent, self._lost
            self._before = self._now if since < 2 * self._period else present
            self._now, self._marked = present, now

    def _rest(self) -> int:
        """For how many requests there was room when the backend was asked last."""
        charge = self.charge
        last = charge.last
        if last is None:
            return 0
        return min([(each.quota - last.used(each.place)) // charge.cost for each in charge.windows])

    def _end(self, block: PrefetchBatch) -> None:
        left = block.left
        self._spent += block.size - left
        self._lost += left


class Prefetch:
    """Takes blocks for one limiter and spends them. Event loops use it, of several threads also."""

    def __init__(
        self, backend: Backend, tasks: set[asyncio.Future[None]], clock: SteadyClock | None = None
    ) -> None:
        """`tasks` holds the questions under way, for whoever closes the limiter."""
        self._backend = backend
        self._tasks = tasks
        self.era: object = object()  # blocks of another are not spent any more
        self.now: SteadyClock = clock or steady_clock()
        _all.add(self)

    def clear(self) -> None:
        """Forget every block, those included that are under way."""
        self.era = object()

    def spend(self, stock: PrefetchState) -> Outcome | None:
        """The units of one request from what is in hand; None where there are none. Asks nobody."""
        block = stock.block
        while block is not None:
            left = next(block.units, -1)
            if left >= 0:
                # The clock last: whatever pauses this process before it is seen, and what comes after it
                # happens to a request that was admitted in time.
                now = self.now()
                if now < block.until and block.era is self.era:
                    if left == block.low:
                        self.take(stock, now)
                    return _outcome(stock.charge, block, left, now)
            block = stock.after(block)
        return None

    def asked(self, stock: PrefetchState) -> None:
        """A request was admitted that found nothing in hand: take units for those that follow."""
        stock.admitted()
        self.take(stock, self.now())

    def take(self, stock: PrefetchState, now: float) -> None:
        """Take as many units as are wanted, if any, one block at a time. Waits for nothing."""
        if now < stock.asking_until:
            return
        number = stock.wanted(now)
        if number:
            stock.asking_until = now + PATIENCE
            taking = self._take(stock, number)
            task = asyncio.get_running_loop().create_task(taking, name="ratelimit_mw prefetch")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, stock: PrefetchState, number: int) -> None:
        charge = Charge(stock.charge.counters, stock.charge.cost * number, ahead=stock.ahead)
        era, sent = self.era, self.now()
        try:
            outcome = await self._backend.acquire(charge, NO_LEASE_ID)
        except BackendError:
            stock.lose(number)  # perhaps: only the answer would tell
            return  # requests ask for themselves, and are told
        finally:
            stock.asking_until = 0.0
        stock.charge.last = outcome
        if outcome.admitted:
            block = PrefetchBatch(charge, outcome, number, era)
            block.received, block.until = self.now(), sent + stock.life
            stock.keep(block)


def is_taken_ahead(charge: Charge) -> bool:
    """Whether units of a charge can be taken ahead: it asks for nothing but the caller's own windows."""
    return bool(charge.counters) and all(
        counter.owner == "caller" and isinstance(counter.limit, Window) and not counter.limit.is_metered
        for counter in charge.counters
    )


def _outcome(charge: Charge, block: PrefetchBatch, left: int, now: float) -> Outcome:
    """Return the admission of a request, with the limits as this process knows them.

    Units in hand count as not used yet.
    """
    age, unspent = int((now - block.received) * SECOND), left * charge.cost
    row = Numbers()
    for used, reset_after, _ in block.windows:
        row.append(used - unspent)
        row.append(reset_after - age)
        row.append(0)
    outcome = Outcome(True, block.decided + age, row, NO_RESERVATION)
    outcome.times = (0,)
    return outcome


_all: WeakSet[Prefetch] = WeakSet()


def _forget() -> None:
    for prefetch in _all:
        prefetch.clear()


if hasattr(os, "register_at_fork"):  # or parent and child would spend the same units
    os.register_at_fork(after_in_child=_forget)
