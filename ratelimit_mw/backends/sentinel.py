"""Connections to whichever server the sentinels call the primary of a service."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from ratelimit_mw.backends.connection import Client, Connection, ServerConnector
from ratelimit_mw.backends.first import first_answer
from ratelimit_mw.backends.hosts import Address, read_hosts
from ratelimit_mw.charge import BackendError

SENTINEL_PORT = 26_379


class SentinelConnector:
    """Asks the sentinels for the primary each time that a connection is opened.

    A connection that ends, or on which a server says that it takes no writes, is opened anew: so it
    follows every fail-over.
    """

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self._hosts = read_hosts(url, SENTINEL_PORT, options)
        self._timeout = timeout
        self._options = options
        self._service, *database = self._hosts.path
        self._database = "".join(database)

    async def connect(self, on_lost: Callable[[BackendError], None]) -> Connection:
        """A new connection to the primary; raises `BackendError` where there is none to be had."""
        return await (await self._primary()).connect(on_lost)

    def client(self) -> Client:
        """A client for single commands to the primary of the moment."""
        return Client(self._primary)

    async def _primary(self) -> ServerConnector:
        # In any order: the first may be cut off from the others and know of no fail-over.
        sentinels = random.sample(self._hosts.hosts, len(self._hosts.hosts))
        try:
            primary = await first_answer([partial(self._ask, each) for each in sentinels], self._timeout)
        except BackendError as error:
            raise BackendError(f"no sentinel names the primary of '{self._service}': {error}") from error
        return self._connector(self._hosts.url_of(primary, self._database))

    async def _ask(self, sentinel: Address) -> Address:
        client = self._connector(self._hosts.sentinel_url_of(sentinel)).client()
        try:
            answer = await client.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
            if answer is None:
                raise BackendError(f"{sentinel.host}:{sentinel.port} knows no such service")
            async with client.reading():
                host, port = answer
                return Address(host.decode(), int(port))
        finally:
            await client.close()

    def _connector(self, url: str) -> ServerConnector:
        return ServerConnector(url, timeout=self._timeout, options=self._options)
