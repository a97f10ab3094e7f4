"""Group commit: the operations of concurrent requests leave for the server together.

While `IN_FLIGHT` batches are on their way, operations queue up; the next answer sends what has gathered.
There is no timer, and no wait when idle. Those that differ in their ids alone travel as one. What a command
or a smaller script does as well leaves beside the call. A batcher belongs to one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

from ratelimit_mw._internal.backends.connecting.connection import Connection, OnReply, Reply
from ratelimit_mw._internal.backends.connecting.errors import ConnectionEndedError, ServerMovedError
from ratelimit_mw._internal.backends.redis.backlog import MAX_QUEUE, Backlog
from ratelimit_mw._internal.backends.redis.calls import ASKING, call_head, ignore
from ratelimit_mw._internal.backends.redis.composing import apart, by_template, compose, waiting_since
from ratelimit_mw._internal.backends.redis.deadlines import GRACE, Batch, Deadlines
from ratelimit_mw._internal.backends.redis.link import Link
from ratelimit_mw._internal.backends.redis.operations import Operation, bulk
from ratelimit_mw._internal.backends.redis.replies import Redirect, Replies
from ratelimit_mw._internal.backends.redis.server_clock import WITHOUT_END
from ratelimit_mw._internal.model.backend import BackendError, Load

IN_FLIGHT = 2
"""Batches under way at once: while the server works on one, the next is already there."""
LEFT_TO_SCRIPT = ("WRONGTYPE", "NOPERM")
"""Errors of a call apart: the main script does it then."""
logger = logging.getLogger("ratelimit_mw")

Groups = list[list[Operation]]
Group = Callable[[list[Operation]], Iterable[list[Operation]]]
"""Function that groups the operations of a batch that may share a call of the script.

On a cluster, operations of different partitions may not."""


class Batcher:
    """Sends operations to one server over one connection, and knows whether the server is there."""

    def __init__(  # noqa: PLR0913 - hooks, all but one by name
        self,
        connect: Callable[[Callable[[BackendError], None]], Awaitable[Connection]],
        *,
        timeout: float,
        clock_argument: Callable[[], bytes],
        new_probe: Callable[[], Operation],
        group: Group | None = None,
        redirect: Redirect | None = None,
        call_observers: Sequence[Callable[[float], None]] = (),
    ) -> None:
        self._timeout = timeout
        self._clock_argument = clock_argument
        self._new_probe = new_probe
        self._group = group
        self._redirect = redirect
        replies = self._replies = Replies(timeout, redirect=redirect, call_observers=call_observers)
        self._loop = asyncio.get_running_loop()
        backlog = self._backlog = Backlog()
        self._time = self._loop.time
        self._link = Link(
            connect,
            self._probe,
            timeout=timeout,
            on_ready=self._on_ready,
            on_lost=self._on_lost,
            on_failed=self._disconnect,
        )
        self._error: BackendError | None = None
        self._flush_is_due = False
        self._by_digest, self._has_all_scripts = True, False  # the probe brings the main one
        self._given_up_at = 0.0
        self._is_closed = False
        self.batches = 0
        """Calls of the script, and in `operations` what they were for."""
        self.operations = 0
        self._deadlines = Deadlines(
            timeout,
            backlog.queue,
            backlog.sent,
            on_silence=partial(self._disconnect, is_silent=True),
            on_late=replies.error_log.late,
        )

    @property
    def load(self) -> Load:
        """Load of this batcher: operations carried, and operations that wait."""
        return self._replies.load(self.batches, self.operations, self._backlog.owed)

    @property
    def error(self) -> BackendError | None:
        """Error that marks the server as away; None while the server is there or was not asked yet."""
        return self._error

    @property
    def is_busy(self) -> bool:
        """Whether anything waits here or is under way."""
        return self._backlog.is_busy

    def submit(self, operation: Operation) -> None:
        """Queue an operation."""
        backlog = self._backlog
        queue = backlog.upkeep if operation.is_upkeep else backlog.queue
        if self._is_closed:
            operation.fail(BackendError("the backend was closed"))
        elif self._error is not None and not operation.resend:
            operation.fail(self._error)
        elif len(queue) < MAX_QUEUE or backlog.make_room(operation):
            # One that comes from another node of a cluster has waited before.
            operation.since = operation.since or self._time()
            queue.append(operation)
            if not self._flush_is_due:
                self._schedule()

    async def connect(self) -> None:
        """Connect and wait for it, as long as an operation would."""
        self._link.start()
        await self._link.wait()

    async def connection_to(self, key: bytes) -> Connection | None:
        """The connection, once its server has answered; None where that is away."""
        if self._error is None and not self._link.is_ready:
            await self.connect()
        return self._link.connection if self._link.is_ready else None

    async def drain(self, timeout: float) -> int:
        """Wait until everything queued has been answered; how much was left after `timeout` seconds."""
        deadline = self._loop.time() + timeout
        while self.is_busy and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        return len(self._backlog)

    def undo_doubtful(self) -> None:
        """Undo now what may have been done and whose answer was lost, though it may still be on its way."""
        for operation in self._backlog.doubtful.take():
            operation.orphaned(None)

    def withdraw(self) -> list[Operation]:
        """Take back what was not sent yet."""
        return self._backlog.withdraw()

    def bequeath(self) -> list[Operation]:
        """Hand out what is owed, in its order, and what was sent and may have to be undone.

        For a batcher whose event loop has ended or is about to: nobody waits there any more.
        """
        return self._backlog.bequeath()

    def leave_to_parent(self) -> None:
        """Give up the connection in a process that was forked off."""
        self._link.leave_to_parent()

    def close(self) -> None:
        """Close the connection; whoever still waits gets a `BackendError`."""
        self._is_closed = True
        self._deadlines.stop()
        self._link.stop()
        if lost := self._backlog.owed:
            logger.error("%d releases and settles never reached the backend: the limiter was closed", lost)
        self._disconnect(BackendError("the backend was closed"))

    # sending ------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._link.is_ready:
            self._link.start()
            self._deadlines.start()
        elif len(self._backlog.sent) < IN_FLIGHT:
            # At the end of this turn of the loop: whoever else is ready rides along.
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        while self._link.is_ready and len(self._backlog.sent) < IN_FLIGHT and (batch := self._backlog.take()):
            self._send(batch, by_digest=self._by_digest)

    def _send(self, batch: list[Operation], *, by_digest: bool, by_script: bool = False) -> None:
        connection = self._link.connection
        if connection is None:
            self._refuse(batch, self._error or BackendError("the connection is closed"))
        else:
            written: list[bytes] = []
            on_replies: list[OnReply] = []
            for group in [batch] if self._group is None else self._group(batch):
                for call in self._calls_of(group, by_digest, by_script):
                    if group[0].is_asking:
                        written.append(ASKING)
                        on_replies.append(ignore)
                    written.append(call)
                    on_replies.append(self._on_reply)
            connection.send(b"".join(written), *on_replies)
        self._deadlines.start()

    def _calls_of(self, batch: list[Operation], by_digest: bool, by_script: bool) -> list[bytes]:
        """The calls for a batch, apart and of the main script: they count as sent from now on."""
        groups = by_template(batch)
        template = batch[0].template
        if len(groups) == 1 and (template.is_apart or (template.command and not by_script)):
            return [self._call_of(batch, groups, by_digest, True)]
        calls = [self._call_of(each, [each], by_digest, True) for each in apart(groups)]
        if calls:
            groups = [group for group in groups if not group[0].template.is_apart]
            batch = [operation for group in groups for operation in group]
        return [*calls, self._call_of(batch, groups, by_digest, False)] if batch else calls

    def _call_of(self, batch: list[Operation], groups: Groups, by_digest: bool, is_apart: bool) -> bytes:
        now = self._loop.time()
        self._backlog.sent.append(Batch(batch, groups, waiting_since(batch, now), now, by_digest, is_apart))
        self.batches += 1
        self.operations += len(batch)
        self._given_up_at = time.monotonic() + self._timeout + GRACE
        if is_apart:
            return batch[0].template.call_apart(batch, by_digest and self._has_all_scripts)
        letter, n_keys, n_arguments, keys, arguments = compose(groups)
        clock = self._clock_argument()
        until = WITHOUT_END if clock else self._replies.server_clock.in_(self._timeout + GRACE)
        head = call_head(n_keys, n_arguments, by_digest=by_digest)
        return b"".join((head, keys, bulk(letter + until + clock), arguments))

    # answers ------------------------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        batch = self._backlog.sent.popleft()
        self._deadlines.heard_at = self._loop.time()
        try:
            if isinstance(reply, Exception):
                self._on_error(batch, BackendError(str(reply)))
            else:
                self._on_answers(batch, reply)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits for this batch has to be told
            self._backlog.sent.appendleft(batch)
            self._disconnect(BackendError(f"an answer could not be read: {error}"))
        if self._backlog.queue or self._backlog.upkeep:
            self._flush()

    def _on_answers(self, batch: Batch, reply: Reply) -> None:
        undone = self._replies.read(batch, reply)
        if batch.is_apart and reply.__class__ is bytes:
            self._has_all_scripts = True
        if undone.late:
            self._backlog.put_first(undone.late)
        if undone.error is not None:
            self._refuse(undone.unwritten, undone.error)
        elif self._link.attempt and self._link.is_ready and batch.has_requests:
            # Requests are served again: the probe, which writes one key alone, says less, and so do releases.
            self._link.attempt = 0
        self._replies.count(self._deadlines.heard_at - batch.since)

    def _on_error(self, batch: Batch, error: BackendError) -> None:
        """Take in that the server refused the whole call: of one with a name nothing was done."""
        text = str(error)
        if self._redirect is not None and self._redirect(batch.operations, text):
            return
        if batch.is_apart and text.startswith(LEFT_TO_SCRIPT):
            for operation in batch.operations:
                operation.leave_to_script()
            self._send(batch.operations, by_digest=self._by_digest, by_script=True)  # which mends it
        elif text.startswith("NOSCRIPT"):
            self._send(batch.operations, by_digest=False)  # which makes the server remember it, too
        elif text.startswith("NOPERM") and batch.by_digest:
            self._by_digest = False
            self._send(batch.operations, by_digest=False)
        elif text.startswith("ERR"):  # maybe from the middle of the script
            self._backlog.sent.appendleft(batch)
            self._disconnect(error)
        else:
            self._refuse(batch.operations, error)

    def _refuse(self, operations: list[Operation], error: BackendError) -> None:
        """Give the connection up over operations that the server would not do."""
        undone = [operation for operation in operations if not operation.resend]
        owed = [operation for operation in operations if operation.resend]
        self._disconnect(error, owed)
        for operation in undone:
            operation.fail(error)

    # being there --------------------------------------------------------------------------------

    def _on_ready(self) -> None:
        """Take in that the server answers."""
        self._deadlines.is_connected = True
        if self._error is not None:
            self._error = None
            logger.warning("backend is back", extra={"ratelimit": {"event": "backend_back"}})
        self._flush()

    async def _probe(self) -> None:
        """Have a script write: a server may accept connections and be loading, hang, or be a replica."""
        probe = self._new_probe()
        probe.since, probe.is_upkeep = self._loop.time(), True
        self._send([probe], by_digest=self._by_digest)
        await probe

    def _on_lost(self, error: BackendError) -> None:
        """Take in that a connection has ended: quietly where nobody waited for an answer over it.

        Servers and proxies close idle connections. Whether the server is there shows when the next is opened.
        """
        if isinstance(error, ServerMovedError):
            self._move(error)
        elif self._backlog.sent or self._link.is_connecting or not isinstance(error, ConnectionEndedError):
            self._disconnect(error)
        else:
            self._forget_connection()
            if self.is_busy:
                self._deadlines.start()
            self._link.start()

    def _move(self, error: ServerMovedError) -> None:
        """Go on elsewhere, with all that waits: what the old server still does, the new one never learns."""
        if self._error is not None or self._is_closed:
            self._disconnect(error)
            return
        self._forget_connection()
        sent = self._backlog.take_unanswered()
        if self._link.is_connecting:
            for probe in sent:
                probe.fail(error)  # the next attempt finds the other server
            return
        logger.warning("backend has moved: %s", error, extra={"ratelimit": {"event": "backend_moved"}})
        self._backlog.put_first(sent)
        self._link.attempt = 0
        if self.is_busy:
            self._deadlines.start()
        self._link.start()

    def _disconnect(
        self, error: BackendError, owed: Sequence[Operation] = (), *, is_silent: bool = False
    ) -> None:
        """Give the connection up: the server is away. What is `owed` was refused, and goes first."""
        if is_silent or self._backlog.overwrites:  # nothing is sent until no server executes it any more
            self._link.silent_until = self._given_up_at
        self._forget_connection()
        if self._error is None and not self._is_closed:
            logger.warning("backend is away: %s", error, extra={"ratelimit": {"event": "backend_away"}})
            self._error = error
        doubtful = self._backlog.give_up(error, owed, for_good=self._is_closed)
        if self._is_closed:
            for operation in [*self._backlog.doubtful.take(), *doubtful]:
                operation.orphaned(None)
        else:
            self._backlog.doubtful.add(doubtful, self._given_up_at - time.monotonic())
            self._link.start()

    def _forget_connection(self) -> None:
        self._deadlines.is_connected = self._has_all_scripts = False
        self._replies.server_clock.forget()
        self._link.drop(discard=not self._is_closed)
