"""Where the memory backend keeps states: bounded, and rid of dead ones without looking at all of them."""

import sys
from collections import OrderedDict
from typing import Protocol, TypeVar


class Mortal(Protocol):
    """What is stored, and can be forgotten at some time."""

    def is_dead(self, now: int) -> bool:
        """Whether it can be forgotten."""


K = TypeVar("K")
S = TypeVar("S", bound=Mortal)

STEPS = 4
"""Old states looked at for each new one: the dead leave faster than the living arrive."""


class Store(OrderedDict[K, S]):
    """States by place, the least recently used first.

    At most `most`: beyond that the least recently used is forgotten. Where states don't die in the order of
    their use, `rotates` makes the search for dead ones go round.
    """

    def __init__(self, most: int = sys.maxsize, *, rotates: bool = False) -> None:
        super().__init__()
        self._most = most
        self._rotates = rotates

    def find(self, place: K) -> S | None:
        """The state at `place`, which is used now."""
        state = self.get(place)
        if state is not None:
            self.move_to_end(place)
        return state

    def add(self, place: K, state: S, now: int) -> None:
        """Keep a new state, and forget a few that are dead."""
        for _ in range(STEPS):
            if not self:
                break
            first = next(iter(self))
            if self[first].is_dead(now):
                del self[first]
            elif self._rotates:
                self.move_to_end(first)
            else:
                break
        if len(self) >= self._most:
            self.popitem(last=False)
        self[place] = state
