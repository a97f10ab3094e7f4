"""What a limiter tells of itself, to Python and to Prometheus."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ratelimit_mw import Lease, Limiter
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw.prometheus import LimiterCollector
from tests.conftest import StartServer
from tests.support.asgi import Down, FakeClock, limiter_of, settings_of

SETTINGS = """
[plans.default]
requests = ["2/minute"]
concurrent = { limit = 1, lease = 5 }
spending = { daily = "1.00" }
[[routes]]
path = "/priced"
price = "0.10"
slot = false
[[routes]]
path = "/shadowed"
shadow = true
slot = false
"""


async def enter(limiter: Limiter, path: str = "/") -> Lease:
    """Ask for one request of the key `a`."""
    return await limiter.acquire(api_key="a", path=path)


def scraped(limiter: Limiter) -> str:
    """What Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(LimiterCollector(limiter))
    return generate_latest(registry).decode()


async def test_decisions_are_counted_by_plan_and_outcome() -> None:
    """Admitted, refused by its reason, and what shadow mode let through, each once."""
    limiter = limiter_of(SETTINGS, FakeClock())
    held = await enter(limiter)
    assert not (await enter(limiter)).allowed  # the slot is taken
    assert limiter.stats().leases == 1
    await held.release()
    async with await enter(limiter, "/priced") as lease:
        await lease.settle("0.05")
        await lease.settle("0.07")
    assert not (await enter(limiter)).allowed  # the window is full
    assert (await enter(limiter, "/shadowed")).allowed
    stats = limiter.stats()
    assert stats.decisions == {
        ("default", "admitted"): 2,
        ("default", "concurrency"): 1,
        ("default", "rate"): 1,
        ("default", "shadow"): 1,
    }
    assert (stats.leases, stats.settles_ignored, stats.slots_lost) == (0, 1, 0)


async def test_prometheus_reads_the_same_figures() -> None:
    """Every metric is there under its name, with labels from the settings alone."""
    limiter = limiter_of(SETTINGS, FakeClock())
    await enter(limiter)
    text = scraped(limiter)
    assert 'ratelimit_decisions_total{limit="",outcome="admitted",plan="default",route=""} 1.0' in text
    assert "ratelimit_backend_up 1.0" in text
    assert "ratelimit_leases 1.0" in text
    assert f'ratelimit_settings{{version="{limiter.version}"}} 1.0' in text
    assert "sha256" not in text


async def test_decisions_without_the_backend_are_counted_apart() -> None:
    """What was decided while it was away shows under the policy that decided."""
    limiter = limiter_of(SETTINGS, FakeClock(), Down(clock=FakeClock()))
    await enter(limiter)
    assert limiter.stats().decisions_without_backend == {"local": 1, "allow": 0, "deny": 0}
    assert limiter.stats().unsynced > 0
    assert 'ratelimit_decisions_without_backend_total{policy="local"} 1.0' in scraped(limiter)
    await limiter.close()


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_settles_that_wait_show_until_they_are_written(kind: str, start_server: StartServer) -> None:
    """While the server hangs they are owed; when it is back there is none, and nothing was lost."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=1)
    async with Limiter(settings_of(SETTINGS), backend=backend) as limiter:
        lease = await enter(limiter, "/priced")
        assert limiter.stats().load.operations > 0
        server.stop_signal()
        await lease.settle("0.04")
        assert limiter.stats().load.owed == 1
        async with asyncio.timeout(10):
            while limiter.stats().backend_up:
                await asyncio.sleep(0.02)
        server.continue_signal()
        async with asyncio.timeout(10):
            while limiter.stats().load.owed:
                await asyncio.sleep(0.02)
        policy = limiter.policies.match(limiter.identity_of(api_key="a"), "GET", "/priced")
        assert (await limiter.peek(policy)).limits[-1].status[:2] == (40_000, 0)
        assert limiter.stats().backend_up is True
