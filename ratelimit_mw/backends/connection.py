"""One connection to a Redis or Valkey server. The only module that imports `redis`.

redis-py makes it: address, TLS, authentication, database. Then this module takes over its transport, since
redis-py's path for a single command costs ten times what the server needs to answer. Commands are written
as they come, replies are handed back in their order; a connection on which anything went wrong is closed,
so that no caller ever gets another's answer.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ratelimit_mw.charge import BackendError

Reply = bytes | int | None | list[Any] | Exception
OnReply = Callable[[Reply], None]


class Connector:
    """Opens connections to the server that a URL names."""

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        # redis-py's own defaults would wait 5 s ten times over and send a script twice.
        self._pool = ConnectionPool.from_url(
            _redis_scheme(url),
            protocol=2,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            client_name="ratelimit_mw",
            **(options or {}),
        )

    async def connect(self, on_lost: Callable[[BackendError], None]) -> "Connection":
        """A new connection, ready for commands.

        Raises `BackendError` where there is none to be had. `on_lost` is called once, when it ends.
        """
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            await connection.disconnect(nowait=True)
            raise BackendError(f"cannot connect: {error}") from error
        return Connection.take_over(connection, on_lost)


class Connection(asyncio.Protocol):
    """Commands out, replies back in the same order."""

    def __init__(self, connection: AbstractConnection, on_lost: Callable[[BackendError], None]) -> None:
        self._connection = connection  # keeps its stream writer, and so the transport, from being collected
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=BackendError, protocolError=BackendError)
        self._waiting: deque[OnReply] = deque()
        self._transport: asyncio.WriteTransport | None = None

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

    def send(self, command: bytes, on_reply: OnReply) -> None:
        """Write one command; `on_reply` is called with its answer, an exception where that is an error."""
        if self._transport is None:
            raise BackendError("the connection is closed")
        self._waiting.append(on_reply)
        self._transport.write(command)

    def close(self) -> None:
        """Close at once; answers still to come are never read, and `on_lost` is not called."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
            self._connection._reader = self._connection._writer = None

    def data_received(self, data: bytes) -> None:
        """Hand every complete reply to the command that it answers."""
        if self._transport is None:
            return
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                if not self._waiting:
                    raise BackendError("an answer came that nobody had asked for")
                self._waiting.popleft()(reply)
        except BackendError as error:
            self._lose(error)

    def connection_lost(self, error: Exception | None) -> None:
        """The server or the network ended it."""
        if self._transport is not None:
            self._lose(BackendError(f"connection lost: {error or 'closed by the server'}"))

    def _lose(self, error: BackendError) -> None:
        self.close()
        self._on_lost(error)


def _redis_scheme(url: str) -> str:
    return url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
