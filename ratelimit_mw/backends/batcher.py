"""Group commit: the operations of concurrent requests leave for the server together.

While `IN_FLIGHT` batches are on their way, operations queue up; the next answer sends what has gathered.
There is no timer to wait for and, when idle, no wait. A batcher belongs to one event loop.
"""

import asyncio
import hashlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.resources import files

from ratelimit_mw.backends.connection import Connection, Reply
from ratelimit_mw.charge import BackendError

SCRIPT = files(__package__).joinpath("batch.lua").read_bytes()
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


def bulk(data: bytes) -> bytes:
    """`data` as one argument of a command in the Redis protocol."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


OnOrphan = Callable[[int, bytes | None], None]


class Operation:
    """One operation of a batch: its keys and its packed body, as arguments in the Redis protocol."""

    __slots__ = ("body", "future", "keys", "must_arrive", "n_keys", "on_orphan", "since")

    def __init__(
        self,
        keys: bytes,
        n_keys: int,
        body: bytes,
        future: "asyncio.Future[tuple[int, bytes]]",
        *,
        must_arrive: bool = False,
        on_orphan: OnOrphan | None = None,
    ) -> None:
        self.keys = keys
        self.n_keys = n_keys
        self.body = body
        self.future = future
        self.must_arrive = must_arrive
        """Sent again until it arrives: for operations that are idempotent and owed."""
        self.on_orphan = on_orphan
        """Called where the operation may have taken effect and nobody waits for its answer any more: with the
        server's time and the answer, or 0 and None where they are lost."""
        self.since = 0.0


class Batcher:
    """Sends operations to one server over one connection, and knows whether the server is there."""

    def __init__(
        self,
        connect: Callable[[Callable[[BackendError], None]], Awaitable[Connection]],
        *,
        timeout: float,
        clock_argument: Callable[[], bytes],
        probe_key: bytes,
    ) -> None:
        self._connect = connect
        self._timeout = timeout
        self._clock_argument = clock_argument
        self._probe_key = probe_key
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Operation] = deque()
        self._sent: deque[list[Operation]] = deque()
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._error: BackendError | None = None
        self._flush_is_due = False
        self._watch: asyncio.TimerHandle | None = None
        self._by_digest = True
        self._attempt = 0

    @property
    def error(self) -> BackendError | None:
        """Why the server is thought to be away; None while it is there or was not asked yet."""
        return self._error

    @property
    def _is_ready(self) -> bool:
        return self._connection is not None and self._connecting is None

    def submit(self, operation: Operation) -> None:
        """Queue an operation; its future gets the server's time and the answer, or a `BackendError`."""
        if self._error is not None and not operation.must_arrive:
            operation.future.set_exception(self._error)
            return
        if len(self._queue) >= MAX_QUEUE:
            self._drop_one(operation)
            return
        operation.since = self._loop.time()
        self._queue.append(operation)
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
        return len(self._queue) + sum(map(len, self._sent))

    def close(self) -> None:
        """Close the connection; whoever still waits gets a `BackendError`."""
        if self._connecting is not None:
            self._connecting.cancel()
        self._disconnect(BackendError("the backend was closed"), final=True)

    # sending ------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._is_ready:
            self._start_connecting()
            self._start_watch()
        elif not self._flush_is_due and len(self._sent) < IN_FLIGHT:
            # At the end of this turn of the loop: whoever else is ready rides along.
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        while self._queue and self._is_ready and len(self._sent) < IN_FLIGHT:
            batch: list[Operation] = []
            while self._queue and len(batch) < MAX_BATCH:
                operation = self._queue.popleft()
                if operation.must_arrive or not operation.future.done():
                    batch.append(operation)
            if batch:
                self._send(batch)

    def _send(self, batch: list[Operation], *, by_digest: bool | None = None) -> None:
        if self._connection is None:
            self._fail(batch, self._error or BackendError("the connection is closed"))
            return
        script = _BY_DIGEST if (self._by_digest if by_digest is None else by_digest) else _BY_TEXT
        n_keys = sum([operation.n_keys for operation in batch])
        parts = [b"*%d\r\n" % (4 + n_keys + len(batch)), script, bulk(b"%d" % n_keys)]
        parts += [operation.keys for operation in batch]
        parts.append(self._clock_argument())
        parts += [operation.body for operation in batch]
        self._sent.append(batch)
        self._connection.send(b"".join(parts), self._on_reply)
        self._start_watch()

    # answers ------------------------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        batch = self._sent.popleft()
        if isinstance(reply, list):
            self._attempt = 0
            now = int(reply[0])
            for operation, answer in zip(batch, reply[1:], strict=True):
                self._answer(operation, now, answer)
        elif isinstance(reply, Exception):
            self._on_error(batch, BackendError(str(reply)))
        else:
            self._fail(batch, BackendError(f"the script answered {reply!r}"))
        if self._queue:
            self._flush()

    def _answer(self, operation: Operation, now: int, answer: bytes) -> None:
        future = operation.future
        if future.done():
            if operation.on_orphan is not None and not answer.startswith(b"E"):
                operation.on_orphan(now, answer)
        elif answer.startswith(b"E"):
            future.set_exception(BackendError(answer[1:].decode(errors="replace")))
        else:
            future.set_result((now, answer))

    def _on_error(self, batch: list[Operation], error: BackendError) -> None:
        """The server refused the whole call: nothing of it was done."""
        text = str(error)
        if text.startswith("NOSCRIPT"):
            self._send(batch, by_digest=False)  # which makes the server remember it, too
        elif text.startswith("NOPERM") and self._by_digest:
            self._by_digest = False
            self._send(batch)
        else:
            self._fail(batch, error)
            self._disconnect(error)

    def _fail(self, batch: list[Operation], error: BackendError, *, maybe_done: bool = False) -> None:
        for operation in reversed(batch):
            if operation.must_arrive:
                self._queue.appendleft(operation)
                continue
            if not operation.future.done():
                operation.future.set_exception(error)
            if maybe_done and operation.on_orphan is not None:
                operation.on_orphan(0, None)

    def _drop_one(self, newcomer: Operation) -> None:
        error = BackendError(f"more than {MAX_QUEUE} operations wait for the backend")
        if not newcomer.must_arrive:
            newcomer.future.set_exception(error)
            return
        oldest = self._queue.popleft()
        if oldest.must_arrive:
            logger.error("an operation that was owed to the backend is given up: %s", error)
        if not oldest.future.done():
            oldest.future.set_exception(error)
        self._queue.append(newcomer)

    # being there --------------------------------------------------------------------------------

    def _start_connecting(self) -> None:
        if self._connection is None and self._connecting is None:
            self._connecting = self._loop.create_task(self._keep_connecting(), name="ratelimit_mw connect")

    async def _keep_connecting(self) -> None:
        """Try until the server answers: the first attempt on behalf of a request, the others in its absence."""
        while True:
            if self._attempt:
                wait = PROBE_WAITS[min(self._attempt, len(PROBE_WAITS)) - 1]
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the workers
            self._attempt += 1
            try:
                async with asyncio.timeout(max(self._timeout, CONNECT_TIMEOUT)):
                    self._connection = await self._connect(self._disconnect)
                    await self._probe()
                break
            except (BackendError, TimeoutError) as error:
                self._disconnect(BackendError(str(error) or "no answer to the first command"))
        self._connecting = None
        if self._error is not None:
            self._error = None
            logger.warning("backend is back")
        self._flush()

    async def _probe(self) -> None:
        """Have a script write: a server may accept connections and be loading, hang, or be a replica."""
        future: asyncio.Future[tuple[int, bytes]] = self._loop.create_future()
        probe = Operation(bulk(self._probe_key), 1, bulk(b"D\x01"), future)
        probe.since = self._loop.time()
        self._send([probe])
        await future

    def _disconnect(self, error: BackendError, *, final: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._error is None and not final:
            logger.warning("backend is away: %s", error)
            self._error = error
        sent, queued = list(self._sent), list(self._queue)
        self._sent.clear()
        self._queue.clear()
        self._fail(queued, error)
        for batch in reversed(sent):
            self._fail(batch, error, maybe_done=True)
        if not final:
            self._start_connecting()

    # waiting no longer than the time-out ----------------------------------------------------------

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._look)

    def _oldest(self) -> Operation | None:
        for batch in self._sent:
            return batch[0]
        return next((op for op in self._queue if not op.must_arrive), None)

    def _look(self, *, again: bool = False) -> None:
        self._watch = None
        oldest = self._oldest()
        if oldest is None:
            return
        left = oldest.since + self._timeout - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        elif not again:
            # The loop itself may have been away; let it read what has come meanwhile.
            self._watch = self._loop.call_later(GRACE, lambda: self._look(again=True))
        elif self._sent or self._connection is not None:
            self._disconnect(BackendError(f"no answer within {self._timeout:g} s"))
        else:
            self._disconnect(BackendError(f"no connection within {self._timeout:g} s"))


_BY_DIGEST = bulk(b"EVALSHA") + bulk(hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode())
_BY_TEXT = bulk(b"EVAL") + bulk(SCRIPT)
