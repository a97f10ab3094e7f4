"""`max_wait` on every backend, by the backend's own clock: in turn, true to the promise, nothing oversold."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from ratelimit_mw import Lease, Limit, Limiter
from ratelimit_mw._internal.model.limits import SECOND
from tests.conformance.test_contention import most_in
from tests.support.asgi import settings_of
from tests.support.conformance import KINDS, STORES, SharedServer
from tests.support.servers import StoreServer
from tests.support.topologies import Cluster

SLOT = Limit("gpu", concurrent=1)
RATE = Limit("sends", "3/second")
FAR = 60.0
"""Seconds that no test takes."""


@pytest.fixture(params=[*KINDS, *[f"{kind} cluster" for kind in STORES]])
async def limiter(
    request: pytest.FixtureRequest, shared_server: SharedServer, shared_cluster: Callable[[str], Cluster]
) -> AsyncIterator[Limiter]:
    """A limiter on each kind of backend in turn, clusters too."""
    kind, _, cluster = request.param.partition(" ")
    url = "memory://"
    if kind != "memory":
        url = shared_cluster(kind).url if cluster else shared_server(kind).url
    async with limiter_on(url) as limiter:
        yield limiter


def limiter_on(url: str) -> Limiter:
    """A limiter on this backend."""
    return Limiter(settings_of(f'backend = {{ url = "{url}", timeout = 10 }}'))


async def all_wait(limiter: Limiter, number: int) -> None:
    """Wait until so many calls stand in lines."""
    async with asyncio.timeout(FAR):
        while len(limiter.engine.turns) < number:
            await asyncio.sleep(0.001)


async def test_slots_are_handed_on_in_order(limiter: Limiter) -> None:
    """Each that ends lets in who has waited longest; a call that is cancelled is passed over."""
    served: list[int] = []

    async def work(number: int) -> None:
        async with await limiter.acquire(SLOT.on("x"), max_wait=FAR):
            served.append(number)

    lease = await limiter.acquire(SLOT.on("x"))
    tasks = []
    for number in range(6):
        tasks.append(asyncio.create_task(work(number)))
        await all_wait(limiter, number + 1)
    tasks[0].cancel()
    tasks[3].cancel()
    await lease.release()
    await asyncio.wait(tasks)
    assert served == [1, 2, 4, 5]
    async with asyncio.timeout(FAR):
        while not (last := await limiter.acquire(SLOT.on("x"))).allowed:
            await asyncio.sleep(0.01)
    await last.release()


async def test_rates_are_waited_for_in_order_and_never_exceeded(limiter: Limiter) -> None:
    """Nine calls of three a second are all let in, in order, and no second holds more than three."""
    served: list[tuple[int, int]] = []

    async def send(number: int) -> None:
        lease = await limiter.acquire(RATE.on("x"), max_wait=FAR)
        lease.raise_for_refusal()
        served.append((lease.decision.now_us, number))

    for number in range(3):
        await send(number)
    tasks = []
    for number in range(3, 9):
        tasks.append(asyncio.create_task(send(number)))
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    assert [number for _, number in served] == list(range(9))
    assert most_in([(at, 1) for at, _ in served], SECOND) <= 3


async def test_a_wait_that_is_too_long_is_none(limiter: Limiter) -> None:
    """A call that may wait for less than the promise is refused at once, as is one that never fits."""
    hourly = Limit("hourly", "1/hour")
    await limiter.acquire(hourly.on("x"))
    start = time.monotonic()
    leases = [await limiter.acquire(each, max_wait=FAR) for each in (hourly.on("x"), hourly.on("y", cost=2))]
    assert time.monotonic() - start < FAR / 2
    waits = [lease.decision.retry_after for lease in leases]
    assert waits[0] is not None
    assert waits[0] > FAR
    assert waits[1] is None


async def test_cancelled_in_the_midst_of_a_question(limiter: Limiter) -> None:
    """A call that is cancelled before, during or after its question holds nothing in the end."""
    limit = Limit("many", concurrent=3)

    async def call(delay: float) -> None:
        task = asyncio.create_task(limiter.acquire(limit.on("x"), max_wait=FAR))
        await asyncio.sleep(delay)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await (await task).release()

    await asyncio.gather(*[call(number * 0.0003) for number in range(60)])
    held: list[Lease] = []
    async with asyncio.timeout(FAR):
        while len(held) < 3:
            lease = await limiter.acquire(limit.on("x"))
            if lease.allowed:
                held.append(lease)
            await asyncio.sleep(0.005)
    assert len(limiter.engine.turns) == 0
    for lease in held:
        await lease.release()


async def test_limiters_of_several_processes_wait_for_each_other(server: StoreServer) -> None:
    """A slot that another process frees is found within a second, and all are served in the end."""
    limiters = [limiter_on(server.url) for _ in range(3)]
    holding = most = 0

    async def work(limiter: Limiter) -> None:
        nonlocal holding, most
        async with await limiter.acquire(SLOT.on("x"), max_wait=FAR):
            holding += 1
            most = max(most, holding)
            await asyncio.sleep(0.01)
            holding -= 1

    try:
        await asyncio.gather(*[work(limiters[number % 3]) for number in range(15)])
    finally:
        await asyncio.gather(*[limiter.close() for limiter in limiters])
    assert most == 1
