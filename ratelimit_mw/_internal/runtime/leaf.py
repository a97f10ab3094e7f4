"""Storage and text that C does better: used from `leaf.pyx` where the package is compiled, else from here.

Nothing in it knows of rate limiting. Both files offer the same names, and the same tests hold for both.
"""

import struct
import threading
from array import array
from collections.abc import Callable
from typing import Any, ClassVar


class Entries:
    """Pairs of a time and a cost, oldest first, as 64-bit integers."""

    __slots__ = ("_head", "_numbers")

    def __init__(self) -> None:
        self._numbers = array("q")  # time, cost, time, cost, ...
        self._head = 0

    def __len__(self) -> int:
        return (len(self._numbers) - self._head) // 2

    def append(self, time: int, cost: int) -> None:
        """Add a pair behind all others."""
        self._numbers.append(time)
        self._numbers.append(cost)

    def extend_last(self, time: int, cost: int) -> None:
        """Give the last pair another time, and add to its cost."""
        if self._head == len(self._numbers):
            raise IndexError("there are no entries")
        self._numbers[-2] = time
        self._numbers[-1] += cost

    def first_time(self) -> int:
        """Time of the first pair."""
        if self._head == len(self._numbers):
            raise IndexError("there are no entries")
        return self._numbers[self._head]

    def last_time(self) -> int:
        """Time of the last pair."""
        if self._head == len(self._numbers):
            raise IndexError("there are no entries")
        return self._numbers[-2]

    def time_of_sum(self, cost: int) -> int:
        """Time of the first pair up to which the costs add up to at least `cost`; -1 where they never do."""
        numbers = self._numbers
        for at in range(self._head, len(numbers), 2):
            cost -= numbers[at + 1]
            if cost <= 0:
                return numbers[at]
        return -1

    def cap_times(self, latest: int) -> None:
        """Put every pair that is as late or later into one of this time."""
        numbers, end, cost = self._numbers, len(self._numbers), 0
        while end > self._head and numbers[end - 2] >= latest:
            end -= 2
            cost += numbers[end + 1]
        if end < len(numbers):
            del numbers[end:]
            self.append(latest, cost)

    def take(self, since: int, until: int, cost: int) -> int:
        """Take up to `cost` off the first pair from `since` on, and return how much that was.

        Nothing where that pair is later than `until`.
        """
        numbers, low, high = self._numbers, self._head // 2, len(self._numbers) // 2
        while low < high:
            middle = (low + high) // 2
            if numbers[2 * middle] < since:
                low = middle + 1
            else:
                high = middle
        if 2 * low == len(numbers) or numbers[2 * low] > until:
            return 0
        taken = min(cost, numbers[2 * low + 1])
        numbers[2 * low + 1] -= taken
        return taken

    def drop_empty(self) -> None:
        """Remove the pairs that have no cost."""
        numbers, kept = self._numbers, array("q")
        for at in range(self._head, len(numbers), 2):
            if numbers[at + 1]:
                kept.extend(numbers[at : at + 2])
        self._numbers, self._head = kept, 0

    def drop_until(self, time: int) -> int:
        """Remove the pairs at the front up to this time, and return the sum of their costs.

        Pairs behind them that have no cost go as well.
        """
        numbers, head, end = self._numbers, self._head, len(self._numbers)
        cost = 0
        while head < end and (numbers[head] <= time or not numbers[head + 1]):
            cost += numbers[head + 1]
            head += 2
        if head > 64 and head * 2 > end:
            del numbers[:head]
            head = 0
        self._head = head
        return cost

    def clear(self) -> None:
        """Remove all pairs, and give their memory back."""
        self._numbers = array("q")
        self._head = 0


class Numbers(list[int]):
    """Whole numbers of 64 bits, one behind the other."""

    __slots__ = ()

    at: ClassVar[Callable[[Any, int], int]] = list[int].__getitem__
    """The number at a place."""


def numbers_in(data: bytes, at: int, count: int) -> Numbers:
    """Read so many numbers that stand in bytes from a place on, each with its little end first."""
    return Numbers(struct.unpack_from(f"<{count}q", data, at))


class Lock:
    """A lock that the thread which holds it may take again, like `threading.RLock`."""

    __slots__ = ("_lock", "acquire", "release")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.acquire: Callable[[], object] = self._lock.acquire
        self.release: Callable[[], object] = self._lock.release

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


digits: Callable[[int], bytes] = b"%d".__mod__
"""A whole number in decimal digits."""
