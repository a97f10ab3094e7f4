"""Room in what this process remembers of callers: bounded, whoever invents how many of them."""

from itertools import islice
from typing import Any, TypeVar

AT_ONCE = 16
"""Entries forgotten together: a dict steps over all that it dropped to find its first one. Not many, since the
garbage collector counts what is made and not yet freed, and would look through all that is remembered.
"""

T = TypeVar("T")


def make_room(remembered: dict[Any, T], most: int) -> list[T]:
    """Where there are `most` entries, forget a few of those that came first; what was forgotten."""
    if len(remembered) < most:
        return []
    try:
        first = list(islice(remembered, AT_ONCE))
    except RuntimeError:  # another thread added one in the midst: the next newcomer makes room
        return []
    return [remembered.pop(each) for each in first if each in remembered]
