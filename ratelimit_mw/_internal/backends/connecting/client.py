"""A client of a server for single commands, beside the batches that decide."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import MovedError, NoScriptError, ReadOnlyError, ResponseError

from ratelimit_mw._internal.backends.connecting.connection import silence
from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.connecting.failures import as_backend_error
from ratelimit_mw._internal.backends.connecting.loop_end import LoopEnd
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.runtime import threads

if TYPE_CHECKING:
    from ratelimit_mw._internal.backends.connecting.shared import SharedConnection

CONNECT_TIMEOUT = 1.0
"""Seconds for an attempt to connect, encryption and login included, where an answer must not take longer."""
IDLE_SECONDS = 5.0
"""Seconds after which a connection is closed that is not needed, since another takes short commands."""
Command = Sequence[str | bytes | int]
_GIVEN_UP = "because of previous errors"
"""Part of the answer of a server that gave up a transaction, and not of one that may not execute it."""


class Reachable(Protocol):
    """A server that can be reached: the connector of its URL."""

    url: str

    def redis(self) -> Redis:
        """Return redis-py's own client, with a connection of its own."""


class Client:
    """Single commands over redis-py's client. A failure is a `BackendError`; nothing is sent twice."""

    def __init__(self, find: Callable[[], Awaitable[Reachable]], find_every: float | None = None) -> None:
        """`find` finds the server; it is asked again after a failure, since another may have taken over, and
        by a command that comes `find_every` seconds later, as another may have taken over without one.
        """
        self._find = find
        self._find_every = find_every
        self._found_at = 0.0
        self._url = ""
        self._redis: Redis | None = None
        self._end: LoopEnd | None = None
        self._in_use = 0
        self._used_at = 0.0
        self.shared: SharedConnection | None = None
        """The connection that requests wait for, where it may take short commands."""

    async def execute(self, *command: str | bytes | int, is_short: bool = False) -> Any:
        """Send one command; its answer as redis-py gives it, texts as bytes.

        What `is_short`, asked and answered in a moment, may share the connection that requests wait for.
        """
        if is_short and (answers := await self._ask_shared([command])) is not None:
            return _unless_error(answers[0])
        async with self._connected() as redis:
            return await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def run(
        self, text: str, digest: str, arguments: Sequence[str | bytes | int], beside: Sequence[Command] = ()
    ) -> list[Any]:
        """Run a short script by its digest, and send its text where the server lacks it.

        Commands `beside` it are sent with it, each time. The answers to all, as `ask` returns them.
        """
        try:
            return await self.ask([("EVALSHA", digest, *arguments), *beside], is_short=True)
        except ReplyError as error:
            if not (str(error).startswith("NOSCRIPT") or isinstance(error.__cause__, NoScriptError)):
                raise
        return await self.ask([("EVAL", text, *arguments), *beside], is_short=True)

    async def transact(self, commands: Sequence[Command], watched: str) -> bool:
        """Send commands that take effect all at once (MULTI); whether they did.

        They do nothing where another client has changed the key `watched` since this was called (WATCH),
        also where they reach the server after they were given up.
        """
        # Not by redis-py's pipeline, which packs them in the event loop, however many there are.
        whole = [("MULTI",), *commands, ("EXEC",)]
        async with self._connected() as redis:
            pool = redis.connection_pool
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.send_command("WATCH", watched)
                await connection.read_response()
                await connection.send_packed_command(await threads.call(lambda: _packed(connection, whole)))
                answers = [await connection.read_response() for _ in whole]
            except BaseException:
                await connection.disconnect(nowait=True)  # with answers to come that nobody waits for
                raise
            finally:
                await pool.release(connection)
            for answer in answers[-1] or ():
                if isinstance(answer, Exception):
                    raise answer
            return answers[-1] is not None

    async def try_out(self, commands: Sequence[Command], watched: str) -> None:
        """Have commands refused that the server would not run in a transaction; none of them is run.

        Raises `ReplyError` for the first that is refused.
        """
        # What is malformed has the server give up the transaction, though it may be executed.
        queued = [*commands, ("GET",), ("EXEC",)]
        async with self._connected() as redis:
            pool = redis.connection_pool
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                # Alone: where a transaction may not be begun, commands after it would be run.
                for command in (("WATCH", watched), ("MULTI",)):
                    await connection.send_command(*command)
                    await connection.read_response()
                await connection.send_packed_command(_packed(connection, queued))
                refusals = [await _refusal(connection) for _ in queued]
            finally:
                await connection.disconnect(nowait=True)  # which may not be allowed to end what it began
                await pool.release(connection)
            for refusal in (*refusals[:-2], refusals[-1]):
                if refusal is not None and _GIVEN_UP not in str(refusal):
                    raise refusal

    async def ask(self, commands: Sequence[Command], *, is_short: bool = False) -> list[Any]:
        """Send commands together; their answers, None for a key of another type than was expected."""
        if is_short and (found := await self._ask_shared(commands)) is not None:
            return [_unless_wrong_type(answer) for answer in found]
        async with self._connected() as redis, redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers = await pipeline.execute(raise_on_error=False)
            return [_unless_wrong_type(answer) for answer in answers]

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Raise `BackendError` where an answer turns out not to be what was asked for, and close."""
        try:
            yield
        except Exception as error:
            raise await self._failed(error) from error

    async def listen(self, channels: Sequence[str], on_message: Callable[[], None]) -> None:
        """Subscribe, and call `on_message` once that is done and for every message, until it fails."""
        try:
            async with self._connected() as redis, redis.pubsub() as pubsub:
                await pubsub.subscribe(*channels)
                while True:
                    if await pubsub.get_message(timeout=None) is not None:
                        on_message()
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; it may be used again."""
        redis, end = self._redis, self._end
        self._redis = self._end = None
        if end is not None:
            await end.cancel()
        if redis is not None:
            await _close(redis)

    def leave_to_parent(self) -> None:
        """Give up the connections in a process that was forked off."""
        if self._redis is not None:
            pool = self._redis.connection_pool
            for connection in (*pool._available_connections, *pool._in_use_connections):
                if connection._writer is not None:
                    silence(connection._writer.transport)

    async def _ask_shared(self, commands: Sequence[Command]) -> list[Any] | None:
        """Ask over the connection that requests wait for; None where this needs a connection of its own."""
        answers = None if self.shared is None else await self.shared.ask(commands)
        is_idle = not self._in_use and asyncio.get_running_loop().time() > self._used_at + IDLE_SECONDS
        if answers is not None and self._redis is not None and is_idle:
            await self.close()
        return answers

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Redis]:
        """Find the server and hand out redis-py's client of it; raise `BackendError` for what fails."""
        redis: Redis | None = None
        self._in_use += 1
        try:
            redis = await self._server()
            yield redis
        except Exception as error:
            raise await self._failed(error) from error
        finally:
            self._in_use -= 1
            self._used_at = asyncio.get_running_loop().time()
            if redis is not None and redis is not self._redis:
                await _close(redis)  # it was closed while this command was opening a connection

    async def _server(self) -> Redis:
        now = asyncio.get_running_loop().time()
        is_due = self._find_every is not None and now >= self._found_at + self._find_every
        if self._redis is None or is_due:
            server = await self._find()
            self._found_at = now
            if server.url != self._url:
                await self.close()
            self._url = server.url
            if self._redis is None:
                self._redis, self._end = server.redis(), LoopEnd(self.close)
        return self._redis

    async def _failed(self, error: Exception) -> BackendError:
        failure = as_backend_error(error)
        if not isinstance(failure, ReplyError) or _is_elsewhere(error):
            await self.close()
        return failure


async def _close(redis: Redis) -> None:
    """Close the connections of redis-py's client at once, and wait until they have ended.

    A cancellation ends the wait only: redis-py's own way leaves a connection open where one comes early.
    """
    pool = redis.connection_pool
    connections = [*pool._available_connections, *pool._in_use_connections]
    writers = [each._writer for each in connections if each._writer is not None]
    for connection in connections:
        await connection.disconnect(nowait=True)  # it never pauses
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            for writer in writers:
                with suppress(OSError):
                    await writer.wait_closed()
    except BaseException as error:
        for writer in writers:
            writer.transport.abort()
        if not isinstance(error, TimeoutError):
            raise


def _is_elsewhere(error: Exception) -> bool:
    """Whether another server has to be found."""
    # redis-py 5 has no class for a MOVED, and leaves the word in the text.
    return isinstance(error, (MovedError, ReadOnlyError)) or str(error).startswith("MOVED ")


def _packed(connection: AbstractConnection, commands: Sequence[Command]) -> bytes:
    """Commands as one text: of thousands of parts, the event loop would have to put them together."""
    return b"".join(connection.pack_commands(commands))


async def _refusal(connection: AbstractConnection) -> ResponseError | None:
    try:
        await connection.read_response()
    except ResponseError as error:
        return error
    return None


def _unless_wrong_type(answer: Any) -> Any:
    if isinstance(answer, (ResponseError, ReplyError)) and str(answer).startswith("WRONGTYPE"):
        return None
    return _unless_error(answer)


def _unless_error(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
