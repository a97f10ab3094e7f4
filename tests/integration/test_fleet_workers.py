"""The figures of two workers under real traffic: what clients got, and what reporting it costs."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.redis.script import get_script
from ratelimit_mw._internal.fleet import FleetView
from tests.conftest import StartApp
from tests.support.apps import AppServer
from tests.support.fleet import eventually, settings_of
from tests.support.live import client_of_all_workers
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun


@pytest.fixture
def workers(tmp_path: Path, redis_server: StoreServer, start_app: StartApp) -> AppServer:
    """Two workers of an app that count in one Redis."""
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        [plans.default]
        requests = ["40/minute"]
    """
    file = written(tmp_path / "ratelimit.toml", text)
    return start_app("tests.support.live_app:app", workers=2, environment={"RATELIMIT_SETTINGS": str(file)})


async def send(url: str, key: str, number: int) -> dict[int, int]:
    """Send requests one after the other, each on a connection of its own; how often each status came."""
    statuses: dict[int, int] = {}
    async with client_of_all_workers(url, key) as client:
        for _ in range(number):
            status = (await client.get("/")).status_code
            statuses[status] = statuses.get(status, 0) + 1
    return statuses


async def test_two_workers_are_counted_as_by_their_clients(
    workers: AppServer, redis_server: StoreServer
) -> None:
    """Every answer that a client got is in the figures, once, a moment later."""
    got = await asyncio.gather(send(workers.url, "a", 70), send(workers.url, "b", 30))
    async with Limiter(settings_of(redis_server.url)) as looking:
        view = FleetView(looking)
        admitted = sum(each.get(200, 0) for each in got)
        refused = sum(each.get(429, 0) for each in got)

        async def agrees() -> bool:
            points = (await view.read()).series
            seen = [sum(p.outcomes.admitted for p in points), sum(p.outcomes.all_refused for p in points)]
            return seen == [admitted, refused]

        await eventually(agrees)
        snapshot = await view.read()
        assert {worker.pid for worker in snapshot.workers} - {os.getpid()} == set(workers.worker_pids())
        histories = [
            await view.caller(looking.engine.identity_of(api_key=key).partition) for key in ("a", "b")
        ]
    counted = [sum(point.outcomes.all_requests for point in each.series) for each in histories]
    assert counted == [70, 30]


async def test_reports_cost_a_call_a_second_whatever_the_traffic(
    workers: AppServer, redis_server: StoreServer
) -> None:
    """One call of the script for each worker and second, and nothing else of it."""
    await send(workers.url, "warm", 5)
    digest = get_script("figures").digest
    with redis_server.client() as client, client.monitor() as monitor:
        start = time.monotonic()
        await asyncio.gather(*[send(workers.url, f"key-{number}", 20) for number in range(8)])
        await asyncio.sleep(max(3 - (time.monotonic() - start), 0))
        seconds = time.monotonic() - start
        client.echo("the end")
        seen = list(iter(lambda: monitor.next_command()["command"], "ECHO the end"))
    calls = len([each for each in seen if each.startswith(f"EVALSHA {digest}")])
    assert 1 <= calls <= 2 * (seconds / 0.9 + 1)
