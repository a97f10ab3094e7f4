"""A request waits for the backend no longer than `timeout`, however many steps it takes."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from tests.support.asgi import settings_of
from tests.support.conformance import Waits, daily, eventually, instant, new_id, slots, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import counted, peeked
from tests.support.topologies import Cluster, running

pytestmark = pytest.mark.rerun

TIMEOUT = 0.4
STEP = 0.3
"""Seconds that each step takes: one is in time, two are not."""
SLACK = 0.15
CHARGES = 25
DAY = 86_400_000_000

UNPRICED = """
[backend]
url = "{url}"
timeout = 0.4
[plans.default]
spending = {{ daily = "10.00" }}
"""


@contextmanager
def busy(nodes: list[StoreServer]) -> Iterator[None]:
    """Nodes that are busy with something else for up to `STEP` seconds, again and again, each in its turn."""
    done = threading.Event()

    def keep_busy(node: StoreServer, seconds: float) -> None:
        with node.client() as client:
            while not done.is_set():
                client.execute_command("DEBUG", "SLEEP", seconds)
                done.wait(0.02)

    threads = [
        threading.Thread(target=keep_busy, args=(node, STEP - 0.05 * number))
        for number, node in enumerate(nodes)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


async def test_the_steps_of_a_charge_on_a_cluster_share_one_time_limit(tmp_path: Path) -> None:
    """Four partitions on nodes that answer late, each in time: the request is not made to wait four times.

    The slots that were taken in time are given back.
    """
    cluster = Cluster("redis", tmp_path)
    with running(cluster):
        backend = ClusterBackend(cluster.url, timeout=TIMEOUT)
        await backend.open()
        counters = [
            counter
            for partition in ("caller", "address", "route", "app")
            for counter in (window(1_000, 1, "hour", of=partition), slots(1_000, of=partition))
        ]
        assert (await backend.acquire(Charge(counters), new_id())).admitted
        waits, failures = Waits(), 0
        with busy(cluster.nodes):
            async with waits.measured():
                for _ in range(CHARGES):
                    async with waits.one():
                        try:
                            await backend.acquire(Charge(counters), new_id())
                        except BackendError:
                            failures += 1
                    await asyncio.sleep(0.05)
        assert failures > 0
        assert waits.longest < TIMEOUT + SLACK + waits.late

        async def is_given_back() -> bool:
            try:
                answer = await peeked(backend, Charge(counters))
            except BackendError:
                return False
            return set(answer.counted[1::2]) == {1 + CHARGES - failures}

        await eventually(is_given_back, 30)
        await backend.close()


async def test_a_charge_that_is_asked_again_has_no_more_time(redis_server: StoreServer) -> None:
    """A charge is sent again in the time that is left, if the day changes between asking and deciding."""
    days = itertools.cycle([0, 1])

    def clock() -> int:
        return instant("2026-11-21T12:00:00+00:00") + DAY * next(days)

    async with Proxy(redis_server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=TIMEOUT, clock=clock)
        await backend.open()
        waits = Waits()
        proxy.delay = STEP
        async with waits.measured(), waits.one():
            with pytest.raises(BackendError, match=r"named other periods for 0\.4 s"):
                await backend.acquire(Charge([daily(100)]), new_id(), 1)
        assert waits.longest < TIMEOUT + SLACK + waits.late
        await backend.close()


async def test_a_settle_that_opens_an_estimate_has_no_more_time(redis_server: StoreServer) -> None:
    """A settle of a request without a price takes two steps, and the request waits for both together."""
    async with Proxy(redis_server.port) as proxy:
        limiter = Limiter(settings_of(UNPRICED.format(url=proxy.url)))
        async with limiter, await limiter.acquire(api_key="a") as lease:
            proxy.delay = STEP
            waits = Waits()
            async with waits.measured(), waits.one():
                await lease.settle("1.00")
            assert waits.longest < TIMEOUT + SLACK + waits.late
            proxy.delay = 0

            async def is_settled() -> bool:
                policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
                try:
                    (budget,) = [each.status for each in (await limiter.engine.peek(policy)).limits]
                except BackendError:
                    return False
                return counted(budget) == 1_000_000

            await eventually(is_settled, 30)
