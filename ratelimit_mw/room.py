"""Room in what this process remembers of callers: bounded, whoever invents how many of them."""

from itertools import islice
from typing import Any


def make_room(remembered: dict[Any, Any], most: int) -> None:
    """Where there are `most` entries, forget a few of those that came first.

    A few at once, since a dict steps over all that it dropped to find its first entry; and never all, since
    everybody would have to be worked out anew.
    """
    if len(remembered) < most:
        return
    try:
        first = list(islice(remembered, most // 64 + 1))
    except RuntimeError:  # another thread added one in the midst: the next newcomer makes room
        return
    for each in first:
        remembered.pop(each, None)
