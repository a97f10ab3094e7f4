"""Cost of one changed live key for a whole fleet: `python -m benchmarks.live_keys`.

So many workers, simulated in a process of their own, watch the keys as real ones do: they ask for the
version once a second, and after a change for what has changed. Meanwhile requests are decided at a constant
rate: by this limiter, and beside it by others on the same server in turn. Printed are the latencies of the
decisions, without a change and in the seconds after one, how long it took until the last worker had the
change, and what it cost Redis.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import product
from typing import NamedTuple

from benchmarks.fleet import KINDS, Ask, cpu_of
from benchmarks.idle import serving
from ratelimit_mw import KeyEntry
from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.backends.key_store import KeyStore
from ratelimit_mw._internal.live import registry
from ratelimit_mw._internal.live.key_entries import write_entry
from ratelimit_mw._internal.runtime.upkeep import until_next
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.support.servers import StoreServer, server_binaries

KEYS = (10_000, 100_000)
WORKERS = (200, 500)
CHUNK = 5_000
RATE = 200
"""Decisions a second."""
AFTER = 3.0
"""Seconds after a change in which decisions count as met by it."""
CALLERS = 100
DECIDING = ("INCR", "GCRA in a script", "limits, moving window", "one window")
"""Kinds of limiters that decide meanwhile."""


class Change(NamedTuple):
    """Figures of one number of keys and workers under one limiter, times in milliseconds."""

    calm_p99: float
    p99: float
    seen: float
    """Until the last worker had the change."""
    cpu: float
    """CPU of Redis for one change, beyond what it used before."""


def store_of(url: str) -> KeyStore:
    """A store of live keys with connections of its own."""
    return open_key_store(BackendSettings(url=SecretURL(url), timeout=10), timeout=10)


async def fill(url: str, keys: int) -> None:
    """Set so many live keys."""
    store = store_of(url)
    entry = write_entry(KeyEntry("default"))
    names = [f"sha256:{number:064x}" for number in range(keys)]
    for start in range(0, keys, CHUNK):
        await store.write(dict.fromkeys(names[start : start + CHUNK], entry))
    await store.close()


async def watch(url: str, workers: int) -> None:
    """Watch as so many workers do; tell for each line of input when the last of them has seen a change."""
    stores = [store_of(url) for _ in range(workers)]
    known = [await stores[0].version() or b""] * workers
    seen = asyncio.Queue[float]()

    async def follow(place: int) -> None:
        store, share = stores[place], random.random()
        while True:
            await asyncio.sleep(until_next(registry.POLL_SECONDS, share))
            if await store.version() != known[place]:
                changes = await store.changes(known[place])
                if changes is None:
                    raise RuntimeError("the log does not tell what has changed")
                known[place] = changes.version
                seen.put_nowait(time.time())

    following = [asyncio.create_task(follow(place)) for place in range(workers)]
    await asyncio.sleep(2 * registry.POLL_SECONDS)
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(max([await seen.get() for _ in range(workers)])), flush=True)
    for task in following:
        task.cancel()


async def decide(ask: Ask, seconds: float) -> list[float]:
    """Decide at a constant rate; the latencies in milliseconds, each from the moment it was due."""
    begin, latencies = time.perf_counter(), list[float]()

    async def one(number: int) -> None:
        due = begin + number / RATE
        await asyncio.sleep(due - time.perf_counter())
        await ask(number % CALLERS)
        latencies.append(1e3 * (time.perf_counter() - due))

    await asyncio.gather(*[one(number) for number in range(round(seconds * RATE))])
    return latencies


def p99(latencies: Sequence[float]) -> float:
    """The 99th percentile."""
    return sorted(latencies)[int(0.99 * len(latencies))]


async def measure(
    server: StoreServer, deciding: str, keys: int, workers: int, changes: int, after: float = AFTER
) -> Change:
    """Change one key among so many, several times, under so many workers, while a limiter decides."""
    server.empty()
    await fill(server.url, keys)
    command = ("-m", "benchmarks.live_keys", "--watch", server.url, str(workers))
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdout.readline()
    store = store_of(server.url)
    calm, met, seen, spent = list[float](), list[float](), list[float](), 0.0
    async with AsyncExitStack() as stack:
        ask = await KINDS[deciding](server.url, stack)
        await decide(ask, 0.5)
        for number in range(changes):
            begun = cpu_of(server)
            calm += await decide(ask, after)
            usual = cpu_of(server) - begun
            entry = write_entry(KeyEntry("default", label=f"changed {number}"))
            answers = asyncio.create_task(decide(ask, after))
            await asyncio.sleep(0.1)
            process.stdin.write(b"\n")
            changed = time.time()
            await store.write({f"sha256:{number:064x}": entry})
            seen.append(json.loads(await process.stdout.readline()) - changed)
            met += await answers
            spent += cpu_of(server) - begun - 2 * usual
    process.stdin.close()
    await process.wait()
    await store.close()
    return Change(p99(calm), p99(met), 1e3 * max(seen), 1e3 * spent / changes)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.live_keys", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS, metavar="N")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, metavar="N")
    parser.add_argument("--changes", type=int, default=3, help="times that a key is changed")
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        url, workers = arguments.watch
        asyncio.run(watch(url, int(workers)))
        return
    print(f"{'keys':>8}{'workers':>9}  {'decisions by':<22}{'p99 ms':>9}{'after a change':>16}", end="")
    print(f"{'all have it':>14}{'CPU of Redis':>15}")
    with serving(arguments.server) as server:
        for keys, workers, deciding in product(arguments.keys, arguments.workers, DECIDING):
            found = asyncio.run(measure(server, deciding, keys, workers, arguments.changes))
            row = f"{keys:>8,}{workers:>9}  {deciding:<22}{found.calm_p99:>9.2f}{found.p99:>16.2f}"
            print(f"{row}{found.seen:>11,.0f} ms{found.cpu:>12.1f} ms", flush=True)


if __name__ == "__main__":
    main()
