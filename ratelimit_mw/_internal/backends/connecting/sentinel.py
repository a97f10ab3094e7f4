"""Connections to whichever server the sentinels call the primary of a service."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple

from ratelimit_mw._internal.backends.connecting.client import Client
from ratelimit_mw._internal.backends.connecting.connection import Connection, stay_cancelled
from ratelimit_mw._internal.backends.connecting.connector import ServerConnector
from ratelimit_mw._internal.backends.connecting.errors import ReplyError, ServerMovedError
from ratelimit_mw._internal.backends.connecting.hosts import Address, read_hosts
from ratelimit_mw._internal.model.backend import BackendError

SENTINEL_PORT = 26_379
CHECK_EVERY = 2.0
"""Seconds between two questions who the primary is, spread by a half, where no sentinel announces another."""
FORGET_AFTER = 30.0
"""Seconds for which the latest primary counts that any sentinel has named, whatever most of them say."""
EVENTS = ("+switch-master", "+promoted-slave")
"""Channels on which a sentinel announces a new primary; the leader of a fail-over uses the second first."""


class NamedPrimary(NamedTuple):
    """A primary, as a sentinel names it."""

    address: Address
    epoch: int
    """Grows with every fail-over; 0 where the sentinels' user may not read it."""


class SentinelConnector:
    """Asks the sentinels for the primary each time that a connection is opened, and as long as it is open.

    A connection ends with `ServerMovedError` as soon as they name another primary: the old one takes writes
    for up to ten seconds longer, and all of those are lost.
    """

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self._hosts = read_hosts(url, SENTINEL_PORT, options)
        self._timeout = timeout
        self._options = options
        self._service, *database = self._hosts.path
        self._database = "".join(database)
        self._latest: NamedPrimary | None = None
        self._named_at = 0.0
        self._tells_epoch = True

    async def connect(self, on_lost: Callable[[BackendError], None]) -> Connection:
        """A new connection to the primary; raises `BackendError` where there is none to be had."""
        primary = await self._primary()
        connection = await self._server(primary).connect(on_lost)
        connection.watch(self._wait_for_another(primary))
        return connection

    def client(self) -> Client:
        """A client for single commands to the primary of the moment."""

        async def server_of_primary() -> ServerConnector:
            return self._server(await self._primary())

        return Client(server_of_primary, find_every=CHECK_EVERY)

    async def _primary(self) -> NamedPrimary:
        clients = self._sentinels()
        try:
            return self._latest_of(await self._ask_all(clients, enough=len(clients) // 2 + 1))
        finally:
            await _close(clients)

    async def _wait_for_another(self, primary: NamedPrimary) -> ServerMovedError:
        """Return once the sentinels name another primary."""
        news = asyncio.Event()
        clients = self._sentinels()
        listeners = [asyncio.create_task(self._listen(client, news)) for client in self._sentinels()]
        try:
            while True:
                with suppress(BackendError):
                    named = self._latest_of(await self._ask_all(clients, enough=len(clients)))
                    if named.address != primary.address:
                        host, port = named.address
                        return ServerMovedError(
                            f"the sentinels name {host}:{port} as the primary of '{self._service}'"
                        )
                with suppress(TimeoutError):
                    wait = CHECK_EVERY * random.uniform(0.5, 1.0)  # noqa: S311 - spreads the workers
                    # Not by `wait_for`, which loses a cancellation that comes with the news on Python 3.11.
                    async with asyncio.timeout(wait):
                        await news.wait()
                news.clear()
        finally:
            for listener in listeners:
                listener.cancel()
            try:
                await asyncio.gather(*listeners, return_exceptions=True)
            finally:
                await _close(clients)

    async def _listen(self, client: Client, news: asyncio.Event) -> None:
        """Set `news` whenever a sentinel announces something; end where its user may not subscribe."""
        while True:
            try:
                await client.listen(EVENTS, news.set)
            except ReplyError:
                return
            except BackendError:
                stay_cancelled()
                await asyncio.sleep(CHECK_EVERY)

    async def _ask_all(self, clients: Sequence[Client], *, enough: int) -> list[NamedPrimary]:
        """Answers of the sentinels, of `enough` of them at least where so many answer."""
        questions = [asyncio.create_task(self._ask(client)) for client in clients]
        found: list[NamedPrimary] = []
        error: BackendError | None = None
        try:
            for answer in asyncio.as_completed(questions):
                try:
                    found.append(await answer)
                except BackendError as failure:
                    error = failure
                if len(found) == enough:
                    break
        finally:
            for question in questions:
                question.cancel()
            await asyncio.gather(*questions, return_exceptions=True)
        if not found:
            raise BackendError(f"no sentinel names the primary of '{self._service}': {error}")
        return found

    def _latest_of(self, found: list[NamedPrimary]) -> NamedPrimary:
        """The primary of the latest fail-over: a sentinel that was cut off from others names an older one.

        It is not taken back by sentinels that have not heard of it yet: by all together, or by most of them
        once none has named it for a while, as it may have been monitored anew.
        """
        now, number = time.monotonic(), len(self._hosts.hosts)
        is_old = 2 * len(found) > number and now > self._named_at + FORGET_AFTER
        known = [] if self._latest is None or is_old or len(found) == number else [self._latest]
        votes = Counter([*found, *known])
        self._latest = max(votes, key=lambda named: (named.epoch, votes[named]))
        if self._latest in found:
            self._named_at = now
        return self._latest

    async def _ask(self, client: Client) -> NamedPrimary:
        answer = await client.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        if answer is None:
            raise BackendError(f"a sentinel does not know the service '{self._service}'")
        async with client.reading():
            host, port = answer
            address = Address(host.decode(), int(port))
        return NamedPrimary(address, await self._epoch(client))

    async def _epoch(self, client: Client) -> int:
        if self._tells_epoch:
            try:
                fields = await client.execute("SENTINEL", "MASTER", self._service)
                async with client.reading():
                    return int(fields[fields.index(b"config-epoch") + 1])
            except ReplyError:
                self._tells_epoch = False
        return 0

    def _sentinels(self) -> list[Client]:
        urls = [self._hosts.sentinel_url_of(sentinel) for sentinel in self._hosts.hosts]
        return [self._connector(url).client() for url in urls]

    def _server(self, primary: NamedPrimary) -> ServerConnector:
        return self._connector(self._hosts.url_of(primary.address, self._database))

    def _connector(self, url: str) -> ServerConnector:
        return ServerConnector(url, timeout=self._timeout, options=self._options)


async def _close(clients: Sequence[Client]) -> None:
    """Close all of them, also where this is cancelled."""
    async with AsyncExitStack() as stack:
        for client in clients:
            stack.push_async_callback(client.close)
