"""Connections to a Redis or Valkey server. The only module that imports `redis`.

redis-py makes the one that requests wait for: address, TLS, authentication, database. Then this module
takes over its transport, since redis-py's path for a single command costs ten times what the server needs
to answer. Commands are written as they come, replies are handed back in their order; a connection on which
anything went wrong is closed, so that no caller ever gets another's answer. What no request waits for goes
through redis-py's own client.
"""

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol, Self

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, MovedError, ReadOnlyError, RedisError, ResponseError

from ratelimit_mw._internal.backends.connecting.loop_end import LoopEnd
from ratelimit_mw._internal.model.charge import BackendError
from ratelimit_mw._internal.runtime import threads

FAILURES = (RedisError, OSError, TimeoutError, ValueError, RuntimeError)
"""What redis-py raises where a server can't be reached, does not answer, or refuses. A RuntimeError is what
uvloop raises for a write to a connection that has just ended."""
CONNECT_TIMEOUT = 1.0
"""Seconds for an attempt to connect, encryption and login included, where an answer must not take longer."""
_NAME = "ratelimit_mw"
Reply = bytes | int | None | list[Any] | Exception
OnReply = Callable[[Reply], None]


class Connector(Protocol):
    """Opens connections to whatever a URL names."""

    async def connect(self, on_lost: Callable[[BackendError], None]) -> "Connection":
        """A new connection, ready for commands.

        Raises `BackendError` where there is none to be had. `on_lost` is called once, when it ends: with a
        `ConnectionEndedError` where the other side closed it.
        """

    def client(self) -> "Client":
        """A client for single commands. It connects with the first of them and belongs to one event loop."""


def server_options(timeout: float, options: dict[str, Any] | None) -> dict[str, Any]:
    """What redis-py is told about every connection: its defaults wait 5 s ten times over."""
    return {
        "protocol": 2,
        "socket_connect_timeout": max(timeout, CONNECT_TIMEOUT),
        "socket_timeout": timeout,
        "redis_connect_func": _introduce,
        "retry": Retry(NoBackoff(), 0),
        **(options or {}),
    }


async def _introduce(connection: AbstractConnection) -> None:
    """Log in on a new connection, as redis-py does, in the time for connecting; and name it.

    The name is for whoever looks at the server's clients: a server that has no `CLIENT` does without.
    """
    answers_in = connection.socket_timeout
    connection.socket_timeout = connection.socket_connect_timeout
    try:
        await connection.on_connect()
        if connection.client_name is not None:  # the URL's, which it has by now
            return
        with suppress(ResponseError):
            await connection.send_command("CLIENT", "SETNAME", _NAME, check_health=False)
            await connection.read_response()
    finally:
        connection.socket_timeout = answers_in


class ServerConnector:
    """Opens connections to the one server that a URL names."""

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self.url = url
        own = server_options(timeout, options)
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
            async with asyncio.timeout(connection.socket_connect_timeout):
                await connection.connect()
                _stay_cancelled()
        except Exception as error:  # whatever it is, the server can't be asked
            await connection.disconnect(nowait=True)
            _stay_cancelled()
            slow = f"not within {connection.socket_connect_timeout:g} s"
            reason = slow if isinstance(error, TimeoutError) and not str(error) else reason_of(error)
            raise BackendError(f"cannot connect: {reason}") from error
        except asyncio.CancelledError:
            await connection.disconnect(nowait=True)
            raise
        return Connection.take_over(connection, on_lost)


def _stay_cancelled() -> None:
    """Redis-py loses a cancellation that meets it at the wrong moment, so that it is asked for here."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class ConnectionEndedError(BackendError):
    """The other side, or the network between, has closed a connection."""


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
        self._end: LoopEnd | None = None

    async def execute(self, *command: str | bytes | int) -> Any:
        """Send one command; its answer as redis-py gives it, texts as bytes."""
        try:
            return await (await self._server()).execute_command(*command)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever it is, nobody was asked
            raise await self._failed(error) from error

    async def transact(self, commands: Sequence[Sequence[str | bytes | int]]) -> None:
        """Send commands that take effect all at once (MULTI)."""
        # Not by redis-py's pipeline, which packs them in the event loop, however many there are.
        whole = [("MULTI",), *commands, ("EXEC",)]
        try:
            pool = (await self._server()).connection_pool
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.send_packed_command(await threads.call(lambda: _packed(connection, whole)))
                answers = [await connection.read_response() for _ in whole]
            except BaseException:
                await connection.disconnect(nowait=True)  # with answers to come that nobody waits for
                raise
            finally:
                await pool.release(connection)
            for answer in answers[-1]:
                if isinstance(answer, Exception):
                    raise answer
        except Exception as error:  # whatever it is, nobody was asked
            raise await self._failed(error) from error

    async def ask(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Any]:
        """Send commands together; their answers, None for a key of another type than was expected."""
        try:
            async with (await self._server()).pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers = await pipeline.execute(raise_on_error=False)
            return [_unless_wrong_type(answer) for answer in answers]
        except Exception as error:  # whatever it is, nobody was asked
            raise await self._failed(error) from error

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
            async with (await self._server()).pubsub() as pubsub:
                await pubsub.subscribe(*channels)
                while True:
                    if await pubsub.get_message(timeout=None) is not None:
                        on_message()
        except Exception as error:
            raise await self._failed(error) from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection; it may be used again."""
        redis, end, self._end = self._redis, self._end, None
        if end is not None:
            await end.cancel()
        if redis is not None:
            await redis.aclose(close_connection_pool=True)
        if self._redis is redis:  # forgotten once it is closed: the caller may be cancelled meanwhile
            self._redis = None

    def leave_to_parent(self) -> None:
        """Give up the connections in a process that was forked off."""
        if self._redis is not None:
            pool = self._redis.connection_pool
            for connection in (*pool._available_connections, *pool._in_use_connections):
                if connection._writer is not None:
                    _silence(connection._writer.transport)

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
        if not isinstance(failure, ReplyError) or isinstance(error, (MovedError, ReadOnlyError)):
            await self.close()
        return failure


def _packed(connection: AbstractConnection, commands: Sequence[Sequence[str | bytes | int]]) -> list[bytes]:
    return [bytes(part) for part in connection.pack_commands(commands)]


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

    def close(self, *, discard: bool = False) -> None:
        """Close at once; answers still to come are never read, and `on_lost` is not called.

        To `discard` is to have the kernel not send what it was given, and has not sent yet.
        """
        if self._watch is not None:
            self._watch.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            if discard:
                _forget_unsent(transport)
            transport.abort()
            self._connection._reader = self._connection._writer = None

    def leave_to_parent(self) -> None:
        """Give up the connection in a process that was forked off; the parent goes on with it."""
        if self._transport is not None:
            _silence(self._transport)

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
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits for an answer has to be told
            self._lose(BackendError(f"an answer could not be read: {error!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        """The server or the network ended it."""
        if self._transport is not None:
            self._lose(ConnectionEndedError(f"connection lost: {error or 'closed by the server'}"))

    def _end(self, watch: "asyncio.Task[BackendError]") -> None:
        _watches.discard(watch)
        if not watch.cancelled() and self._transport is not None:
            self._lose(watch.result())

    def _lose(self, error: BackendError) -> None:
        self.close(discard=True)
        self._on_lost(error)


def _silence(transport: asyncio.BaseTransport) -> None:
    """Put an empty file in the place of a socket that the parent process has, too.

    To close the transport would tell the event loop, whose part in the system is the parent's as well.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, sock.fileno(), inheritable=False)
        os.close(nothing)


def _forget_unsent(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or sock.family == socket.AF_UNIX:
        return
    # By the descriptor, since the socket that uvloop shows takes no options.
    real = socket.socket(fileno=sock.fileno())
    try:
        real.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it has just been closed
    finally:
        real.detach()


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
    """What redis-py raised, or the reading of an answer, as what a backend raises."""
    if isinstance(error, BackendError):
        return error
    if not isinstance(error, FAILURES):
        return BackendError(reason_of(error))
    refused = isinstance(error, ResponseError) and not isinstance(error, AuthenticationError)
    return (ReplyError if refused else BackendError)(reason_of(error))


def reason_of(error: Exception) -> str:
    """What went wrong, in one text: with its type where that is no error of a server or a network."""
    if isinstance(error, (RedisError, OSError, ValueError, RuntimeError, BackendError)):
        return str(error) or "no answer in time"
    return f"{type(error).__name__}: {error}"
