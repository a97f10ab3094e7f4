"""A server's clock, as far as its answers tell, and until when a call may still be executed there.

Whoever gives a call up cannot take it back: a kernel or a proxy may deliver it seconds later, and behind
its own give-back. So each call says how long it is waited for, and charges nothing later.
"""

import struct
import time

from ratelimit_mw._internal.model.limits import SECOND

_TIME = struct.Struct("<d")
WITHOUT_END = _TIME.pack(float("inf"))
"""In place of a time, as long as the server's clock is not known."""
DRIFT = 0.001
"""Share of the time by which two clocks may drift apart, so that one set back is followed in the end."""


class ServerClock:
    """One server's clock, less this process's steady one."""

    def __init__(self) -> None:
        self._ahead: float | None = None
        self._seen_at = 0.0

    def forget(self) -> None:
        """Know nothing of it: the next connection may lead to another server."""
        self._ahead = None

    def show(self, now: int) -> None:
        """Take in the time of an answer, in microseconds, that was read just now."""
        here = time.monotonic()
        ahead = now / SECOND - here
        if self._ahead is not None:  # an answer that was on its way, or waited to be read, shows too little
            ahead = max(ahead, self._ahead - DRIFT * (here - self._seen_at))
        self._ahead, self._seen_at = ahead, here

    def in_(self, seconds: float) -> bytes:
        """Pack what it will show in so many seconds, in microseconds, as the script reads it."""
        if self._ahead is None:
            return WITHOUT_END
        return _TIME.pack((time.monotonic() + self._ahead + seconds) * SECOND)


def machine_clock() -> int:
    """Return this machine's time in microseconds since the epoch."""
    return time.time_ns() // 1000
