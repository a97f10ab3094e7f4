"""Cost of a fleet that has nothing to do: `python -m benchmarks.idle`.

So many workers, all in this process, watch the live keys and report that they are there. Printed are their
connections to Redis, and the share of a core that Redis spends on them.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from benchmarks.fleet import cpu_of
from ratelimit_mw import Limiter, Settings
from tests.support.servers import StoreServer, server_binaries

WORKERS = 500
SETTLE = 12.0
"""Seconds until workers that have just started need no more than others: their first connections close."""


@contextmanager
def serving(kind: str) -> Iterator[StoreServer]:
    """A server of the benchmark's own."""
    with tempfile.TemporaryDirectory() as folder:
        server = StoreServer(kind, Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def idle(
    server: StoreServer, workers: int, seconds: float, settle: float = SETTLE
) -> tuple[int, float]:
    """Connections of so many workers, and seconds of CPU a second that they cost the server."""
    settings = Settings.model_validate({"backend": {"url": server.url, "timeout": 5}})
    await asyncio.sleep(1)
    begun = cpu_of(server)
    await asyncio.sleep(1)
    alone = cpu_of(server) - begun
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            await stack.enter_async_context(Limiter(settings))
        await asyncio.sleep(settle)
        begun, since = cpu_of(server), time.perf_counter()
        await asyncio.sleep(seconds)
        spent = time.perf_counter() - since
        used = cpu_of(server) - begun
        with server.client() as client:
            names = [each["name"] for each in client.client_list()]
    return names.count("ratelimit_mw"), used / spent - alone


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.idle", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    with serving(arguments.server) as server:
        found, used = asyncio.run(idle(server, arguments.workers, arguments.seconds))
    print(f"{arguments.workers} idle workers: {found} connections, {100 * used:.2f} % of a core of Redis")


if __name__ == "__main__":
    main()
