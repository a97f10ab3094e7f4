"""A window as headers need it, and the one of several that is nearest to its limit."""

from typing import TYPE_CHECKING

from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.runtime.leaf import digits

if TYPE_CHECKING:
    from ratelimit_mw._internal.model.outcome import Outcome


MOST_UNITS = 2**62
"""More than any limit grants; what is larger is compared as this."""


class HeaderWindow:
    """One of the caller's own windows in a charge, as headers tell of it."""

    __slots__ = ("cost", "length", "limit_header", "place", "quota", "window")

    def __init__(self, place: int, window: Window, cost: int) -> None:
        self.place: int = place
        """Index of the window among the counters of its charge."""
        self.window: Window = window
        # At least 1, and what is no number of units is not for a header to refuse.
        self.cost: int = 1 if not cost > 1 else min(cost, MOST_UNITS)
        """Units that one more request needs."""
        self.quota: int = window.quota
        self.length: int = window.length
        self.limit_header: tuple[bytes, bytes] = (
            b"x-ratelimit-limit",
            digits(window.quota),
        )


def nearest_of(windows: list[HeaderWindow], outcome: "Outcome") -> HeaderWindow | None:
    """Find the window under which the fewest more charges fit; of equals the longer."""
    best, fewest = None, 0
    for window in windows:
        left = (window.quota - outcome.used(window.place)) // window.cost
        if best is None or left < fewest or (left == fewest and window.length > best.length):
            best, fewest = window, left
    return best
