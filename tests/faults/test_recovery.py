"""A server that is back, or elsewhere: found by each process on its own, without a stampede."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from tests.conftest import StartServer
from tests.support.conformance import eventually, new_id, window
from tests.support.processes import HOST
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

CHARGE = Charge([window(99_999, 1, "hour")])
PROCESSES = 20
ATTEMPTS_A_SECOND = 4
"""The most that a process makes to reach a server that stays away: half a second apart, spread by a half."""


async def serves(backend: RedisBackend) -> bool:
    """Whether a charge is decided by the server."""
    try:
        return (await backend.acquire(CHARGE, new_id())).admitted
    except BackendError:
        return False


async def test_many_processes_come_back_without_a_stampede(redis_server: StoreServer) -> None:
    """However many requests come, a server that is away sees a few attempts a second, spread in time.

    When it is back it sees one connection of each process, and each request once.
    """
    async with Proxy(redis_server.port) as proxy:
        backends = [RedisBackend(proxy.url, timeout=0.5) for _ in range(PROCESSES)]
        for backend in backends:
            await backend.open()
        await eventually(lambda: all_serve(backends))
        proxy.refuse()
        await eventually(lambda: none_serves(backends))
        await asyncio.sleep(1.5)  # the first attempts come sooner after one another
        proxy.accepted.clear()
        began, asked = time.monotonic(), 0
        while time.monotonic() < began + 2:
            for backend in backends:
                assert not await serves(backend)
                asked += 1
            await asyncio.sleep(0.01)
        lasted = time.monotonic() - began
        assert asked > len(proxy.accepted)
        assert len(proxy.accepted) <= PROCESSES * (ATTEMPTS_A_SECOND * lasted + 1)
        proxy.accepted.clear()
        with redis_server.client() as client:
            client.config_resetstat()
            proxy.fault = "none"
            await eventually(lambda: all_are_there(backends))
            assert max(proxy.accepted) - min(proxy.accepted) > 0.05, "they don't come in step"
            assert len(proxy.accepted) <= 2 * PROCESSES
            probes = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            assert probes <= 2 * PROCESSES
        for backend in backends:
            await backend.close()


async def all_serve(backends: list[RedisBackend]) -> bool:
    """Whether all of them have a server."""
    return all([await serves(backend) for backend in backends])


async def none_serves(backends: list[RedisBackend]) -> bool:
    """Whether none of them has."""
    return not any([await serves(backend) for backend in backends])


async def all_are_there(backends: list[RedisBackend]) -> bool:
    """Whether none of them takes its server for away."""
    return all(backend.error is None for backend in backends)


class Elsewhere(StoreServer):
    """A server on the same port of another address of this machine."""

    host = "127.0.0.2"

    @property
    def url(self) -> str:
        """Its address as the settings write it."""
        return super().url.replace(HOST, self.host)

    def command(self) -> list[str]:
        """Serve the other address."""
        return [*super().command(), "--bind", self.host]


class Names:
    """Resolver of host names: the system's, with a name of the test's own."""

    name = "limits.test"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = HOST
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: Any, *arguments: Any, **options: Any) -> Any:
        """Resolve."""
        return self._resolve(self.address if host == self.name else host, *arguments, **options)


@pytest.fixture
def elsewhere(start_server: StartServer, tmp_path: Path) -> Iterator[tuple[StoreServer, Elsewhere]]:
    """A server, and another one to move to."""
    here = start_server("redis")
    there = Elsewhere("redis", tmp_path / "there")
    there.port = here.port
    try:
        there.start()
        assert there.port == here.port
        yield here, there
    finally:
        there.stop()


@pytest.mark.parametrize("end", ["killed", "demoted"])
async def test_a_name_that_leads_elsewhere_is_followed(
    elsewhere: tuple[StoreServer, Elsewhere], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A managed fail-over moves the name: it is looked up when the old server ends or takes no writes."""
    here, there = elsewhere
    names = Names(monkeypatch)
    backend = RedisBackend(here.url.replace(HOST, names.name), timeout=2)
    assert await serves(backend)
    with here.client() as client:
        assert client.exists("ratelimit:{caller}:w:p:3600")
        if end == "demoted":
            client.replicaof(HOST, "1")
    if end == "killed":
        here.kill()
    assert not await serves(backend)
    names.address = there.host
    assert await eventually(lambda: serves(backend)) < 3
    with there.client() as client:
        assert client.exists("ratelimit:{caller}:w:p:3600")
    await backend.close()
