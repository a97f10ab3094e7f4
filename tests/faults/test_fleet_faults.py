"""The figures of the fleet when things go wrong: an outage, a fail-over, nonsense, invented callers."""

import asyncio
import contextlib
import json
import logging
import time
from pathlib import Path

import pytest
import redis

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.figures_store import BUCKET
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.model.backend import BackendError
from tests.conftest import StartServer
from tests.support.fleet import ask, eventually, fresh, has_seen, settings_of
from tests.support.servers import StoreServer
from tests.support.topologies import SERVICE, Sentinels, running

pytestmark = pytest.mark.rerun

HOSTILE = '<script>alert("x")</script>\n\x1b[2J\u202e' + "x" * 10_000


async def test_without_its_backend_nothing_is_logged_and_the_view_says_so(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Reports that fail are dropped and counted; who looks sees what was last known, and why it is old."""
    server = start_server("redis")
    async with Limiter(settings_of(server.url)) as limiter:
        await ask(limiter, "a", 2)
        await eventually(lambda: has_seen(limiter, 2))
        view = FleetView(limiter)
        seen = await view.read()
        server.stop()
        with caplog.at_level(logging.DEBUG, "ratelimit_mw"):
            await ask(limiter, "a", 2)
            await eventually(lambda: _has_lost(limiter))
        await eventually(lambda: _is_partial(view))
        now = await view.read()
        assert now.backend_up is False
        assert now.callers == seen.callers
        await eventually(lambda: _ends_in_a_gap(view))
        later = await view.read()
        assert later.now > seen.now
        assert sum(point.outcomes.admitted for point in later.series) == 2
        assert [each.caller for each in await view.every_caller()] == [each.caller for each in seen.callers]
        with pytest.raises(BackendError):
            await view.caller("k:x")
        empty = (await FleetView(limiter).read()).as_dict()
        assert (empty["series"], empty["backend"]["up"]) == ([], False)
        assert empty["partial"]
    assert [record for record in caplog.records if "figures" in record.getMessage()] == []


async def _ends_in_a_gap(view: FleetView) -> bool:
    return not (await view.read()).series[-1].known


async def _has_lost(limiter: Limiter) -> bool:
    await limiter.engine.reporter.report()
    return limiter.engine.reporter.lost > 0


async def _is_partial(view: FleetView) -> bool:
    return (await view.read()).partial is not None


async def test_a_backend_that_refuses_reports_is_told_of_once(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend that refuses reports is logged once, so that whoever gave too few rights finds out."""
    server = start_server("redis")
    async with Limiter(settings_of(server.url)) as limiter:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-eval")
        for _ in range(3):
            await ask(limiter, "a", 1)
            await limiter.engine.reporter.report()
        assert limiter.engine.reporter.lost >= 3
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "+eval")
        await ask(limiter, "a", 1)
        await limiter.engine.reporter.report()
        points = (await FleetView(limiter).read()).series
        assert sum(point.outcomes.admitted for point in points) >= 1
    told = [record.getMessage() for record in caplog.records if "figures" in record.getMessage()]
    assert len(told) == 1
    assert "eval" in told[0]


async def test_nonsense_in_the_backend_breaks_no_reader(redis_server: StoreServer) -> None:
    """A reader returns figures of ours as plain values, whatever others wrote under our names."""
    async with Limiter(settings_of(redis_server.url)) as limiter:
        await ask(limiter, "a", 3)
        await limiter.engine.reporter.report()
        bucket = int(await limiter.engine.reporter.store.now() // BUCKET)
        with redis_server.client() as client:
            fleet = "ratelimit:{fleet}:"
            client.set(f"{fleet}t:{bucket - 1}", "a text")
            client.rpush(f"{fleet}c:{bucket - 1}", "a list")
            client.zadd(f"{fleet}t:{bucket}", {b"\xff\xfe": 1, "": 2, "nonsense": 3, "rate": float("inf")})
            client.zadd(f"{fleet}c:{bucket}", {f"rate {HOSTILE}": 70, "rate ": 1.5, "admitted": -3})
            soon = time.time() + 60
            wrong = ["[", "{}", "[1,2,3,4]", "[" * 5_000, json.dumps([HOSTILE, HOSTILE, HOSTILE, HOSTILE])]
            client.zadd(f"{fleet}i", dict.fromkeys([*wrong, '["\\ud800","p","\\ud800",null]'], soon))
            client.zadd(f"{fleet}workers", {name: time.time() for name in ("x", "y", "z", HOSTILE)})
            client.set(f"{fleet}h:x", "[]")
            client.set(f"{fleet}h:y", b"\xff")
            client.set(f"{fleet}h:z", '{"pid": 1e400, "host": 5, "latency_ms": 3, "requests": "many"}')
        view = FleetView(limiter)
        said = (await view.read()).as_dict()
        for caller in said["callers"]:
            (await view.caller(caller["caller"])).as_dict()
    text = json.dumps(said, allow_nan=False, ensure_ascii=False)
    assert text.encode()
    assert sum(point["admitted"] for point in said["series"]) == 3
    assert {len(worker) for worker in said["workers"]} == {12}
    assert max(len(caller["caller"]) for caller in said["callers"]) <= 11_000


async def test_ten_thousand_invented_callers_cost_little(redis_server: StoreServer) -> None:
    """The size of the figures is bounded, and a caller with really many requests is still found."""
    plans = {"default": {"requests": ["1/hour"]}}
    async with Limiter(settings_of(redis_server.url, plans=plans)) as limiter:
        for start in range(0, 10_000, 500):
            keys = [f"invented-{number}" for number in range(start, start + 500)]
            await asyncio.gather(*[ask(limiter, key, 1) for key in keys], ask(limiter, "busy", 5))
        snapshot = await fresh(limiter)
        with redis_server.client() as client:
            names = list(client.scan_iter("*{fleet}*", count=10_000))
            buckets = [name for name in names if b":c:" in name]
            taken = {name: client.memory_usage(name) or 0 for name in names}
    reported = [name for name in names if b":t:" in name]
    assert len(names) <= 7 + 3 * len(reported)
    assert max(taken[name] for name in buckets) < 100_000
    assert taken[b"ratelimit:{fleet}:i"] < 250_000
    busy = limiter.engine.identity_of(api_key="busy").partition
    assert snapshot.callers[0].caller == busy
    assert len(snapshot.callers) == 50


async def test_a_limiter_that_decides_nothing_reports_nothing(redis_server: StoreServer) -> None:
    """A limiter that only watches settings and keys, as commands do, is no worker: it reports nothing."""
    limiter = Limiter(settings_of(redis_server.url))
    await limiter.engine.live.open()
    await limiter.engine.reporter.report()
    await limiter.close()
    with redis_server.client() as client:
        assert list(client.scan_iter("*{fleet}*")) == []


async def test_a_worker_takes_leave(redis_server: StoreServer) -> None:
    """A limiter that closes reports its last counts, and is no longer among the workers."""
    async with Limiter(settings_of(redis_server.url)) as limiter:
        await ask(limiter, "a", 2)
    async with Limiter(settings_of(redis_server.url)) as other:
        snapshot = await FleetView(other).read()
    assert sum(point.outcomes.admitted for point in snapshot.series) == 2
    assert snapshot.workers == ()


@pytest.mark.slow
async def test_reports_follow_the_primary(tmp_path: Path) -> None:
    """Reports go to the new primary after a fail-over, though the old one is still there, as a replica."""
    sentinels = Sentinels("redis", tmp_path)
    with running(sentinels):
        before = sentinels.primary
        async with Limiter(settings_of(sentinels.url)) as limiter:
            await ask(limiter, "a", 1)
            await eventually(lambda: has_seen(limiter, 1))
            with sentinels.sentinels[0].client() as client:
                client.execute_command("SENTINEL", "FAILOVER", SERVICE)
            await eventually(lambda: _is_replica(before))

            async def is_reported() -> bool:
                await ask(limiter, "b", 1)
                await limiter.engine.reporter.report()
                with sentinels.primary.client() as client:
                    names = [name for key in client.scan_iter("*:c:*") for name in client.zrange(key, 0, -1)]
                return any(
                    limiter.engine.identity_of(api_key="b").partition.encode() in name for name in names
                )

            await eventually(is_reported)


async def _is_replica(server: StoreServer) -> bool:
    with contextlib.suppress(redis.ConnectionError), server.client() as client:
        return bool(client.info("replication")["role"] == "slave")
    return False  # it cuts its connections when its role changes
