"""An idle worker has one connection: live keys and reports go over the one that requests wait for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ratelimit_mw import KeyEntry, Limiter, Settings
from ratelimit_mw._internal.backends.connecting import client
from ratelimit_mw._internal.backends.connecting.connection import Connection, OnReply
from ratelimit_mw._internal.observe import reporting
from tests.conftest import StartServer
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.slots import until_async
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

HASHES = [f"sha256:{number:064x}" for number in range(300)]
PRO = KeyEntry("pro")


def settings_of(url: str, timeout: float = 5) -> Settings:
    """Settings whose requests may wait long, as the machine may be busy."""
    plans = {"pro": {"requests": ["1000/minute"]}}
    return Settings.model_validate({"backend": {"url": url, "timeout": timeout}, "plans": plans})


@asynccontextmanager
async def worker(url: str, timeout: float = 5) -> AsyncIterator[Limiter]:
    """A worker that has begun to watch and to report, and has decided once."""
    async with Limiter(settings_of(url, timeout)) as limiter:
        await (await limiter.acquire(api_key="a")).release()
        yield limiter


def connections(server: StoreServer) -> set[str]:
    """The limiters' connections to a server."""
    with server.client() as looking:
        return {each["id"] for each in looking.client_list() if each["name"] == "ratelimit_mw"}


def calls(server: StoreServer, command: str) -> int:
    """Calls of a command since the server started."""
    with server.client() as looking:
        return int(looking.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


async def test_one_connection_carries_decisions_keys_and_reports(
    kind: str, start_server: StartServer
) -> None:
    """A worker that polls the live keys and reports has one connection; each of the scripts is sent once."""
    server = start_server(kind)
    async with worker(server.url) as limiter:
        before = calls(server, "get"), calls(server, "evalsha")
        await until_async(lambda: calls(server, "get") >= before[0] + 3)
        await until_async(lambda: calls(server, "evalsha") >= before[1] + 1)
        assert len(connections(server)) == 1
        assert calls(server, "eval") <= 2  # of the scripts that decide and that report
        assert limiter.engine.reporter.lost == 0


async def test_an_idle_worker_looks_and_reports_in_one_write(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a worker without requests is sent together with its look at the live keys."""
    sent, send = list[bytes](), Connection.send

    def note(connection: Connection, commands: bytes, *on_replies: OnReply) -> None:
        sent.append(commands)
        send(connection, commands, *on_replies)

    def is_joint(commands: bytes) -> bool:
        return b"{keys}:version" in commands and b"{fleet}:workers" in commands

    monkeypatch.setattr(reporting, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(Connection, "send", note)
    async with Limiter(settings_of(server.url)) as limiter:
        limiter.engine.reporter.is_serving = True
        # A timer that the machine has late may miss a turn now and then.
        await until_async(lambda: len([each for each in sent if is_joint(each)]) >= 3)


async def test_one_connection_to_each_node_of_a_cluster(cluster: Cluster) -> None:
    """On a cluster, polls and reports go over the connections to the nodes that have their keys."""
    async with worker(cluster.url) as limiter:
        await limiter.engine.live.set_keys({HASHES[0]: PRO})
        await until_async(lambda: sum(calls(node, "evalsha") for node in cluster.nodes) >= 2)
        await until_async(lambda: all(len(connections(node)) <= 2 for node in cluster.nodes))
        await until_async(lambda: sum(len(connections(node)) for node in cluster.nodes) == len(cluster.nodes))


async def test_a_changed_key_is_read_without_another_connection(
    kind: str, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change is written over a connection that is closed again, and read over the shared one."""
    monkeypatch.setattr(client, "IDLE_SECONDS", 0.2)
    server = start_server(kind)
    async with worker(server.url) as one, worker(server.url) as other:
        await one.engine.live.set_keys(dict.fromkeys(HASHES, PRO))
        await until_async(lambda: len(other.engine.live.keys) == len(HASHES))
        await one.engine.live.set_keys({HASHES[0]: None})
        await until_async(lambda: len(other.engine.live.keys) == len(HASHES) - 1)
        await until_async(lambda: len(connections(server)) == 2)


async def test_what_is_lost_beside_requests_is_no_outage(
    server: StoreServer,
) -> None:
    """Polls without an answer say nothing of the server, and go over another connection afterwards."""
    async with Proxy(server.port) as proxy, worker(proxy.url, timeout=1) as limiter:
        proxy.fault = "blackhole"
        made = len(proxy.accepted)
        await until_async(lambda: len(proxy.accepted) > made)
        assert limiter.stats().backend_up
        proxy.fault = "none"
        await limiter.engine.live.set_keys({HASHES[0]: PRO})
        assert limiter.engine.live.keys == {HASHES[0]: PRO}


async def test_a_connection_that_ends_answers_who_waits(server: StoreServer) -> None:
    """A reader is told at once that the shared connection has ended before its answer."""
    async with Proxy(server.port) as proxy, worker(proxy.url) as limiter:
        proxy.fault = "blackhole"
        read = asyncio.create_task(limiter.engine.live.read_keys())
        await asyncio.sleep(0.05)
        proxy.fault = "none"
        proxy.reset()
        async with asyncio.timeout(4):  # a command may take five seconds
            await asyncio.wait([read])
        read.exception()
        await (await limiter.acquire(api_key="a")).release()
        assert limiter.stats().backend_up


async def test_waiting_polls_are_cancelled_with_the_worker(server: StoreServer) -> None:
    """A worker closes although its poll has no answer, and leaves no connection."""
    async with Proxy(server.port) as proxy:
        async with worker(proxy.url):
            proxy.fault = "blackhole"
            await asyncio.sleep(1)
        proxy.fault = "none"
        await until_async(lambda: not connections(server))
