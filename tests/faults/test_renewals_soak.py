"""Many live slots in one process, for a while: none is lost, there is no outage, and requests don't wait.

SOAK_SLOTS and RENEWALS_SECONDS say how many and how long; SOAK_TIMEOUT the settings' `timeout`.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ratelimit_mw import Lease, Limiter
from tests.conftest import StartApp, StartServer
from tests.support.asgi import settings_of
from tests.support.conformance import Waits
from tests.support.slots import Client, held, until_async
from tests.support.statuses import counted
from tests.support.topologies import Cluster

SLOTS = int(os.environ.get("SOAK_SLOTS", "12000"))
SECONDS = float(os.environ.get("RENEWALS_SECONDS", "8"))
TIMEOUT = float(os.environ.get("SOAK_TIMEOUT", "2"))
"""Seconds that a request may wait: more than a busy machine lets this process sleep."""
LEASE = 6
CALLERS = 300
STREAMS = 300
SETTINGS = """
[backend]
url = "{url}"
timeout = {timeout}
on_failure = "deny"
[plans.default]
requests = ["1000000/minute"]
concurrent = {{ limit = 100000, lease = {lease} }}
"""

pytestmark = [pytest.mark.slow, pytest.mark.rerun]


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_twelve_thousand_live_slots_are_kept(start_server: StartServer, kind: str) -> None:
    """They are renewed by operations of many, over several leases, while requests go on as before."""
    server = start_server(kind)
    settings = SETTINGS.format(url=server.url, timeout=TIMEOUT, lease=LEASE)
    async with Limiter(settings_of(settings)) as limiter:
        leases: list[Lease] = []
        for start in range(0, SLOTS, CALLERS):
            leases += await asyncio.gather(
                *[limiter.acquire(api_key=f"k{place % CALLERS}") for place in range(start, start + CALLERS)]
            )
        assert all(lease.allowed for lease in leases)
        before, waits, end = limiter.stats().load, Waits(), time.monotonic() + SECONDS
        asked = 0
        async with waits.measured():
            while time.monotonic() < end:
                async with waits.one():
                    lease = await limiter.acquire(api_key="k0")
                assert lease.allowed
                await lease.release()
                asked += 1
                await asyncio.sleep(0.01)
        stats = limiter.stats()
        renewals = stats.load.operations - before.operations - 2 * asked
        print(  # noqa: T201
            f"{kind}: {asked} requests beside {SLOTS} slots, the longest wait {waits.longest * 1000:.0f} ms "
            f"({waits.late * 1000:.0f} ms late in all); {renewals} operations for renewals"
        )
        assert (stats.slots_lost, stats.decisions_without_backend["deny"], stats.backend_up) == (0, 0, True)
        assert stats.load.failed == 0
        assert await asyncio.to_thread(held, server) == SLOTS
        rounds = SECONDS / (LEASE / 6)
        assert 0 < renewals <= rounds * (SLOTS / 128 + 2), "each operation renews many"
        for start in range(0, SLOTS, 1_000):
            await asyncio.gather(*[lease.release() for lease in leases[start : start + 1_000]])
        await until_async(lambda: limiter.stats().load.owed == 0)
        assert await asyncio.to_thread(held, server) == 0


@pytest.mark.parametrize("kind", ["memory", "redis cluster"])
async def test_many_live_slots_are_kept_elsewhere(
    kind: str, shared_cluster: Callable[[str], Cluster]
) -> None:
    """In memory, and on a cluster, where each caller's are renewed on the node that has them."""
    url = "memory://" if kind == "memory" else shared_cluster("redis").url
    slots = SLOTS if kind == "memory" else SLOTS // 5
    async with Limiter(settings_of(SETTINGS.format(url=url, timeout=TIMEOUT, lease=LEASE))) as limiter:
        leases: list[Lease] = []
        for start in range(0, slots, CALLERS):
            leases += await asyncio.gather(
                *[limiter.acquire(api_key=f"k{place % CALLERS}") for place in range(start, start + CALLERS)]
            )
        waits = Waits()
        async with waits.measured():
            await asyncio.sleep(SECONDS)
        stats = limiter.stats()
        print(f"{kind}: {slots} slots; {waits.late * 1000:.0f} ms late in all")  # noqa: T201
        assert (stats.slots_lost, stats.decisions_without_backend["deny"], stats.backend_up) == (0, 0, True)
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k7"), "GET", "/")
        assert counted((await limiter.engine.peek(policy)).limits[-1]) == slots / CALLERS
        for start in range(0, slots, 1_000):
            await asyncio.gather(*[lease.release() for lease in leases[start : start + 1_000]])
        await until_async(lambda: limiter.stats().load.owed == 0)
        assert counted((await limiter.engine.peek(policy)).limits[-1]) == 0


async def test_streams_over_http_keep_their_slots(
    start_server: StartServer, start_app: StartApp, tmp_path: Path
) -> None:
    """Hundreds of streams of one worker hold their slots over several leases, and free them as they end."""
    server = start_server("redis")
    path = tmp_path / "ratelimit.toml"
    path.write_text(SETTINGS.format(url=server.url, timeout=TIMEOUT, lease=2))
    environment = {"RATELIMIT_SETTINGS": str(path), "LEDGER": str(tmp_path / "ledger")}
    (tmp_path / "ledger").touch()
    app = start_app("tests.support.slot_app:app", environment=environment)
    clients = [await Client.connect(app.port) for _ in range(STREAMS)]
    for client in clients:
        client.send("GET", "/stream?number=100000&size=10&pause=1")
    assert {(await client.head())[0] for client in clients} == {200}
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        assert await asyncio.to_thread(held, server) == STREAMS
        await asyncio.sleep(0.1)
    assert "slot lost" not in app._log.read_text(errors="replace")
    Client.close_all()
    await until_async(lambda: held(server) == 0)
