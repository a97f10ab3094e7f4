"""Benchmarks of fleets and of open load measure what they say: short runs, against servers that do work."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from benchmarks import fleet, idle, live_keys, open_loop, start
from benchmarks.load import Load
from benchmarks.measure import Case, bench
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun


@pytest.mark.parametrize("name", fleet.KINDS)
async def test_each_kind_of_fleet_counts_its_callers(name: str, redis_server: StoreServer) -> None:
    """Every limiter of the table counts requests in Redis, each caller's under a key of its own."""
    async with AsyncExitStack() as stack:
        worker = await fleet.KINDS[name](redis_server.url, stack)
        for caller in (1, 2, 1):
            await worker(caller)
        looking = await stack.enter_async_context(Redis.from_url(redis_server.url))
        keys = {key.decode() async for key in looking.scan_iter("*")}
    assert len(keys) >= 2


ASKED: dict[str, set[str]] = {
    "redis-py that says nothing": set(),
    "INCR once a second": {"incrby"},
    "GCRA once a second": {"evalsha", "get"},
    "limits once a second": {"evalsha"},
    "idle workers of this limiter": {"get"},
}
"""Of three commands, those that the fleets of the benchmark repeat."""


@pytest.mark.parametrize("name", idle.FLEETS)
async def test_idle_workers_are_counted(name: str, redis_server: StoreServer) -> None:
    """Workers of each fleet keep a connection each, and ask Redis what they are said to."""

    def calls() -> dict[str, int]:
        with redis_server.client() as client:
            told = client.info("commandstats")
        return {
            each: told.get(f"cmdstat_{each}", {}).get("calls", 0) for each in ("incrby", "evalsha", "get")
        }

    redis_server.empty()
    before = calls()
    settle = 6 if "idle" in name else 3  # until the first connections of a worker have closed
    found, used = await idle.idle(redis_server, name, workers=3, seconds=1, settle=settle)
    now = calls()
    assert found == 3
    assert used < 100
    assert {each for each in now if now[each] - before[each] >= 6} == ASKED[name]


@pytest.mark.parametrize("name", live_keys.DECIDING)
async def test_a_changed_key_reaches_all_simulated_workers(name: str, redis_server: StoreServer) -> None:
    """Every worker of the benchmark of live keys sees the change in the log while each limiter decides."""
    with redis_server.client() as client:
        found = await live_keys.measure(redis_server, name, keys=50, workers=4, changes=1, after=0.5)
        decided = [key for key in client.scan_iter("*") if b"{keys}" not in key]
    assert found.seen > 0
    assert found.p99 > 0
    assert len(decided) >= 50  # of a hundred callers in turn


def test_starts_are_measured(redis_server: StoreServer) -> None:
    """Apps start bare, with limits in memory and in Redis, answer a request, and show what it takes."""
    costs = start.measure(start.programs(redis_server.url), rounds=1)
    apps = [cost for name, cost in costs.items() if "request" in name]
    assert len(apps) == 3
    assert all(cost.cpu_ms > 0 for cost in costs.values())
    assert [cost.rss_mib for cost in apps] == sorted(cost.rss_mib for cost in apps)


def test_a_schedule_has_every_request_once() -> None:
    """At a constant rate as many requests are due as the rate says, spread over all ticks."""
    schedule = open_loop.Schedule(rate=2_500, seconds=2)
    due = [schedule.due_at(tick) for tick in range(schedule.ticks)]
    assert sum(due) == 5_000
    assert set(due) == {2, 3}


async def test_latencies_count_from_the_moment_that_was_due() -> None:
    """A server that stands still makes all requests late that come meanwhile, not only the one it has."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    stood = False

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal stood
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            if not stood:
                stood = True
                gate.clear()
                asyncio.get_running_loop().call_later(0.5, gate.set)
            await gate.wait()
            writer.write(answer)
        writer.close()

    gate = asyncio.Event()
    gate.set()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    generator = open_loop.Generator(server.sockets[0].getsockname()[1], callers=1, connections=4)
    await asyncio.to_thread(generator.run, open_loop.Schedule(rate=100, seconds=1))
    server.close()
    late = sorted(generator.connections.latencies)
    assert len(late) == 100
    assert late[-1] >= 0.45
    assert late[-10] >= 0.3  # with no more than four under way at a time


def test_rates_are_shares_of_what_the_bare_app_answers() -> None:
    """A short run tells the latencies of each variant at each share, and what it adds to the bare app."""
    load = Load(callers=2, seconds=1)
    cases = [Case(variant, load) for variant in ("bare", "redis-2")]
    with bench() as (running, stack, folder):
        running.start(stack, folder, cases)
        capacity, medians = open_loop.measure(running, cases, (0.05,), rounds=1, seconds=0.5)
    assert capacity > 0
    assert set(medians) == {("bare", 0.05), ("redis-2", 0.05)}
    assert all(0 < each.p50 <= each.p99 <= each.p999 for each in medians.values())
    assert "two windows and a slot" in open_loop.table(medians)
