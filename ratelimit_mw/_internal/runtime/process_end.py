"""Notes of work that is lost when a process ends of its own accord."""

import atexit
from typing import Any, Protocol
from weakref import WeakSet


class Ending(Protocol):
    """Something that may have work left when its process ends."""

    def at_process_end(self) -> None:
        """Tell in the log what nobody will do any more."""


_all: WeakSet[Any] = WeakSet()


def tell_at_process_end(owner: Ending) -> None:
    """Have `owner.at_process_end` called when the process ends, if `owner` still exists then."""
    _all.add(owner)


@atexit.register
def _tell() -> None:
    for owner in list(_all):
        owner.at_process_end()
