"""Connectors: they open connections to the server that a URL names."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import Connection as RedisConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from ratelimit_mw._internal.backends.connecting.client import CONNECT_TIMEOUT, Client
from ratelimit_mw._internal.backends.connecting.connection import Connection, stay_cancelled
from ratelimit_mw._internal.backends.connecting.failures import reason_of
from ratelimit_mw._internal.model.backend import BackendError

_NAME = "ratelimit_mw"
_LOG_IN = (
    "on_connect_check_health" if hasattr(AbstractConnection, "on_connect_check_health") else "on_connect"
)
"""The method by which redis-py's connections log in. Its option for a function of others calls what Python
3.14 deprecates, which fails where warnings are errors."""


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
    """Return redis-py's options for every connection. Its defaults wait 5 s ten times over."""
    return {
        "protocol": 2,
        "socket_connect_timeout": max(timeout, CONNECT_TIMEOUT),
        "socket_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        **(options or {}),
    }


def _introducing(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Make a kind of connection that logs in as redis-py's does, in the time for connecting; and has a name.

    The name is for whoever looks at the server's clients: a server that has no `CLIENT` does without.
    """
    log_in = getattr(kind, _LOG_IN)

    async def introduce(self: AbstractConnection, *arguments: Any, **options: Any) -> None:
        answers_in = self.socket_timeout
        self.socket_timeout = self.socket_connect_timeout
        try:
            await log_in(self, *arguments, **options)
            if self.client_name is not None:  # the URL's, which it has by now
                return
            with suppress(ResponseError):
                await self.send_command("CLIENT", "SETNAME", _NAME, check_health=False)
                await self.read_response()
        finally:
            self.socket_timeout = answers_in

    return type(kind.__name__, (kind,), {_LOG_IN: introduce})


_KINDS: dict[type[AbstractConnection], type[AbstractConnection]] = {
    kind: _introducing(kind) for kind in (RedisConnection, SSLConnection, UnixDomainSocketConnection)
}
"""Kinds of connections by redis-py's own, of which it picks one by the URL."""


class ServerConnector:
    """Opens connections to the one server that a URL names."""

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self.url = url
        self._options = server_options(timeout, options)
        self._pool = self._new_pool()

    def redis(self) -> Redis:
        """redis-py's own client, with a connection of its own."""
        return Redis(connection_pool=self._new_pool())

    def _new_pool(self) -> ConnectionPool:
        pool = ConnectionPool.from_url(_redis_scheme(self.url), **self._options)
        pool.connection_class = _KINDS[pool.connection_class]
        options = pool.connection_kwargs
        if issubclass(pool.connection_class, SSLConnection):
            # What redis-py does by itself from version 6 on, and what it leaves out silently.
            if options.get("ssl_cert_reqs") != "none":
                options.setdefault("ssl_check_hostname", True)
            if options.get("ssl_certfile"):
                options.setdefault("ssl_keyfile", options["ssl_certfile"])
        return pool

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
                stay_cancelled()
        except Exception as error:  # whatever it is, the server can't be asked
            await connection.disconnect(nowait=True)
            stay_cancelled()
            slow = f"no connection within {connection.socket_connect_timeout:g} s"
            reason = slow if isinstance(error, TimeoutError) and not str(error) else reason_of(error)
            raise BackendError(f"cannot connect: {reason}") from error
        except asyncio.CancelledError:
            await connection.disconnect(nowait=True)
            raise
        return Connection.take_over(connection, on_lost)


def _redis_scheme(url: str) -> str:
    scheme, _, rest = url.partition("://")
    scheme = "unix" if scheme.endswith("unix") else scheme.replace("valkey", "redis")
    return f"{scheme}://{rest}"
