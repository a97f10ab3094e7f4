"""Metered units through a server that comes and goes, and from several processes at once."""

import asyncio
import random

import pytest

from ratelimit_mw import Lease, Limiter
from ratelimit_mw._internal.model.status import WindowStatus
from tests.support.asgi import settings_of
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

LARGE = "1000000/day"
SETTINGS = """
backend = {{ url = "{url}", timeout = {timeout}, namespace = "{name}" }}
[plans.default]
requests = ["100000/minute"]
units = {{ tokens = ["{rate}"] }}
[[routes]]
path = "/chat"
units = {{ tokens = 500 }}
"""


def limiter_on(url: str, name: str, rate: str, timeout: float = 10.0) -> Limiter:
    """A limiter of its own, as another process has one."""
    return Limiter(settings_of(SETTINGS.format(url=url, name=name, rate=rate, timeout=timeout)))


async def tokens_used(limiter: Limiter) -> int:
    """Tokens that the caller has used."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
    _, status = next(iter((await limiter.engine.peek(policy)).windows("tokens")))
    assert isinstance(status, WindowStatus)
    return status.used


async def test_a_storm_of_settles_ends_with_the_exact_sum(server: StoreServer) -> None:
    """Connections break all the while: what was admitted counts once, as it was settled."""
    chance, total = random.Random(7), 0
    async with Proxy(server.port) as proxy:
        limiter = limiter_on(proxy.url, "storm", LARGE, timeout=2.0)
        async with limiter:
            tasks: list[asyncio.Task[None]] = []

            async def settle(lease: Lease, amount: int) -> None:
                await lease.settle(units={"tokens": amount})
                await lease.settle(units={"tokens": amount})
                limiter.engine.leases.end(lease, failed=chance.random() < 0.5)

            for number in range(200):
                if number % 20 == 10:
                    proxy.reset()
                lease = await limiter.acquire(api_key="k", path="/chat")
                assert lease.allowed
                amount = chance.choice([0, 3, 499, 500, 501, 900])
                total += amount
                tasks.append(asyncio.ensure_future(settle(lease, amount)))
                if number % 7 == 0:
                    await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)
    async with limiter_on(server.url, "storm", LARGE) as reader, asyncio.timeout(20):
        while await tokens_used(reader) != total:
            await asyncio.sleep(0.05)


async def test_estimates_of_several_cannot_exceed_a_limit_together(server: StoreServer) -> None:
    """Eight limiters at once, each charge of 500: of 10,000 no more than 20 are let in until some settle."""
    limiters = [limiter_on(server.url, "together", "10000/hour") for _ in range(8)]
    try:
        leases = await asyncio.gather(
            *[limiters[number % 8].acquire(api_key="k", path="/chat") for number in range(64)]
        )
        admitted = [lease for lease in leases if lease.allowed]
        assert len(admitted) == 20
        await asyncio.gather(*[lease.settle(units={"tokens": 100}) for lease in admitted])
        again = await asyncio.gather(
            *[limiters[number % 8].acquire(api_key="k", path="/chat") for number in range(64)]
        )
        assert sum(lease.allowed for lease in again) == 16
        assert await tokens_used(limiters[0]) == 10_000
    finally:
        await asyncio.gather(*[limiter.close() for limiter in limiters])


async def test_settles_work_while_memory_is_full(server: StoreServer) -> None:
    """Operations that free or correct units are written even if the server takes no new keys."""
    async with limiter_on(server.url, "full", LARGE) as limiter:
        less, more, failed = [await limiter.acquire(api_key="k", path="/chat") for _ in range(3)]
        with server.client() as client:
            client.config_set("maxmemory", "1")
            try:
                await less.settle(units={"tokens": 10})
                await more.settle(units={"tokens": 1_500})
                limiter.engine.leases.end(failed, failed=True)
                async with asyncio.timeout(30):
                    while limiter.engine.backend.load.owed:
                        await asyncio.sleep(0.01)
            finally:
                client.config_set("maxmemory", "0")
        assert await tokens_used(limiter) == 1_510


@pytest.mark.parametrize("damage", ["record", "open", "window"])
async def test_what_is_damaged_mends_itself(server: StoreServer, damage: str) -> None:
    """A foreign value in place of a key causes no lasting failure, and the limit holds again."""
    async with limiter_on(server.url, f"damage-{damage}", "1000/minute") as limiter:
        lease = await limiter.acquire(api_key="k", path="/chat")
        if damage == "record":
            await lease.detach(ttl=60)
        suffix = {"record": "u:", "open": "e:p:", "window": "w:p:tokens"}[damage]
        with server.client() as client:
            found = [key for key in client.scan_iter(f"damage-{damage}:*") if suffix.encode() in key]
            assert len(found) == 1
            client.delete(found[0])
            client.rpush(found[0], "not ours")
        await lease.settle(units={"tokens": 10})
        await limiter.acquire(api_key="k", path="/chat")
        await limiter.acquire(api_key="k", path="/chat")
        refused = await limiter.acquire(api_key="k", path="/chat")
        assert not refused.allowed
        assert refused.decision.refusal is not None
        assert refused.decision.policy == "shared"


async def test_a_job_without_an_estimate_settles_in_another_process(server: StoreServer) -> None:
    """Its token is enough, though nothing was charged: what it has used counts, and once."""
    async with limiter_on(server.url, "job", "1000/minute") as limiter:
        token = await (await limiter.acquire(api_key="k", path="/")).detach(ttl=60)
    async with limiter_on(server.url, "job", "1000/minute") as worker:
        for _ in range(2):
            await worker.settle(token, units={"tokens": 30})
        assert await tokens_used(worker) == 30
