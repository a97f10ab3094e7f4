"""Replies to calls of the script: each operation is told what came of it, and why it failed if it did."""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ratelimit_mw._internal.backends.connecting.connection import Reply
from ratelimit_mw._internal.backends.redis.calls import (
    LATE,
    LATER,
    MOVING,
    TAKES_NO_WRITES,
    read_reply,
)
from ratelimit_mw._internal.backends.redis.composing import hand_out
from ratelimit_mw._internal.backends.redis.deadlines import Batch
from ratelimit_mw._internal.backends.redis.error_log import ThrottledErrorLog
from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.backends.redis.server_clock import ServerClock
from ratelimit_mw._internal.model.backend import WAITS, BackendError, Load, OperationRefusedError

Redirect = Callable[[list[Operation], str], bool]
"""Asked about an error of the server: whether it takes over the operations, of which nothing was done."""


class Undone(NamedTuple):
    """Operations that a call brought, of which the server did nothing, and which were not told yet."""

    late: list[Operation]
    """Came too late by the server's clock, or the main script has to do them. They are sent again."""
    unwritten: list[Operation]
    """Would have written what the server does not write now."""
    error: BackendError | None
    """Error of the unwritten ones, if there are any: it tells of the whole server."""


NOTHING_UNDONE = Undone([], [], None)


class Replies:
    """Tells operations what came of them, and counts calls and errors."""

    def __init__(
        self, timeout: float, *, redirect: Redirect | None, call_observers: Sequence[Callable[[float], None]]
    ) -> None:
        self._timeout = timeout
        self._redirect = redirect
        self._call_observers = call_observers
        self._loop = asyncio.get_running_loop()
        self.error_log = ThrottledErrorLog()
        """Errors of single operations, counted."""
        self.server_clock = ServerClock()
        self._waited = 0.0
        self._waits = [0] * (len(WAITS) + 1)

    def load(self, batches: int, operations: int, owed: int) -> Load:
        """Return the load of a batcher, which knows these numbers itself."""
        log = self.error_log
        return Load(batches, operations, owed, log.number, self._waited, tuple(self._waits), log.mended)

    def count(self, waited: float) -> None:
        """Count a call that took so many seconds."""
        self._waited += waited
        self._waits[bisect_left(WAITS, waited)] += 1
        for observe in self._call_observers:
            observe(waited)

    def read(self, batch: Batch, reply: Reply) -> Undone:
        """Tell the operations of a batch what came of them, but those that are returned.

        Raises for a reply that makes no sense; then no operation was told.
        """
        if batch.is_apart:
            left = batch.operations[0].template.take_reply(batch.operations, reply)
            return Undone(left, [], None) if left else NOTHING_UNDONE
        now, answers, mended = read_reply(reply, len(batch.groups))
        if mended:
            self.error_log.note_mended(mended)
        self.server_clock.show(now)
        failed = hand_out(batch.groups, now, answers)
        return self._sorted(failed) if failed else NOTHING_UNDONE

    def _sorted(self, failed: list[tuple[list[Operation], bytes]]) -> Undone:
        unwritten: list[Operation] = []
        late: list[Operation] = []
        error = None
        for operations, text in failed:
            failure = OperationRefusedError(text.decode(errors="replace").strip())
            if MOVING in str(failure) and self._redirect is not None and self._redirect(operations, LATER):
                continue
            if str(failure).startswith(TAKES_NO_WRITES):
                error = BackendError(str(failure))
                unwritten += operations
                continue
            if str(failure).startswith(LATE):
                late += operations
                continue
            if self._redirect is not None and self._redirect(operations, str(failure)):
                continue
            for operation in operations:
                self.error_log(failure)
                operation.fail(failure)
        return Undone(self._still_awaited(late), unwritten, error)

    def _still_awaited(self, late: list[Operation]) -> list[Operation]:
        """Fail what came too late and was waited for long enough; return what is owed or still waited for.

        Nothing of them was done. The server's clock, which is known better now, may have been set.
        """
        waits_since = self._loop.time() - self._timeout
        for operation in late:
            if operation.since <= waits_since and not operation.resend:
                operation.fail(
                    BackendError(f"the server got the request after more than {self._timeout:g} s")
                )
        return [operation for operation in late if operation.resend or not operation.is_over]
