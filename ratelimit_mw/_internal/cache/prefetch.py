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
18 workers, even if all lose as much as they may; of a limit that all callers share, whose `START` is four
times as large, by up to 64. Near the limit nothing is taken ahead.
"""

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

from ratelimit_mw._internal.cache.prefetch_state import PrefetchedBlock, PrefetchedUnit, PrefetchState
from ratelimit_mw._internal.model.backend import Backend, BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID

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

    def spend(self, state: PrefetchState) -> Outcome | None:
        """The admission of one request by what is in hand; None where there is nothing. Asks nobody."""
        unit = self.draw(state)
        return None if unit is None else unit.admission()

    def draw(self, state: PrefetchState) -> PrefetchedUnit | None:
        """The units of one request from what is in hand; None where there are none. Asks nobody."""
        block = state.block
        while block is not None:
            left = next(block.units, -1)
            if left < 0 and block.returned:
                left = _pop(block.returned)
            if left >= 0:
                # The clock last: whatever pauses this process before it is seen, and what comes after it
                # happens to a request that was admitted in time.
                now = self.now()
                if now < block.until and block.era is self.era:
                    if left == block.low:
                        self.take(state, now)
                    return PrefetchedUnit(state, block, left, now)
            block = state.after(block)
        return None

    def refill(self, state: PrefetchState) -> None:
        """A request was admitted that found nothing in hand: take units for those that follow."""
        state.admitted()
        self.take(state, self.now())

    def take(self, state: PrefetchState, now: float) -> None:
        """Take as many units as are wanted, if any, one block at a time. Waits for nothing."""
        if now < state.asking_until:
            return
        number = state.wanted(now)
        if number:
            state.asking_until = now + PATIENCE
            taking = self._take(state, number)
            task = asyncio.get_running_loop().create_task(taking, name="ratelimit_mw prefetch")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, state: PrefetchState, number: int) -> None:
        charge = Charge(state.charge.counters, state.charge.cost * number, ahead=state.ahead)
        era, sent = self.era, self.now()
        try:
            outcome = await self._backend.acquire(charge, NO_LEASE_ID)
        except BackendError:
            state.lose(number)  # perhaps: only the answer would tell
            return  # requests ask for themselves, and are told
        finally:
            state.asking_until = 0.0
        state.charge.last = outcome
        if outcome.admitted:
            block = PrefetchedBlock(charge, outcome, number, era)
            block.received, block.until = self.now(), sent + state.life
            state.add(block)


def _pop(returned: list[int]) -> int:
    """Take a unit that was put back; -1 where another thread has taken the last."""
    try:
        return returned.pop()
    except IndexError:
        return -1


_all: WeakSet[Prefetch] = WeakSet()


def _forget() -> None:
    for prefetch in _all:
        prefetch.clear()


if hasattr(os, "register_at_fork"):  # or parent and child would spend the same units
    os.register_at_fork(after_in_child=_forget)
