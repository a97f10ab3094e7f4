"""Cost of a fleet that has nothing to do: `python -m benchmarks.idle`.

So many workers, in a few processes, watch the live keys and report that they are there. Beside them stand
as many clients of redis-py that say nothing, and as many that ask another limiter once a second each. Printed
are the connections to Redis, and the share of a core that Redis spends on them: the median of many seconds,
so that a moment in which the machine was busy does not count. With `--instructions` callgrind counts, which
has to be installed (valgrind): the same on a busy machine, but without the system's part, the larger one.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

from benchmarks.alone import CountedStore
from benchmarks.fleet import KINDS, cpu_of, drive
from ratelimit_mw import Limiter, Settings
from tests.support.servers import StoreServer, server_binaries

WORKERS = 500
PROCESSES = 5
SETTLE = 12.0
"""Seconds until workers that have just started need no more than others: their first connections close."""
Fleet = Callable[[str, int], AbstractAsyncContextManager[None]]
"""Has so many workers in this process as long as it is open, given the URL of their server."""


@asynccontextmanager
async def silent(url: str, workers: int) -> AsyncIterator[None]:
    """Clients that keep a connection each, and send nothing."""
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            client = await stack.enter_async_context(Redis.from_url(url, single_connection_client=True))
            await client.ping()
        yield


@asynccontextmanager
async def asking(kind: str, url: str, workers: int) -> AsyncIterator[None]:
    """Clients that ask another limiter once a second each."""
    async with AsyncExitStack() as stack:
        fleet = [await KINDS[kind](url, stack) for _ in range(workers)]
        driving = asyncio.create_task(drive(fleet, rate=workers, seconds=1e9))
        try:
            yield
        finally:
            driving.cancel()
            await asyncio.wait([driving])


@asynccontextmanager
async def ours(url: str, workers: int) -> AsyncIterator[None]:
    """Limiters without requests."""
    settings = Settings.model_validate({"backend": {"url": url, "timeout": 5}})
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            await stack.enter_async_context(Limiter(settings))
        yield


FLEETS: dict[str, Fleet] = {
    "redis-py that says nothing": silent,
    "INCR once a second": partial(asking, "INCR"),
    "GCRA once a second": partial(asking, "GCRA in a script"),
    "limits once a second": partial(asking, "limits, moving window"),
    "idle workers of this limiter": ours,
}


@contextmanager
def serving(kind: str, server_class: type[StoreServer] = StoreServer) -> Iterator[StoreServer]:
    """A server of the benchmark's own."""
    with tempfile.TemporaryDirectory() as folder:
        server = server_class(kind, Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def spent(server: StoreServer, seconds: int) -> float:
    """Percent of a core that a server spends, or millions of instructions a second where it counts these."""
    if isinstance(server, CountedStore):
        server.begin()
        await asyncio.sleep(seconds)
        return server.end() / seconds / 1e6
    shares = []
    for _ in range(seconds):
        begun, since = cpu_of(server), time.perf_counter()
        await asyncio.sleep(1)
        shares.append(100 * (cpu_of(server) - begun) / (time.perf_counter() - since))
    return statistics.median(shares)


async def work(name: str, url: str, workers: int) -> None:
    """Have workers of a fleet there until the input ends."""
    async with FLEETS[name](url, workers):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def working(name: str, url: str, workers: int) -> AsyncIterator[None]:
    """Have so many workers of a fleet there, in processes of their own."""
    number = min(PROCESSES, workers)
    parts = [workers // number + (place < workers % number) for place in range(number)]
    command = (sys.executable, "-m", "benchmarks.idle", "--work", name, url)
    processes = [
        await asyncio.create_subprocess_exec(*command, str(part), stdin=PIPE, stdout=PIPE) for part in parts
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if not await process.stdout.readline():
                raise RuntimeError(f"workers did not start: {name}")
        yield
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            await process.wait()


async def idle(
    server: StoreServer, name: str, workers: int, seconds: int, settle: float = SETTLE
) -> tuple[int, float]:
    """Connections of so many workers, and what they cost the server beyond what it spends alone (`spent`)."""
    server.empty()
    await asyncio.sleep(1)
    alone = await spent(server, seconds)
    async with working(name, server.url, workers):
        await asyncio.sleep(settle)
        used = await spent(server, seconds)
        with server.client() as client:
            connections = len(client.client_list()) - 1
    return connections, used - alone


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.idle", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N")
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--instructions", action="store_true", help="count these in place of CPU")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, url, workers = arguments.work
        asyncio.run(work(name, url, int(workers)))
        return
    unit, server_class = "% of a core", StoreServer
    if arguments.instructions:
        unit, server_class = "M instructions/s", CountedStore
    print(f"{arguments.workers:<5}{'':<25}{'connections':>12}{unit:>18}")
    with serving(arguments.server, server_class) as server:
        for name in FLEETS:
            found, used = asyncio.run(idle(server, name, arguments.workers, arguments.seconds))
            print(f"{name:<30}{found:>12}{used:>18.2f}", flush=True)


if __name__ == "__main__":
    main()
