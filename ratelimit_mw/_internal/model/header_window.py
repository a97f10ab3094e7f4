"""A window as headers need it."""

from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.runtime.leaf import digits

MOST_UNITS = 2**62
"""More than any limit grants; what is larger is compared as this."""


class HeaderWindow:
    """One of the caller's own windows in a charge, as headers tell of it."""

    __slots__ = ("cost", "length", "limit_header", "place", "quota", "window")

    def __init__(self, place: int, window: Window, cost: int) -> None:
        self.place: int = place
        """Index of the window among the counters of its charge."""
        self.window: Window = window
        # At least 1, and what is not a number of units is not for a header to refuse.
        self.cost: int = 1 if not cost > 1 else min(cost, MOST_UNITS)
        """Units that one more request needs."""
        self.quota: int = window.quota
        self.length: int = window.length
        self.limit_header: tuple[bytes, bytes] = (
            b"x-ratelimit-limit",
            digits(window.quota),
        )
