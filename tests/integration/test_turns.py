"""Turns of the event loop: work beside requests is done in pieces, however much there is of it."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ratelimit_mw import KeyEntry, Limiter, Settings
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.fleet.view import MOST_LIMITS, PEEKED
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

MANY = 2_000
SETTINGS = {
    "plans": {"default": {"requests": ["60/minute"], "concurrent": 5}},
    "routes": [{"path": f"/r{number}/{{x}}", "requests": ["5/minute"]} for number in range(MANY)],
}


@asynccontextmanager
async def turns() -> AsyncIterator[list[float]]:
    """Yield the seconds of CPU that each turn of the event loop takes within the block."""
    taken: list[float] = []

    async def look() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            taken.append(time.thread_time() - before)

    gc.disable()  # whose pauses grow with everything there is
    looking = asyncio.create_task(look())
    try:
        await asyncio.sleep(0)
        yield taken
    finally:
        looking.cancel()
        gc.enable()


def ask(limiter: Limiter, callers: int) -> None:
    """Count a request of each of so many callers."""
    engine = limiter.engine
    for number in range(callers):
        identity = engine.identity_of(api_key=f"k{number}", address="10.0.0.1")
        engine.decision_counts.admit(engine.policies.match(identity, "GET", "/"))


async def test_a_dashboard_reads_thousands_of_limits_in_many_turns() -> None:
    """With thousands of routes and keys, no turn does more than a small part of the work of a snapshot."""
    limiter = Limiter(Settings.model_validate(SETTINGS))
    keys = {f"sha256:{number:064x}": KeyEntry("default", label=f"n{number}") for number in range(MANY)}
    await limiter.engine.live.set_keys(keys)
    ask(limiter, PEEKED)
    await limiter.engine.reporter.report()
    view = FleetView(limiter)
    async with turns() as taken:
        snapshot = await view.read()
    assert [len(each.limits) for each in snapshot.callers] == [MOST_LIMITS] * PEEKED
    assert len(taken) > PEEKED * MANY / 500  # a hundred limits and two callers each, or smaller
    assert max(taken) < sum(taken) / 5
    async with turns() as taken:
        detail = await view.caller(snapshot.callers[0].caller)
    assert len(detail.figures.limits) == MANY + 2
    assert len(taken) > MANY / 200


async def test_replaced_settings_of_thousands_of_routes_are_freed_in_a_thread(tmp_path: Path) -> None:
    """The rules of thousands of routes are freed beside the event loop, which goes on meanwhile."""
    routes = "".join([f'[[routes]]\npath = "/r{number}/{{x}}"\ncost = 2\n' for number in range(2 * MANY)])
    file = written(tmp_path / "ratelimit.toml", f'plans.default.requests = ["60/minute"]\n{routes}')
    limiter = Limiter(Settings.load(file))
    live = limiter.engine.live
    await live._look_at_file()
    freed_in: list[threading.Thread] = []
    for route in live.rules.settings.routes[::1_000]:
        weakref.finalize(route, lambda: freed_in.append(threading.current_thread()))
    del route
    before = live.rules.version
    file.write_text(file.read_text().replace("60/minute", "70/minute"))
    async with turns() as taken:
        while live.rules.version == before or _is_working():
            await live._look_at_file()
    assert len(freed_in) == 2 * MANY / 1_000
    assert threading.current_thread() not in freed_in
    assert len(taken) > MANY / 200
    await limiter.close()


async def test_thousands_of_keys_are_read_in_many_turns(redis_server: StoreServer) -> None:
    """A worker that reads all live keys does so page by page, and checks them beside the event loop."""
    backend = {"url": redis_server.url, "timeout": 5.0}
    settings = Settings.model_validate({"backend": backend})
    keys = {f"sha256:{number:064x}": KeyEntry("default", account=f"a{number}") for number in range(3 * MANY)}
    async with Limiter(settings) as one:
        await one.engine.live.set_keys(keys)
    other = Limiter(settings)
    try:
        async with turns() as taken:
            await other.engine.live.read_keys()
        assert len(other.engine.live.rules.registered) == 3 * MANY
        assert max(taken) < sum(taken) / 5
    finally:
        await other.close()


def _is_working() -> bool:
    """Whether a thread works beside the event loop."""
    return any(each.name == "ratelimit_mw" for each in threading.enumerate())
