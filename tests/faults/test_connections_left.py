"""No connection is left open, whatever is cancelled while it is opened or closed."""

import asyncio
import gc
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.connecting.connector import ServerConnector
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from tests.support.processes import HOST
from tests.support.servers import StoreServer
from tests.support.topologies import SERVICE, Cluster, SentinelServer

pytestmark = pytest.mark.rerun

TIMEOUT = 5.0


def left_open(*works: Callable[[], Coroutine[Any, Any, object]]) -> list[str]:
    """Run coroutines, each in an event loop of its own; what they have left open when these have ended."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for work in works:
            asyncio.run(work())
        gc.collect()
    return [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)]


async def turns(number: int) -> None:
    """Let the event loop go round so many times."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_close_that_is_cancelled_has_closed(server: StoreServer, number: int) -> None:
    """A client's connection is closed at once: to cancel the wait for it leaves nothing open."""

    async def work() -> None:
        client = ServerConnector(server.url, timeout=TIMEOUT).client()
        await client.execute("PING")
        closing = asyncio.create_task(client.close())
        await turns(number)
        closing.cancel()

    assert left_open(work) == []


@pytest.mark.parametrize("number", range(1, 9))
def test_a_connection_that_is_opened_meanwhile_is_closed(server: StoreServer, number: int) -> None:
    """A client closes after a failure what another command is just opening, too."""

    async def work() -> None:
        client = ServerConnector(server.url, timeout=TIMEOUT).client()
        other = asyncio.create_task(client.execute("PING"))
        await turns(number)
        await client.close()
        with suppress(BackendError):
            await other

    assert left_open(work) == []


def test_a_look_at_the_slots_ends_with_the_backend(cluster: Cluster) -> None:
    """A cluster's backend that is closed while it asks who serves what leaves no connection to a node."""

    async def closed_after(number: int) -> None:
        backend = ClusterBackend(cluster.url, timeout=TIMEOUT)
        opening = asyncio.create_task(backend.open())
        await turns(number)
        await backend.close()
        opening.cancel()

    assert left_open(*[partial(closed_after, number) for number in range(40)]) == []


def test_a_talk_with_a_sentinel_ends_with_the_backend(redis_server: StoreServer, tmp_path: Path) -> None:
    """A backend that is closed while it finds or watches its primary leaves no connection to a sentinel."""
    sentinel = SentinelServer("redis", tmp_path, redis_server)

    async def closed_after(number: int) -> None:
        backend = RedisBackend(f"redis+sentinel://{HOST}:{sentinel.port}/{SERVICE}", timeout=TIMEOUT)
        opening = asyncio.create_task(backend.open())
        await turns(number)
        await backend.close()
        opening.cancel()

    sentinel.start()
    try:
        assert left_open(*[partial(closed_after, 2 * number) for number in range(60)]) == []
    finally:
        sentinel.kill()


async def test_a_sentinel_is_left_though_a_cancellation_is_lost(
    redis_server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listening ends where redis-py makes an error of a cancellation that comes at the wrong moment."""
    before = asyncio.all_tasks()
    sentinel = SentinelServer("redis", tmp_path, redis_server)
    connect: Any = Connection.connect
    connecting = 0

    async def connect_slowly(self: Connection) -> None:
        nonlocal connecting
        if sentinel.alive:
            await connect(self)
            return
        connecting += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise RedisConnectionError("the cancellation is lost") from None

    sentinel.start()
    try:
        backend = RedisBackend(f"redis+sentinel://{HOST}:{sentinel.port}/{SERVICE}", timeout=TIMEOUT)
        await backend.open()
        monkeypatch.setattr(Connection, "connect", connect_slowly)
    finally:
        sentinel.kill()
    async with asyncio.timeout(60):
        while connecting < 2:  # who asks for the primary, and who listens
            await asyncio.sleep(0.05)
        await backend.close()
        while asyncio.all_tasks() != before:
            await asyncio.sleep(0.05)
