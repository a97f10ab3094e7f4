"""Where the memory backend keeps states: bounded, and rid of dead ones without looking at all of them."""

import sys
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Mortal(Protocol):
    """What is stored, and can be forgotten at some time."""

    def is_dead(self, now: int) -> bool:
        """Whether it can be forgotten."""


K = TypeVar("K")
S = TypeVar("S", bound=Mortal)

STEPS = 2
"""Old states looked at for each new one: the dead leave faster than the living arrive."""


class Store(Generic[K, S]):
    """States by place, the least recently used first.

    At most `most`: beyond that the least recently used is forgotten. Where states don't die in the order of
    their use, `rotates` makes the search for dead ones go round.
    """

    __slots__ = ("_most", "_rotates", "_states")

    def __init__(self, most: int = sys.maxsize, *, rotates: bool = False) -> None:
        self._most = most
        self._rotates = rotates
        self._states: OrderedDict[K, S] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def find(self, place: K) -> S | None:
        """The state at `place`, which is used now."""
        state = self._states.get(place)
        if state is not None:
            self._states.move_to_end(place)
        return state

    def add(self, place: K, state: S, now: int) -> None:
        """Keep a new state, and forget a few that are dead."""
        states = self._states
        for _ in range(STEPS):
            if not states:
                break
            first = next(iter(states))
            if states[first].is_dead(now):
                del states[first]
            elif self._rotates:
                states.move_to_end(first)
            else:
                break
        if len(states) >= self._most:
            states.popitem(last=False)
        states[place] = state

    def replace(self, place: K, state: S) -> None:
        """Keep another state in place of the one at `place`."""
        self._states[place] = state

    def remove(self, place: K) -> S | None:
        """Forget the state at `place` and return it."""
        return self._states.pop(place, None)
