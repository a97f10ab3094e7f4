"""Cost of a request for the nodes of a cluster, by the number of nodes: `python -m benchmarks.cluster`.

Twelve requests for each node come at once, of callers in turn, and end. A server of its own comes first.
CPU is counted by the servers themselves. With `--instructions` callgrind counts, which has to be installed
(valgrind): slower, and nearly the same on a busy machine and on a quiet one.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.alone import CountedStore, limits_of
from benchmarks.fleet import QUOTA, cpu_of
from benchmarks.stored import PATIENCE
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge
from tests.support.conformance import new_id
from tests.support.servers import StoreServer, server_binaries
from tests.support.topologies import Cluster

TOGETHER = 12
"""Requests for each node that come at once."""
CALLERS = 200
"""Callers for each node."""
NODES = (1, 3, 6)
TRIED_OUT = 3.0
"""Seconds after which a node that takes calls for several hash slots is known to."""
KINDS = {"one window": False, "two windows and a slot": True}


async def ask(backend: RedisBackend | ClusterBackend, charge: Charge) -> None:
    """Make one request: a charge and the end of it."""
    outcome = await backend.acquire(charge, new_id())
    await backend.finish(outcome.reservation, EstimateAction.UNTOUCHED)


async def drive(
    backend: RedisBackend | ClusterBackend, charges: Sequence[Charge], together: int, number: int
) -> int:
    """Make so many requests, so many at once; how many there were."""
    asked = 0
    while asked < number:
        turn = [charges[(asked + place) % len(charges)] for place in range(together)]
        await asyncio.gather(*[ask(backend, charge) for charge in turn])
        asked += together
    return asked


async def measure(servers: Sequence[StoreServer], url: str, *, slots: bool, requests: int) -> float:
    """Microseconds of CPU of all servers for a request, or instructions where they count these."""
    backend = (ClusterBackend if url.startswith("redis+cluster") else RedisBackend)(url, timeout=PATIENCE)
    callers = CALLERS * len(servers)
    charges = [Charge(limits_of(f"caller {n}", QUOTA, slots=slots)) for n in range(callers)]
    together = TOGETHER * len(servers)
    try:
        await backend.open()
        await drive(backend, charges, together, callers)
        await asyncio.sleep(TRIED_OUT)
        await drive(backend, charges, together, callers)
        counted = [server for server in servers if isinstance(server, CountedStore)]
        for server in counted:
            server.begin()
        begun = sum([cpu_of(server) for server in servers])
        asked = await drive(backend, charges, together, requests * len(servers))
        if counted:
            return sum([server.end() for server in counted]) / asked
        return (sum([cpu_of(server) for server in servers]) - begun) / asked * 1e6
    finally:
        await backend.close()


@contextmanager
def running(kind: str, nodes: int, server: type[StoreServer]) -> Iterator[tuple[list[StoreServer], str]]:
    """Servers and their address: a cluster of so many nodes, or where there are none a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        alone = server(kind, Path(folder))
        cluster = Cluster(
            kind, Path(folder), "--cluster-node-timeout", "60000", primaries=max(nodes, 1), server=server
        )
        started = cluster if nodes else alone
        try:
            started.start()
            yield (cluster.nodes if nodes else [alone]), started.url
        finally:
            started.stop()


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.cluster", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES, metavar="N")
    parser.add_argument("--requests", type=int, default=20_000, metavar="N", help="requests for each node")
    parser.add_argument("--instructions", action="store_true", help="count these in place of CPU")
    arguments = parser.parse_args()
    server = CountedStore if arguments.instructions else StoreServer
    what = "instructions" if arguments.instructions else "us of CPU"
    print(f"{what + ', of:':<20}" + "".join([f"{kind:>26}" for kind in KINDS]))
    for nodes in (0, *arguments.nodes):
        row = f"{f'{nodes} nodes' if nodes else 'one server':<20}"
        for slots in KINDS.values():
            with running(arguments.server, nodes, server) as (servers, url):
                cost = asyncio.run(measure(servers, url, slots=slots, requests=arguments.requests))
            row += f"{cost:>26,.1f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
