"""Bounds for what this process remembers of callers, whoever invents how many of them."""

from itertools import islice
from typing import Any, TypeVar

AT_ONCE = 16
"""Entries forgotten together, since a dict steps over all that it dropped to find its first one; few, since
the garbage collector counts what was made and not freed, and then looks through all that is remembered."""

T = TypeVar("T")


def evict_oldest(remembered: dict[Any, T], most: int) -> list[T]:
    """Remove a few of the oldest entries where there are `most`, and return what was removed."""
    if len(remembered) < most:
        return []
    try:
        first = list(islice(remembered, AT_ONCE))
    except RuntimeError:  # another thread added one in the midst: the next newcomer makes room
        return []
    return [gone for each in first if (gone := remembered.pop(each, None)) is not None]
