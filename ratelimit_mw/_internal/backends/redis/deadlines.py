"""Time limits of what waits for one server: each request's own, and how long the server may be silent.

A request that has waited for the time-out fails alone: the queue before it is this process's own backlog.
Only a server that leaves what it was sent without any answer for as long is taken for away. Time in which
this event loop did not run is not silence: where a whole machine stood still, so did the server.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.model.backend import BackendError

GRACE = 0.005
"""Seconds given to answers that have arrived but were not read yet, where the event loop was busy."""
PAUSE = 0.01
"""Seconds at least between two looks, each of which goes through all that wait."""
TICKS = 4
"""Times in a time-out that the event loop shows whether it runs."""


class Batch(NamedTuple):
    """Operations in one call of the script, or one command, on their way."""

    operations: list[Operation]
    groups: list[list[Operation]]
    """Operations grouped by template: each group is one operation of the script."""
    since: float
    """Time, by the event loop's clock, when the first operation that may time out was submitted."""
    sent_at: float
    by_digest: bool
    is_apart: bool
    """Whether a command or a smaller script is on its way in place of the main script."""

    @property
    def has_requests(self) -> bool:
        """Whether it brings more than what is sent again, such as releases."""
        return not all(group[0].resend for group in self.groups)


class Deadlines:
    """Looks after the requests in a queue and the batches under way, as long as there are any."""

    def __init__(
        self,
        timeout: float,
        queue: Sequence[Operation],
        sent: Sequence[Batch],
        *,
        on_silence: Callable[[BackendError], None],
        on_late: Callable[[BackendError, int], None],
    ) -> None:
        """`on_silence` is told that the server is away, `on_late` how many requests have failed alone."""
        self._timeout = timeout
        self._queue = queue
        self._sent = sent
        self._on_silence = on_silence
        self._on_late = on_late
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = self._look_at = 0.0
        self._silent_since = 0.0
        """Silence counts from here on: later than it began by the time that the loop did not run."""
        self.heard_at = 0.0
        """Time of the server's latest answer, by the event loop's clock."""
        self.is_connected = False
        """Whether requests wait for answers; else for a connection."""

    def start(self) -> None:
        """Look after what waits from now on."""
        if self._timer is None:
            self._look_in(self._timeout)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_in(self, seconds: float) -> None:
        self._look_at = self._loop.time() + seconds
        self._tick_in(seconds)

    def _tick_in(self, seconds: float) -> None:
        wait = min(seconds, self._timeout / TICKS)
        self._tick_at = self._loop.time() + wait
        self._timer = self._loop.call_later(wait, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if now > self._tick_at + GRACE and (began := self._silence()):
            self._silent_since = began + now - max(began, self._tick_at)
        if now < self._look_at:
            self._tick_in(self._look_at - now)
        else:
            self._look()

    def _silence(self) -> float | None:
        """Return the time at which the server's silence began; None if nothing is expected of the server.

        The time is in seconds by the event loop's clock.
        """
        if self._sent:
            return max(self._sent[0].sent_at, self.heard_at, self._silent_since)
        starts = [] if self.is_connected else [operation.since for operation in _waiting(self._queue)]
        return max(min(starts), self._silent_since) if starts else None

    def _look(self, seen_at: float | None = None) -> None:
        """Judge by what there was at `seen_at`, so that the loop can read what had come by then."""
        self._timer = None
        silence = self._silence()
        # Whoever waits for the server, and not for a turn, waits as long as its silence is excused.
        is_excused = silence == self._silent_since
        sent = [] if is_excused else [operation for batch in self._sent for operation in batch.operations]
        queued = [] if is_excused and not self.is_connected else self._queue
        waiting = [*_waiting(sent), *_waiting(queued)]
        starts = [operation.since for operation in waiting]
        if silence is not None:
            starts.append(silence)
        if not starts:
            return
        now = self._loop.time()
        left = min(starts) + self._timeout - (now if seen_at is None else seen_at)
        if left > 0:
            self._look_in(max(left, PAUSE))
        elif seen_at is None:
            # The loop itself may have been away.
            self._timer = self._loop.call_later(GRACE, self._look, now)
        else:
            self._judge(waiting, silence, seen_at - self._timeout)

    def _judge(self, waiting: list[Operation], silence: float | None, latest: float) -> None:
        """End the waits that began at `latest` or before."""
        late = [operation for operation in waiting if operation.since <= latest]
        if silence is not None and silence <= latest:
            what = "answer" if self._sent else "connection"
            self._on_silence(BackendError(f"no {what} within {self._timeout:g} s"))
        else:
            error = BackendError(
                f"the request waited {self._timeout:g} s behind other requests, and was not sent"
            )
            for operation in late:
                operation.fail(error)
            self._on_late(error, len(late))
        if self._queue or self._sent:
            self._look_in(PAUSE)


def _waiting(operations: Iterable[Operation]) -> Iterable[Operation]:
    """Return the operations that a caller waits for.

    An operation that was sent on to another node is left out: it has a time limit of its own.
    """
    return (
        operation
        for operation in operations
        if not (operation.resend or operation.is_upkeep or operation.tries)
        and operation.future is not None
        and not operation.future.done()
    )
