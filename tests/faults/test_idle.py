"""Connections that end while nothing is asked over them: opened anew without a word."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from ratelimit_mw._internal.backends import open_figures_store, open_key_store
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.conftest import StartServer
from tests.support.conformance import eventually, new_id, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.slots import until_async
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

CHARGE = Charge([window(99_999)])


@asynccontextmanager
async def opened(url: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[RedisBackend | ClusterBackend]:
    """A connected backend; at the end nothing may have been said of it."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    backend = (ClusterBackend if "cluster" in url else RedisBackend)(url, timeout=5)
    await backend.open()
    assert (await backend.acquire(CHARGE, new_id())).admitted
    caplog.clear()
    yield backend
    await backend.close()
    assert caplog.records == []


def connections(server: StoreServer) -> set[str]:
    """The limiter's connections to a server."""
    with server.client() as client:
        return {each["id"] for each in client.client_list() if each["name"] == "ratelimit_mw"}


async def test_the_time_out_of_a_server_for_idle_clients(
    kind: str, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that closes connections nobody uses is not away: the next request is served."""
    server = start_server(kind, "--timeout", "1")
    async with opened(server.url, caplog) as backend:
        for _ in range(2):
            (before,) = connections(server)
            await until_async(partial(_has_another, server, before))
            assert (await backend.acquire(CHARGE, new_id())).admitted
        assert backend.error is None


async def test_connections_that_are_killed_by_hand(
    kind: str, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """`CLIENT KILL` while nothing is under way costs no request, however often it comes."""
    server = start_server(kind)
    async with opened(server.url, caplog) as backend:
        with server.client() as client:
            for _ in range(10):
                client.client_kill_filter(_type="normal", skipme=True)
                await until_async(lambda: connections(server))
                assert (await backend.acquire(CHARGE, new_id())).admitted


@pytest.mark.parametrize("end", ["closed", "reset"])
async def test_proxies_that_drop_idle_connections(
    server: StoreServer, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Closed or reset on the way, a connection that nobody waits on is opened anew at once."""
    async with Proxy(server.port) as proxy, opened(proxy.url, caplog) as backend:
        for _ in range(5):
            made = len(proxy.accepted)
            if end == "reset":
                proxy.reset()
            else:
                proxy.close()
            await until_async(partial(_has_more, proxy, made))
            assert (await backend.acquire(CHARGE, new_id())).admitted


async def test_idle_connections_to_the_nodes_of_a_cluster(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """An idle connection to any node of a cluster that ends is opened anew without a word."""
    async with opened(cluster.url, caplog) as backend:
        for _ in range(3):
            for node in cluster.nodes:
                with node.client() as client:
                    client.client_kill_filter(_type="normal", skipme=True)
            await until_async(lambda: all(connections(node) for node in cluster.nodes))
            await asyncio.sleep(0.1)
            assert (await backend.acquire(CHARGE, new_id())).admitted


async def test_stores_beside_the_counts_reconnect(kind: str, start_server: StartServer) -> None:
    """Live keys and figures are read over connections that servers close, too."""
    server = start_server(kind)
    settings = BackendSettings(url=SecretURL(server.url), timeout=5)
    keys, figures = open_key_store(settings), open_figures_store(settings)
    for _ in range(3):
        await keys.version()
        await figures.leave("w")
        with server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.1)
    await keys.close()
    await figures.close()


@pytest.mark.parametrize("end", ["killed", "refusing"])
async def test_a_server_that_is_gone_is_noticed_without_a_request(
    kind: str, start_server: StartServer, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes no new connection is away, and the log says so, without a request."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    server = start_server(kind)
    async with Proxy(server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=1)
        await backend.open()
        caplog.clear()
        if end == "killed":
            server.kill()
        else:
            proxy.refuse()
        await until_async(lambda: backend.error is not None)
        with pytest.raises(BackendError):
            await backend.acquire(CHARGE, new_id())
        if end == "killed":
            server.restart()
        proxy.fault = "none"
        await eventually(lambda: _is_there(backend))
        assert [each.message[:16] for each in caplog.records] == ["backend is away:", "backend is back"]
        await backend.close()


async def test_a_connection_that_never_lasts_is_not_opened_all_the_time(server: StoreServer) -> None:
    """Attempts grow rare, as for a server that is away, if every connection ends as soon as it is made."""
    async with Proxy(server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=5)
        await backend.open()
        made = len(proxy.accepted)
        end = asyncio.get_running_loop().time() + 2
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
            proxy.reset()
        assert 2 <= len(proxy.accepted) - made < 25
        await backend.close()


def _has_another(server: StoreServer, before: str) -> bool:
    return bool(connections(server) - {before})


def _has_more(proxy: Proxy, made: int) -> bool:
    return len(proxy.accepted) > made


async def _is_there(backend: RedisBackend) -> bool:
    return backend.error is None
