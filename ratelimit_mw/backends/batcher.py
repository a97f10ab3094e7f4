"""Group commit: the operations of concurrent requests leave for the server together.

While `IN_FLIGHT` batches are on their way, operations queue up; the next answer sends what has gathered.
There is no timer to wait for and, when idle, no wait. Those that differ in their ids alone travel as one:
what a busy caller's requests cost the server is shared by a batch. A batcher belongs to one event loop.
"""

import asyncio
import hashlib
import logging
import random
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from ratelimit_mw.backends.complaints import Complaints
from ratelimit_mw.backends.connection import Connection, OnReply, Reply, ServerMovedError
from ratelimit_mw.backends.operations import Operation, bulk, compose, hand_out, take
from ratelimit_mw.charge import WAITS, BackendError, Load
from ratelimit_mw.compiled import core


def _load_script() -> bytes:
    """`batch.lua` with its constants written where they are used: each `local NAME = value` of one value."""
    text = files(__package__).joinpath("batch.lua").read_text("utf-8")
    constant = re.compile(r"^ *local ([A-Z_]+) = (\S+).*\n", re.MULTILINE)
    values = dict(constant.findall(text))
    return re.sub(rf"\b({'|'.join(values)})\b", lambda name: values[name[0]], constant.sub("", text)).encode()


SCRIPT = _load_script()
MAX_BATCH = 64
"""Operations in one call of the script, so that none takes the server over a millisecond."""
IN_FLIGHT = 2
"""Batches under way at once: while the server works on one, the next is already there."""
MAX_QUEUE = 10_000
"""Operations that may wait; one more is refused at once."""
GRACE = 0.005
"""Seconds given to answers that have arrived but were not read yet, where the event loop was busy."""
CONNECT_TIMEOUT = 1.0
"""Seconds for an attempt to connect; requests wait for it no longer than for an answer."""
PROBE_WAITS = (0.05, 0.1, 0.2, 0.4, 0.5)
"""Seconds between attempts to reach a server that is away; the last one repeats. Spread by a half."""

logger = logging.getLogger("ratelimit_mw")

Group = Callable[[list[Operation]], Iterable[list[Operation]]]
"""Which operations of a batch may share a call of the script: on a cluster, not those of different nodes."""
Redirect = Callable[[list[Operation], str], bool]
"""Asked about an error of the server: whether it takes over the operations, of which nothing was done."""


class _Batch(NamedTuple):
    """Operations in one call of the script, on their way."""

    operations: list[Operation]
    groups: list[list[Operation]]
    """The same by template: each is one operation of the script."""
    since: float
    """When the first of them that may time out was submitted."""
    by_digest: bool


class _Outbox:
    """What `Batcher.submit` looks at for each operation."""


if core is not None and not TYPE_CHECKING:
    _Outbox = core.Outbox


class Batcher(_Outbox):
    """Sends operations to one server over one connection, and knows whether the server is there."""

    def __init__(
        self,
        connect: Callable[[Callable[[BackendError], None]], Awaitable[Connection]],
        *,
        timeout: float,
        clock_argument: Callable[[], bytes],
        new_probe: Callable[[], Operation],
        group: Group | None = None,
        redirect: Redirect | None = None,
    ) -> None:
        self._connect = connect
        self._timeout = timeout
        self._clock_argument = clock_argument
        self._new_probe = new_probe
        self._group = group
        self._redirect = redirect
        self._loop = asyncio.get_running_loop()
        self._queue: list[Operation] = []
        self._time, self._new_future = self._loop.time, self._loop.create_future
        self._sent: deque[_Batch] = deque()
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._error: BackendError | None = None
        self._flush_is_due = False
        self._watch: asyncio.TimerHandle | None = None
        self._by_digest = True
        self._attempt = 0
        self._is_closed = False
        self.complaints = Complaints()
        """Errors of single operations, counted."""
        self.batches = 0
        """Calls of the script, and in `operations` what they were for."""
        self.operations = 0
        self._waited = 0.0
        self._waits = [0] * (len(WAITS) + 1)

    @property
    def load(self) -> Load:
        """What it has carried, and what waits."""
        return Load(
            self.batches,
            self.operations,
            self.owed,
            self.complaints.number,
            self._waited,
            tuple(self._waits),
        )

    @property
    def owed(self) -> int:
        """How many operations wait to be written that are sent until they arrive."""
        return sum([operation.must_arrive for operation in [*self._queue, *self._in_flight()]])

    @property
    def error(self) -> BackendError | None:
        """Why the server is thought to be away; None while it is there or was not asked yet."""
        return self._error

    @property
    def is_busy(self) -> bool:
        """Whether anything waits here or is under way."""
        return bool(self._queue or self._sent)

    @property
    def _is_ready(self) -> bool:
        return self._connection is not None and self._connecting is None

    def submit(self, operation: Operation) -> None:
        """Queue an operation."""
        if self._is_closed:
            operation.fail(BackendError("the backend was closed"))
        elif self._error is not None and not operation.must_arrive:
            operation.fail(self._error)
        elif len(self._queue) < MAX_QUEUE or self._make_room(operation):
            operation.since = self._time()
            self._queue.append(operation)
            if not self._flush_is_due:
                self._schedule()

    async def connect(self) -> None:
        """Connect and wait for it, as long as an operation would."""
        self._start_connecting()
        if self._connecting is not None:
            await asyncio.wait([self._connecting], timeout=self._timeout)

    async def drain(self, timeout: float) -> int:
        """Wait until everything queued has been answered; how much was left after `timeout` seconds."""
        deadline = self._loop.time() + timeout
        while (self._queue or self._sent) and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        return len(self._queue) + sum([len(batch.operations) for batch in self._sent])

    def withdraw(self) -> list[Operation]:
        """Take back what was not sent yet."""
        queued = list(self._queue)
        self._queue.clear()
        return queued

    def close(self) -> None:
        """Close the connection; whoever still waits gets a `BackendError`."""
        self._is_closed = True
        if self._watch is not None:
            self._watch.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        lost = self.owed
        if lost:
            logger.error("%d operations that were owed to the backend are lost: it was closed", lost)
        self._disconnect(BackendError("the backend was closed"))

    # sending ------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._is_ready:
            self._start_connecting()
            self._start_watch()
        elif len(self._sent) < IN_FLIGHT:
            # At the end of this turn of the loop: whoever else is ready rides along.
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        while self._queue and self._is_ready and len(self._sent) < IN_FLIGHT:
            batch = take(self._queue, MAX_BATCH)
            if batch:
                self._send(batch, by_digest=self._by_digest)

    def _send(self, batch: list[Operation], *, by_digest: bool) -> None:
        if self._connection is None:
            self._fail(batch, self._error or BackendError("the connection is closed"))
        elif self._group is None:
            self._connection.send(self._call_of(batch, by_digest), self._on_reply)
        else:
            self._send_groups(self._connection, self._group(batch), by_digest)
        self._start_watch()

    def _send_groups(
        self, connection: Connection, groups: Iterable[list[Operation]], by_digest: bool
    ) -> None:
        """Send a call for each group, all of them in one write."""
        commands: list[bytes] = []
        on_replies: list[OnReply] = []
        for group in groups:
            if group[0].is_asking:
                commands.append(_ASKING)
                on_replies.append(_ignore)
            commands.append(self._call_of(group, by_digest))
            on_replies.append(self._on_reply)
        connection.send(b"".join(commands), *on_replies)

    def _call_of(self, batch: list[Operation], by_digest: bool) -> bytes:
        """The call of the script for a batch, which counts as sent from now on."""
        groups, n_keys, keys, arguments, is_shared = compose(batch)
        head = b"*%d\r\n%b" % (4 + n_keys + len(groups), _BY_DIGEST if by_digest else _BY_TEXT)
        # What must arrive may have waited long for the server to be back.
        since = next((operation.since for operation in batch if not operation.must_arrive), self._loop.time())
        self._sent.append(_Batch(batch, groups, since, by_digest))
        self.batches += 1
        self.operations += len(batch)
        shares_and_time = bulk((b"S" if is_shared else b"D") + self._clock_argument())
        return b"".join((head, bulk(b"%d" % n_keys), keys, shares_and_time, arguments))

    # answers ------------------------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        batch = self._sent.popleft()
        if isinstance(reply, list) and len(reply) == len(batch.groups) + 1:
            if self._connecting is None:  # the probe says less: it is one key alone
                self._attempt = 0
            waited = self._loop.time() - batch.since
            self._waited += waited
            self._waits[bisect_left(WAITS, waited)] += 1
            self._on_answers(batch.groups, int(reply[0]), reply[1:])
        elif isinstance(reply, Exception):
            self._on_error(batch, BackendError(str(reply)))
        else:
            self._fail(batch.operations, BackendError(f"the script answered {reply!r}"))
        if self._queue:
            self._flush()

    def _on_answers(self, groups: list[list[Operation]], now: int, answers: list[bytes]) -> None:
        unwritten: list[Operation] = []
        error = None
        for operations, text in hand_out(groups, now, answers):
            failure = BackendError(text.decode(errors="replace").strip())
            if _MOVING in str(failure) and self._redirect is not None and self._redirect(operations, _LATER):
                continue
            if str(failure).startswith(_TAKES_NO_WRITES):
                error = failure
                unwritten += operations
                continue
            for operation in operations:
                self.complaints(failure)
                operation.fail(failure)
        if error is not None:
            self._fail(unwritten, error)
            self._disconnect(error)

    def _on_error(self, batch: _Batch, error: BackendError) -> None:
        """The server refused the whole call: nothing of it was done."""
        text = str(error)
        if self._redirect is not None and self._redirect(batch.operations, text):
            return
        if text.startswith("NOSCRIPT"):
            self._send(batch.operations, by_digest=False)  # which makes the server remember it, too
        elif text.startswith("NOPERM") and batch.by_digest:
            self._by_digest = False
            self._send(batch.operations, by_digest=False)
        else:
            self._fail(batch.operations, error)
            self._disconnect(error)

    def _fail(self, operations: list[Operation], error: BackendError, *, maybe_done: bool = False) -> None:
        if not self._is_closed:
            owed = [op for op in operations if op.must_arrive and not (maybe_done and op.is_once)]
            self._queue[0:0] = owed
            operations = [operation for operation in operations if operation not in owed]
        for operation in operations:
            operation.fail(error)
            if maybe_done and operation.orphaned is not None:
                operation.orphaned(operation.about, 0, None)

    def _make_room(self, newcomer: Operation) -> bool:
        """Whether there is room for one more: for what is owed there is, in place of what waits longest."""
        error = BackendError(f"more than {MAX_QUEUE} operations wait for the backend")
        if not newcomer.must_arrive:
            newcomer.fail(error)
            return False
        oldest = self._queue.pop(0)
        if oldest.must_arrive:
            logger.error("an operation that was owed to the backend is given up: %s", error)
        oldest.fail(error)
        return True

    # being there --------------------------------------------------------------------------------

    def _start_connecting(self) -> None:
        if self._connection is None and self._connecting is None:
            self._connecting = self._loop.create_task(self._keep_connecting(), name="ratelimit_mw connect")

    async def _keep_connecting(self) -> None:
        """Try until the server answers: at first on behalf of a request, then in its absence."""
        while True:
            if self._attempt:
                wait = PROBE_WAITS[min(self._attempt, len(PROBE_WAITS)) - 1]
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the workers
            self._attempt += 1
            try:
                async with asyncio.timeout(max(self._timeout, CONNECT_TIMEOUT)):
                    self._connection = await self._connect(self._disconnect)
                    await self._probe()
                if self._connection is not None:  # it may have been lost since the answer
                    break
            except TimeoutError:
                self._disconnect(BackendError("no answer to the first command"))
            except BackendError as error:
                self._disconnect(error)
        self._connecting = None
        if self._error is not None:
            self._error = None
            logger.warning("backend is back", extra={"ratelimit": {"event": "backend_back"}})
        self._flush()

    async def _probe(self) -> None:
        """Have a script write: a server may accept connections and be loading, hang, or be a replica."""
        probe = self._new_probe()
        probe.since = self._loop.time()
        self._send([probe], by_digest=self._by_digest)
        await probe

    def _disconnect(self, error: BackendError) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if isinstance(error, ServerMovedError) and self._error is None and not self._is_closed:
            self._move(error)
            return
        if self._error is None and not self._is_closed:
            logger.warning("backend is away: %s", error, extra={"ratelimit": {"event": "backend_away"}})
            self._error = error
        sent, queued = self._in_flight(), list(self._queue)
        self._sent.clear()
        self._queue.clear()
        self._fail(queued, error)
        self._fail(sent, error, maybe_done=True)
        if not self._is_closed:
            self._start_connecting()

    def _move(self, error: ServerMovedError) -> None:
        """Go on elsewhere, with all that waits: what the old server still does, the new one never learns."""
        sent = self._in_flight()
        self._sent.clear()
        if self._connecting is not None:
            self._fail(sent, error)  # the probe: the next attempt finds the other server
            return
        logger.warning("backend has moved: %s", error, extra={"ratelimit": {"event": "backend_moved"}})
        self._queue[0:0] = sent
        self._attempt = 0
        self._start_connecting()

    def _in_flight(self) -> list[Operation]:
        return [operation for batch in self._sent for operation in batch.operations]

    # waiting no longer than the time-out ----------------------------------------------------------

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)

    def _waiting_since(self) -> float | None:
        """Since when the one waits who has waited longest. What must arrive waits as long as it takes."""
        waits = [batch.since for batch in self._sent]
        waits += [op.since for op in self._queue if not (op.must_arrive or op.is_over)][:1]
        return min(waits, default=None)

    def _look(self, *, again: bool = False) -> None:
        self._watch = None
        since = self._waiting_since()
        if since is None:
            return
        left = since + self._timeout - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        elif not again:
            # The loop itself may have been away; let it read what has come meanwhile.
            self._watch = self._loop.call_later(GRACE, lambda: self._look(again=True))
        elif self._sent or self._connection is not None:
            self._disconnect(BackendError(f"no answer within {self._timeout:g} s"))
        else:
            self._disconnect(BackendError(f"no connection within {self._timeout:g} s"))


_TAKES_NO_WRITES = ("READONLY", "MISCONF", "NOREPLICAS")
"""Errors of a single command that tell of the whole server: it is as good as away."""
_MOVING, _LATER = "non local key", "TRYAGAIN"
"""A key that the script met lies in a slot that is moving, and was deleted in this very call: so nothing was
done, and the operation has to wait like one whose keys lie on two nodes.
"""
_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_BY_DIGEST = bulk(b"EVALSHA") + bulk(hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode())
_BY_TEXT = bulk(b"EVAL") + bulk(SCRIPT)


def _ignore(_reply: Reply) -> None:
    """ASKING went before a command, whose own answer says how it went."""
