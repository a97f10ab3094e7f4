"""Connections to a Redis or Valkey server. The only module that imports `redis`.

redis-py makes the one that requests wait for: address, TLS, authentication, database. Then this module
takes over its transport, since redis-py's path for a single command costs ten times what the server needs
to answer. Commands are written as they come, replies are handed back in their order; a connection on which
anything went wrong is closed, so that no caller ever gets another's answer. What no request waits for goes
through redis-py's own client.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol, Self

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, MovedError, ReadOnlyError, RedisError, ResponseError

from ratelimit_mw.charge import BackendError

FAILURES = (RedisError, OSError, TimeoutError, ValueError, RuntimeError)
"""What redis-py raises where a server can't be reached, does not answer, or refuses. A RuntimeError is what
uvloop raises for a write to a connection that has just ended."""
Reply = bytes | int | None | list[Any] | Exception
OnReply = Callable[[Reply], None]


class Connector(Protocol):
    """Opens connections to whatever a URL names."""

    async def connect(self, on_lost: Callable[[BackendError], None]) -> "Connection":
        """A new connection, ready for commands.

        Raises `BackendError` where there is none to be had. `on_lost` is called once, when it ends.
        """

    def client(self) -> "Client":
        """A client for single commands. It connects with the first of them and belongs to one event loop."""


def server_options(timeout: float, options: dict[str, Any] | None) -> dict[str, Any]:
    """What redis-py is told about every connection: its defaults wait 5 s ten times over."""
    return {
        "protocol": 2,
        "socket_connect_timeout": timeout,
        "socket_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        **(options or {}),
    }


class ServerConnector:
    """Opens connections to the one server that a URL names."""

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self.url = url
        own = {"client_name": "ratelimit_mw", **server_options(timeout, options)}
        self._new_pool = partial(ConnectionPool.from_url, _redis_scheme(url), **own)
        self._pool = self._new_pool()

    def redis(self) -> Redis:
        """redis-py's own client, with a connection of its own."""
        return Redis(connection_pool=self._new_pool())

    def client(self) -> "Client":
        """A client for single commands. It connects with the first of them and belongs to one event loop."""

        async def this() -> ServerConnector:
            return self

        return Client(this)

    async def connect(self, on_lost: Callable[[BackendError], None]) -> "Connection":
        """A new connection, ready for commands.

        Raises `BackendError` where there is none to be had. `on_lost` is called once, when it ends.
        """
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
            _stay_cancelled()
        except FAILURES as error:
            await connection.disconnect(nowait=True)
            _stay_cancelled()
            raise BackendError(f"cannot connect: {error}") from error
        except asyncio.CancelledError:
            await connection.disconnect(nowait=True)
            raise
        return Connection.take_over(connection, on_lost)


def _stay_cancelled() -> None:
    """Redis-py loses a cancellation that meets it at the wrong moment, so that it is asked for here."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class ReplyError(BackendError):
    """The server answered, and the answer was an error: no permission, a key of another type."""


class ServerMovedError(BackendError):
    """Another server is the one to go to. Nothing is wrong with the connection that ends for it."""


class Client:
    """Single commands over redis-py's client. A failure is a `BackendError`; nothing is sent twice."""

    def __init__(
        self, find: Callable[[], Awaitable[ServerConnector]], find_every: float | None = None
    ) -> None:
        """`find` finds the server; it is asked again after a failure, since another may have taken over, and
        by a command that comes `find_every` seconds later, as another may have taken over without one.
        """
        self._find = find
        self._find_every = find_every
        self._found_at = 0.0
        self._url = ""
        self._redis: Redis | None = None

    async def execute(self, *command: str | bytes | int) -> Any:
        """Send one command; its answer as redis-py gives it, texts as bytes."""
        try:
            return await (await self._server()).execute_command(*command)  # type: ignore[no-untyped-call]
        except FAILURES as error:
            raise await self._failed(error) from error

    async def transact(self, commands: Sequence[Sequence[str | bytes | int]]) -> None:
        """Send commands that take effect all at once (MULTI)."""
        try:
            async with (await self._server()).pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                await pipeline.execute()
        except FAILURES as error:
            raise await self._failed(error) from error

    async def ask(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Any]:
        """Send commands together; their answers, None for a key of another type than was expected."""
        try:
            async with (await self._server()).pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers = await pipeline.execute(raise_on_error=False)
            return [_unless_wrong_type(answer) for answer in answers]
        except FAILURES as error:
            raise await self._failed(error) from error

    async def listen(self, channels: Sequence[str], on_message: Callable[[], None]) -> None:
        """Subscribe, and call `on_message` once that is done and for every message, until it fails."""
        try:
            async with (await self._server()).pubsub() as pubsub:
                await pubsub.subscribe(*channels)
                while True:
                    if await pubsub.get_message(timeout=None) is not None:
                        on_message()
        except FAILURES as error:
            raise await self._failed(error) from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; it may be used again."""
        redis = self._redis
        if redis is not None:
            await redis.aclose(close_connection_pool=True)
        if self._redis is redis:  # forgotten once it is closed: the caller may be cancelled meanwhile
            self._redis = None

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
                self._redis = server.redis()
        return self._redis

    async def _failed(self, error: Exception) -> BackendError:
        failure = as_backend_error(error)
        if not isinstance(failure, ReplyError) or isinstance(error, (MovedError, ReadOnlyError)):
            await self.close()
        return failure


def _unless_wrong_type(answer: Any) -> Any:
    if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


class Connection(asyncio.Protocol):
    """Commands out, replies back in the same order."""

    def __init__(self, connection: AbstractConnection, on_lost: Callable[[BackendError], None]) -> None:
        self._connection = connection  # keeps its stream writer, and so the transport, from being collected
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=BackendError, protocolError=BackendError)
        self._waiting: deque[OnReply] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self._watch: asyncio.Task[BackendError] | None = None

    @classmethod
    def take_over(cls, connection: AbstractConnection, on_lost: Callable[[BackendError], None]) -> Self:
        """Put this protocol in place of redis-py's streams."""
        writer = connection._writer
        if writer is None:
            raise BackendError("the connection was closed as soon as it was opened")
        protocol = cls(connection, on_lost)
        protocol._transport = writer.transport
        writer.transport.set_protocol(protocol)
        return protocol

    def send(self, commands: bytes, *on_replies: OnReply) -> None:
        """Write commands; each of `on_replies` is called with one answer, an exception if it is an error."""
        if self._transport is None:
            raise BackendError("the connection is closed")
        self._waiting.extend(on_replies)
        try:
            self._transport.write(commands)
        except RuntimeError as error:  # uvloop's, between the end of a connection and the news of it
            lost = BackendError(f"connection lost: {error}")
            asyncio.get_running_loop().call_soon(self.connection_lost, lost)

    def watch(self, reason: Coroutine[Any, Any, BackendError]) -> None:
        """End the connection for the reason that a coroutine returns, which runs no longer than it."""
        self._watch = asyncio.create_task(reason, name="ratelimit_mw watch")
        self._watch.add_done_callback(self._end)
        _watches.add(self._watch)

    def close(self) -> None:
        """Close at once; answers still to come are never read, and `on_lost` is not called."""
        if self._watch is not None:
            self._watch.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            self._connection._reader = self._connection._writer = None

    def data_received(self, data: bytes) -> None:
        """Hand every complete reply to the command that it answers."""
        try:
            self._reader.feed(data)
            # Whoever gets a reply may close the connection over it: then the others are nobody's.
            while self._transport is not None:
                reply = self._reader.gets()
                if reply is False:
                    break
                if not self._waiting:
                    raise BackendError("an answer came that nobody had asked for")
                self._waiting.popleft()(reply)
        except BackendError as error:
            self._lose(error)

    def connection_lost(self, error: Exception | None) -> None:
        """The server or the network ended it."""
        if self._transport is not None:
            self._lose(BackendError(f"connection lost: {error or 'closed by the server'}"))

    def _end(self, watch: "asyncio.Task[BackendError]") -> None:
        _watches.discard(watch)
        if not watch.cancelled() and self._transport is not None:
            self._lose(watch.result())

    def _lose(self, error: BackendError) -> None:
        self.close()
        self._on_lost(error)


async def end_of_watches() -> None:
    """Wait until the watches of connections that were closed have closed what they opened themselves."""
    loop = asyncio.get_running_loop()
    ending = [watch for watch in list(_watches) if watch.get_loop() is loop and watch.cancelling()]
    if ending:
        await asyncio.wait(ending, timeout=1.0)


_watches: "set[asyncio.Task[BackendError]]" = set()
"""Those that run: an event loop alone does not keep a task."""


def _redis_scheme(url: str) -> str:
    scheme, _, rest = url.partition("://")
    scheme = "unix" if scheme.endswith("unix") else scheme.replace("valkey", "redis")
    return f"{scheme}://{rest}"


def as_backend_error(error: Exception) -> BackendError:
    """What redis-py raised, as what a backend raises."""
    refused = isinstance(error, ResponseError) and not isinstance(error, AuthenticationError)
    return (ReplyError if refused else BackendError)(str(error) or "no answer in time")
