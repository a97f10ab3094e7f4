"""Errors of single operations, and damaged counts, logged often enough to be noticed and seldom enough."""

import logging
import time

from ratelimit_mw._internal.model.backend import BackendError

logger = logging.getLogger("ratelimit_mw")

EVERY = 60.0
"""Seconds between two lines about errors of one kind."""


class ThrottledErrorLog:
    """Logs an error of an operation, at most once a minute for each kind such as `OOM`."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}
        self.number = 0
        """Number of operations that have failed."""
        self.mended = 0
        """Number of stored values that could not be true, and were mended."""

    def __call__(self, error: BackendError) -> None:
        """Count an error and log it, unless one of its kind was logged just now."""
        self.number += 1
        word = str(error).partition(" ")[0]
        kind = word if word.isupper() and len(word) < 32 else "ERR"
        if self._is_due(kind):
            logger.error(
                "the backend refuses operations (logged once a minute): %s",
                error,
                extra={"ratelimit": {"event": "backend_refuses"}},
            )

    def note_mended(self, told: bytes) -> None:
        """Count stored values that were mended, and log the first; `told` is how many, and its key."""
        number, _, key = told.partition(b" ")
        self.mended += int(number)
        if self._is_due("damaged"):
            logger.error(
                "counts in the backend were damaged, and were repaired (logged once a minute): %r",
                key.decode(errors="backslashreplace"),
                extra={"ratelimit": {"event": "backend_damaged"}},
            )

    def late(self, error: BackendError, number: int) -> None:
        """Log that requests have waited too long while the server answered."""
        if number and self._is_due("late"):
            logger.warning(
                "%d requests could not ask the backend in time, since too many came at once "
                "(logged once a minute): %s",
                number,
                error,
                extra={"ratelimit": {"event": "backend_late"}},
            )

    def _is_due(self, kind: str) -> bool:
        """Whether nothing of this kind was logged within a minute; if so, it is logged now."""
        now = time.monotonic()
        is_due = now - self._said.get(kind, -EVERY) >= EVERY
        if is_due:
            self._said[kind] = now
        return is_due
