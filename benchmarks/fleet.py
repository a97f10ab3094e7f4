"""CPU of Redis for each request of a fleet, by the number of workers: `python -m benchmarks.fleet`.

The total load is the same whatever the number of workers, and its requests come at a constant rate. Beside
this limiter stand the least that others cost: `INCR`, `INCR` and `EXPIRE`, a token bucket (GCRA) in a script,
and the exact window of the package `limits`, without and with the call that its figures for headers take. CPU
is counted by Redis itself, so a busy machine shows up less than in times; what it uses idle is taken off.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from limits import RateLimitItemPerHour
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import ConnectionPool, Redis

from benchmarks.peers import GCRA, GCRA_ARGUMENTS
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Slots, Window
from tests.support.conformance import new_id
from tests.support.servers import StoreServer, server_binaries

WORKERS = (1, 20, 200)
CALLERS = 200
QUOTA = 1_000_000
Ask = Callable[[int], Awaitable[object]]
Make = Callable[[str, AsyncExitStack], Awaitable[Ask]]


async def incr(url: str, stack: AsyncExitStack) -> Ask:
    """One command, which limits nothing by itself."""
    client = await stack.enter_async_context(Redis.from_url(url, single_connection_client=True))
    return lambda caller: client.incr(f"c{caller}")


async def incr_and_expire(url: str, stack: AsyncExitStack) -> Ask:
    """A fixed window, in one round trip."""
    client = await stack.enter_async_context(Redis.from_url(url, single_connection_client=True))

    async def ask(caller: int) -> None:
        async with client.pipeline(transaction=False) as pipeline:
            await pipeline.incr(f"c{caller}")
            await pipeline.expire(f"c{caller}", 60)
            await pipeline.execute()

    return ask


async def gcra(url: str, stack: AsyncExitStack) -> Ask:
    """A token bucket in a script, written by hand."""
    client = await stack.enter_async_context(Redis.from_url(url, single_connection_client=True))
    digest = await client.script_load(GCRA)
    return lambda caller: client.evalsha(digest, 1, f"g{caller}", *GCRA_ARGUMENTS)


async def _moving(url: str, stack: AsyncExitStack, *, figures: bool) -> Ask:
    pool: Any = ConnectionPool.from_url(url)
    stack.push_async_callback(pool.disconnect)
    storage = RedisStorage(f"async+{url}", implementation="redispy", connection_pool=pool)
    limiter, rate = MovingWindowRateLimiter(storage), RateLimitItemPerHour(QUOTA)

    async def ask(caller: int) -> None:
        await limiter.hit(rate, f"{caller}")
        if figures:
            await limiter.get_window_stats(rate, f"{caller}")

    return ask


async def moving(url: str, stack: AsyncExitStack) -> Ask:
    """The exact window of `limits`, which tells only whether a request is admitted."""
    return await _moving(url, stack, figures=False)


async def moving_with_figures(url: str, stack: AsyncExitStack) -> Ask:
    """The exact window of `limits` with what is left, as headers tell it."""
    return await _moving(url, stack, figures=True)


async def _ours(url: str, stack: AsyncExitStack, *, slots: bool) -> Ask:
    backend = RedisBackend(url, timeout=5)
    stack.push_async_callback(backend.close)
    await backend.open()

    async def ask(number: int) -> None:
        caller = f"{number}"
        counters = [Counter(caller, "p", Window(QUOTA, 1, "hour"))]
        if slots:
            counters += [Counter(caller, "p", Window(QUOTA, 1, "day")), Counter(caller, "p", Slots(100))]
        outcome = await backend.acquire(Charge(counters), new_id())
        await backend.finish(outcome.reservation, EstimateAction.UNTOUCHED)

    return ask


async def window(url: str, stack: AsyncExitStack) -> Ask:
    """One window of this limiter."""
    return await _ours(url, stack, slots=False)


async def windows_and_slot(url: str, stack: AsyncExitStack) -> Ask:
    """Two windows and a slot of this limiter; the slot is released in a call of its own."""
    return await _ours(url, stack, slots=True)


KINDS: dict[str, Make] = {
    "INCR": incr,
    "INCR, EXPIRE": incr_and_expire,
    "GCRA in a script": gcra,
    "limits, moving window": moving,
    "the same with figures": moving_with_figures,
    "one window": window,
    "two windows and a slot": windows_and_slot,
}


async def drive(workers: Sequence[Ask], rate: float, seconds: float) -> int:
    """Ask at a constant rate, by workers and for callers in turn; return the number of requests.

    A worker has one request at a time.
    """
    end, asked = time.perf_counter() + seconds, 0

    async def work(place: int) -> None:
        nonlocal asked
        due = time.perf_counter() + place / rate
        while due < end:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            asked += 1
            await workers[place](asked % CALLERS)
            due += len(workers) / rate

    await asyncio.gather(*[work(place) for place in range(len(workers))])
    return asked


async def measure(server: StoreServer, make: Make, number: int, rate: float, seconds: float) -> float:
    """CPU of the server for a request, in microseconds."""
    server.empty()
    async with AsyncExitStack() as stack:
        workers = [await make(server.url, stack) for _ in range(number)]
        await drive(workers, rate, 2 * CALLERS / rate)
        idle = cpu_of(server)
        await asyncio.sleep(1)
        begun = cpu_of(server)
        since = time.perf_counter()
        requests = await drive(workers, rate, seconds)
        used = cpu_of(server) - begun - (begun - idle) * (time.perf_counter() - since)
    return used / requests * 1e6


def cpu_of(server: StoreServer) -> float:
    """Seconds of CPU that a server has used."""
    with server.client() as client:
        cpu = client.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.fleet", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="N")
    parser.add_argument("--rate", type=float, default=200, metavar="REQUESTS/S")
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = StoreServer(arguments.server, Path(folder))
        server.start()
        try:
            print(f"{'us of Redis, workers:':<26}" + "".join([f"{each:>8}" for each in arguments.workers]))
            for name, make in KINDS.items():
                row = [
                    asyncio.run(measure(server, make, each, arguments.rate, arguments.seconds))
                    for each in arguments.workers
                ]
                print(f"{name:<26}" + "".join([f"{each:>8.1f}" for each in row]), flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
