"""Bounded store of the memory backend's states, which drops dead states without looking at all."""

import sys
from collections import OrderedDict
from typing import TypeVar


class StoredState:
    """State of one limit, kept by a store that may drop it later.

    Check that it is still stored before charging it: a charge to a dropped state would be lost.
    """

    __slots__ = ("is_stored", "is_used")

    is_stored: bool
    """Whether a store has it."""
    is_used: bool
    """Whether it was used since its store looked at it last."""

    def __init__(self) -> None:
        self.is_stored = self.is_used = False

    def is_dead(self, now: int) -> bool:
        """Whether the state can be dropped at `now` without a trace."""
        raise NotImplementedError

    def dropped(self) -> None:
        """Note that no store has it any more."""
        self.is_stored = False


K = TypeVar("K")
S = TypeVar("S", bound=StoredState)

STEPS = 4
"""Old states looked at for each new one: the dead leave faster than the living arrive."""
MOST_STEPS = 64
"""Old states looked at if the store is full: so many used ones in a row may get a second chance."""


class Store(OrderedDict[K, S]):
    """States by key. A use is a mark on the state, so that it costs no more than that.

    At most `most`: beyond that one not used lately is forgotten, by second chance: who comes to the front
    and was used goes to the end once more. The dead are found at the front; where states don't die in the
    order of their use, `rotates` makes the search go round. Of `spare` states no dead ones are looked for.
    """

    def __init__(self, most: int = sys.maxsize, *, rotates: bool = False, spare: int = 0) -> None:
        super().__init__()
        self._most = most
        self._rotates = rotates
        self._spare = spare

    def find(self, key: K) -> S | None:
        """The state at `key`, which is used now."""
        state = self.get(key)
        if state is not None:
            state.is_used = True
        return state

    def add(self, key: K, state: S, now: int) -> None:
        """Keep a new state, and forget a few that are dead."""
        if len(self) >= self._spare:
            self._make_room(now)
        state.is_stored, state.is_used = True, False
        self[key] = state

    def forget(self, key: K) -> S | None:
        """The state at `key`, which is kept no longer."""
        state = self.pop(key, None)
        if state is not None:
            state.dropped()
        return state

    def _make_room(self, now: int) -> None:
        for step in range(MOST_STEPS):
            if not self or (step >= STEPS and (self._rotates or len(self) < self._most)):
                break
            first = next(iter(self))
            state = self[first]
            if state.is_dead(now):
                self.forget(first)
            elif self._rotates or state.is_used:
                state.is_used = False
                self.move_to_end(first)
            else:
                break
        if len(self) >= self._most:
            self.forget(next(iter(self)))
