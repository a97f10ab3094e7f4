"""Connections that take longer than an answer may, and servers on which not every command can be given."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from ratelimit_mw._internal.backends import open_figures_store, open_key_store
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.conftest import StartServer
from tests.support.certificates import Certificates
from tests.support.conformance import eventually, new_id, window
from tests.support.processes import HOST
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.topologies import SERVICE, Cluster, SentinelServer, running

pytestmark = pytest.mark.rerun

TIMEOUT = 0.2
HANDSHAKE = 0.5
"""Seconds that the first answer on each connection takes: more than `TIMEOUT`, less than connecting may."""


@asynccontextmanager
async def slow_redis(folder: Path) -> AsyncIterator[str]:
    """The URL of a server whose connections begin slowly."""
    async with AsyncExitStack() as stack:
        server = StoreServer("redis", folder)
        stack.callback(server.kill)
        server.start()
        yield (await slow(stack, server)).url


@asynccontextmanager
async def slow_sentinel(folder: Path) -> AsyncIterator[str]:
    """Run a sentinel and the primary that it names, both slow; yield their URL."""
    async with AsyncExitStack() as stack:
        primary = StoreServer("redis", folder / "primary")
        sentinel = SentinelServer("redis", folder / "sentinel", primary)
        for server in (primary, sentinel):
            stack.callback(server.kill)
            server.start()
        before_primary, before_sentinel = await slow(stack, primary), await slow(stack, sentinel)
        with sentinel.client() as client:
            client.sentinel_remove(SERVICE)
            client.sentinel_monitor(SERVICE, HOST, before_primary.port, 1)
        yield f"redis+sentinel://{HOST}:{before_sentinel.port}/{SERVICE}"


@asynccontextmanager
async def slow_cluster(folder: Path) -> AsyncIterator[str]:
    """Run a cluster of slow nodes; yield its URL."""
    cluster = Cluster("redis", folder)
    async with AsyncExitStack() as stack:
        proxies = [await slow(stack, node) for node in cluster.nodes]
        for node, proxy in zip(cluster.nodes, proxies, strict=True):
            node.arguments += ("--cluster-announce-port", str(proxy.port))
            node.arguments += ("--cluster-announce-bus-port", str(node.port + 10_000))
        stack.enter_context(running(cluster))
        yield f"redis+cluster://{HOST}:{proxies[0].port}"


async def slow(stack: AsyncExitStack, server: StoreServer) -> Proxy:
    """A proxy before a server, on which connections begin slowly."""
    proxy = await stack.enter_async_context(Proxy(server.port))
    proxy.first_delay = HANDSHAKE
    return proxy


async def succeeds(call: Callable[[], Awaitable[object]]) -> bool:
    """Whether the backend answers a call."""
    try:
        await call()
    except BackendError:
        return False
    return True


@pytest.mark.parametrize("topology", [slow_redis, slow_sentinel, slow_cluster])
async def test_connecting_may_take_longer_than_an_answer(
    topology: Callable[[Path], AbstractAsyncContextManager[str]], tmp_path: Path
) -> None:
    """The time-out is that of answers; a connection has a second to begin, wherever one is opened."""
    async with topology(tmp_path) as url:
        backend = (ClusterBackend if "cluster" in url else RedisBackend)(url, timeout=TIMEOUT)
        settings = BackendSettings(url=SecretURL(url), timeout=TIMEOUT)
        keys = open_key_store(settings, timeout=TIMEOUT)
        figures = open_figures_store(settings, timeout=TIMEOUT)
        charge = Charge([window(99_999)])
        await eventually(lambda: succeeds(lambda: backend.acquire(charge, new_id())))
        await eventually(lambda: succeeds(keys.version))
        await eventually(lambda: succeeds(figures.now))
        for each in (backend, keys, figures):
            await each.close()


async def test_a_slow_tls_handshake_is_waited_for(redis_server: StoreServer, tmp_path: Path) -> None:
    """Two exchanges until all is encrypted may take longer together than an answer."""
    certificates = Certificates(tmp_path)
    context = certificates.server()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with Proxy(redis_server.port, tls=context) as inner, Proxy(inner.port) as outer:
        outer.delay = 0.6 * TIMEOUT
        url = outer.url.replace("redis:", "rediss:")
        backend = RedisBackend(url, timeout=TIMEOUT, options={"ssl_ca_certs": certificates.ca_file})
        await eventually(lambda: succeeds(lambda: backend.acquire(Charge([window(99)]), new_id())))
        await backend.close()


@pytest.mark.parametrize("name", ["", "renamed"])
async def test_a_server_without_the_command_client_is_served(
    kind: str, start_server: StartServer, name: str
) -> None:
    """Hosts of Redis rename or forbid `CLIENT`: the connection has no name then, and works."""
    server = start_server(kind, "--rename-command", "CLIENT", name or '""')
    backend = RedisBackend(server.url, timeout=5)
    settings = BackendSettings(url=SecretURL(server.url), timeout=5)
    keys, figures = open_key_store(settings), open_figures_store(settings)
    assert (await backend.acquire(Charge([window(9)]), new_id())).admitted
    assert await keys.version() is None
    assert await figures.now() > 0
    for each in (backend, keys, figures):
        await each.close()


async def test_a_user_without_the_right_to_client_is_served(kind: str, start_server: StartServer) -> None:
    """A user that may not give `CLIENT` is served."""
    server = start_server(kind)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "limiter", "on", ">secret", "~*", "+@all", "-client")
    backend = RedisBackend(server.url.replace("//", "//limiter:secret@"), timeout=5)
    assert (await backend.acquire(Charge([window(9)]), new_id())).admitted
    await backend.close()


async def test_a_connection_has_a_name_where_it_may(kind: str, start_server: StartServer) -> None:
    """A connection has the limiter's name in the server's list of clients, if the user may give it one."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=5)
    await backend.open()
    await eventually(lambda: succeeds(lambda: backend.acquire(Charge([window(9)]), new_id())))
    with server.client() as client:
        assert "ratelimit_mw" in {each["name"] for each in client.client_list()}
    await backend.close()


async def test_no_connection_needs_what_python_deprecates(
    redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suites that take warnings for errors reach a server on each Python: 3.14 deprecates this function."""

    def deprecated(_: object) -> bool:
        raise DeprecationWarning("asyncio.iscoroutinefunction is deprecated")

    monkeypatch.setattr("asyncio.iscoroutinefunction", deprecated)
    backend = RedisBackend(redis_server.url)
    assert (await backend.acquire(Charge([window(1)]), new_id())).admitted
    store = open_key_store(BackendSettings(url=SecretURL(redis_server.url)))
    await store.write({"a": b"entry"})
    assert await store.entries() == {"a": b"entry"}
    await store.close()
    await backend.close()
