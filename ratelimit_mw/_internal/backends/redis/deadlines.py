"""Time limits of what waits for one server: each request's own, and how long the server may be silent.

A request that has waited for the time-out fails alone: the queue before it is this process's own backlog.
Only a server that leaves what it was sent without any answer for as long is taken for away.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.model.charge import BackendError

GRACE = 0.005
"""Seconds given to answers that have arrived but were not read yet, where the event loop was busy."""
PAUSE = 0.01
"""Seconds at least between two looks, each of which goes through all that wait."""


class Batch(NamedTuple):
    """Operations in one call of the script, on their way."""

    operations: list[Operation]
    groups: list[list[Operation]]
    """The same by template: each is one operation of the script."""
    since: float
    """When the first of them that may time out was submitted."""
    sent_at: float
    by_digest: bool


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
        self.heard_at = 0.0
        """When the server answered last."""
        self.is_connected = False
        """Whether requests wait for answers; else for a connection."""

    def start(self) -> None:
        """Look after what waits from now on."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, seen_at: float | None = None) -> None:
        """Judge by what there was at `seen_at`, so that the loop can read what had come by then."""
        self._timer = None
        waiting = [*_waiting(op for batch in self._sent for op in batch.operations), *_waiting(self._queue)]
        starts = [operation.since for operation in waiting]
        if self._sent:
            starts.append(max(self._sent[0].sent_at, self.heard_at))
        if not starts:
            return
        now = self._loop.time()
        left = min(starts) + self._timeout - (now if seen_at is None else seen_at)
        if left > 0:
            self._timer = self._loop.call_later(max(left, PAUSE), self._look)
        elif seen_at is None:
            # The loop itself may have been away.
            self._timer = self._loop.call_later(GRACE, self._look, now)
        else:
            self._judge(waiting, seen_at - self._timeout)

    def _judge(self, waiting: list[Operation], latest: float) -> None:
        """End the waits that began at `latest` or before."""
        late = [operation for operation in waiting if operation.since <= latest]
        if self._sent and max(self._sent[0].sent_at, self.heard_at) <= latest:
            self._on_silence(BackendError(f"no answer within {self._timeout:g} s"))
        elif late and not self.is_connected:
            self._on_silence(BackendError(f"no connection within {self._timeout:g} s"))
        else:
            error = BackendError(f"it was not a request's turn within {self._timeout:g} s")
            for operation in late:
                operation.fail(error)
            self._on_late(error, len(late))
        if self._queue or self._sent:
            self._timer = self._loop.call_later(PAUSE, self._look)


def _waiting(operations: Iterable[Operation]) -> Iterable[Operation]:
    """Those that somebody waits for. One that was sent on to another node has a time limit of its own."""
    return (
        operation
        for operation in operations
        if not (operation.must_arrive or operation.is_upkeep or operation.tries)
        and operation.future is not None
        and not operation.future.done()
    )
