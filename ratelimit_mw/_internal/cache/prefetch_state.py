"""Blocks of units taken ahead, and the figures that decide how many a process takes next."""

from operator import length_hint
from typing import TYPE_CHECKING

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.runtime.leaf import Numbers

if TYPE_CHECKING:
    from collections.abc import Iterator

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
SHARED_START = 4 * START
"""`START` for limits that all callers share, on which every worker draws."""
RESERVE = 8
"""At most such a part of what is left of a limit is taken at once."""
MOST = 256
"""Requests that a block is for at most: more would save nothing that counts."""
GROWTH = 4
"""Largest ratio of a block to the requests spent since the last block was taken."""
REFILL = 2
"""With such a part of a block left the next is taken."""


class PrefetchedBlock:
    """Units for so many requests of one charge, to be spent before `until`."""

    __slots__ = (
        "decided",
        "era",
        "left_over",
        "low",
        "received",
        "returned",
        "size",
        "units",
        "until",
        "windows",
    )

    def __init__(self, charge: Charge, outcome: Outcome, size: int, era: object) -> None:
        self.size: int = size
        self.units: Iterator[int] = iter(range(size - 1, -1, -1))
        """Number of requests left after each that is spent.

        Two threads never get the same number: taking one is a single step."""
        self.returned: list[int] = []
        """Units that were drawn and put back."""
        self.left_over: int = 0
        """Number of requests that it was still good for when it was given up."""
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
        return length_hint(self.units) + len(self.returned)


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
        "_start",
        "_started",
        "ahead",
        "asking_until",
        "block",
        "charge",
        "life",
        "next_block",
    )

    def __init__(self, charge: Charge, start: int = START) -> None:
        """`charge` is what one request asks: of windows alone, and not of metered units."""
        windows = [each.limit for each in charge.counters if isinstance(each.limit, Window)]
        shortest = min([window.length for window in windows])
        self.charge: Charge = charge
        self._start = start
        self.ahead: int = min(shortest // PART, LONGEST)
        self.life: float = self.ahead * (1 - 1 / DRIFT) / SECOND
        """Seconds for which a block may be spent, from when it was asked for."""
        self.block: PrefetchedBlock | None = None
        self.next_block: PrefetchedBlock | None = None
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

    def add(self, block: PrefetchedBlock) -> None:
        """Add a block to those in hand: at most two, of which the second waits."""
        if self.block is None:
            self.block = block
        else:
            if self.next_block is not None:
                self._end(self.next_block)
            self.next_block = block

    def after(self, block: PrefetchedBlock) -> PrefetchedBlock | None:
        """The block to spend from when this one is over."""
        if self.block is block:  # and no other thread has seen to it
            self.block, self.next_block = self.next_block, None
            self._end(block)
        return self.block

    def put_back(self, block: PrefetchedBlock, unit: int) -> None:
        """Have the units of a request in hand again, which was not admitted after all."""
        block.returned.append(unit)
        if self.block is block or self.next_block is block:
            return
        if self.block is None or self.next_block is None:  # it was given up when its last unit was drawn
            self._spent -= block.size - block.left_over
            self._lost -= block.left_over
            self.add(block)
        else:
            self._spent -= 1
            self._lost += 1

    def wanted(self, now: float) -> int:
        """For how many requests to take units now; 0 for none."""
        while self.block is not None and (now >= self.block.until or not self.block.left):
            self.after(self.block)
        block = self.block
        in_hand = 0 if block is None else block.left
        if self.next_block is not None or (block is not None and in_hand > block.low):
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
        most = max((spent - self._before[0]) // SHARE, rest // self._start)
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
        limits = [each.limit for each in charge.counters]
        quotas = [limit.quota for limit in limits if isinstance(limit, Window)]
        return min([(quota - last.used(place)) // charge.cost for place, quota in enumerate(quotas)])

    def _end(self, block: PrefetchedBlock) -> None:
        left = block.left_over = block.left
        self._spent += block.size - left
        self._lost += left


class PrefetchedUnit:
    """The units of one request, drawn from a block."""

    __slots__ = ("_age", "_block", "_left", "_state", "charge")

    def __init__(self, state: PrefetchState, block: PrefetchedBlock, left: int, at: float) -> None:
        self._state = state
        self._block = block
        self._left = left
        self._age: int = int((at - block.received) * SECOND)
        """Microseconds from when the block was received to when they were drawn."""
        self.charge: Charge | None = None
        """The charge that the backend was asked for besides: none."""

    def put_back(self) -> None:
        """Have the units in hand again: the request was not admitted after all. To be called once."""
        self._state.put_back(self._block, self._left)

    def admission(self) -> Outcome:
        """Return the admission of a request by these units alone."""
        row = Numbers()
        for place in range(len(self._block.windows)):
            self.append_status(row, place, spent=True)
        outcome = Outcome(True, self._block.decided + self._age, row, NO_RESERVATION)
        outcome.drawn = self
        return outcome

    def append_status(self, row: Numbers, place: int, spent: bool) -> None:
        """Append the status of one window, as this process knows it; `spent` says whether these units are.

        Units in hand count as not used yet.
        """
        used, reset_after, _ = self._block.windows[place]
        unspent = self._left if spent else self._left + 1
        row.append(used - unspent * self._state.charge.cost)
        row.append(reset_after - self._age)
        row.append(0)


def is_taken_ahead(charge: Charge) -> bool:
    """Whether units of a charge can be taken ahead: it asks for nothing but the caller's own windows."""
    return bool(charge.counters) and all(
        counter.owner == "caller" and isinstance(counter.limit, Window) and not counter.limit.is_metered
        for counter in charge.counters
    )
