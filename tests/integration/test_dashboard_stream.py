"""The stream of figures, from real servers: what it tells, when it ends, and what many of them cost."""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.dashboard import stream as streams
from ratelimit_mw._internal.fleet import FleetView
from tests.conftest import StartApp, StartServer
from tests.support.dashboards import BEARER, SETTINGS, TOKEN, environment, stream
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

APP = "tests.support.served:app"
PATIENCE = 20.0


async def ask(url: str, key: str, times: int) -> Counter[int]:
    """So many requests with a key, on several connections, by status."""
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=30) as client:
        answers = await asyncio.gather(*[client.get("/") for _ in range(times)])
    return Counter(answer.status_code for answer in answers)


def _outcomes(snapshot: dict[str, Any]) -> tuple[int, int]:
    """Requests admitted and refused in the last minute, of all plans together."""
    plans = snapshot["plans"]
    return sum(plan["admitted"] for plan in plans), sum(sum(plan["refused"].values()) for plan in plans)


async def test_its_figures_are_those_of_the_traffic_to_all_workers(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """First the whole history, then news: within a refresh or two they say what the callers count."""
    server = start_app(APP, workers=2, environment=environment(tmp_path, redis_server.url))
    async with stream(server) as events:
        name, first = await events.next()
        assert (name, len(first["series"]), first["changes"]) == ("full", 720, True)
        assert (first["backend"]["kind"], first["backend"]["up"]) == ("redis", True)
        counted = await ask(server.url, "steady", 100) + await ask(server.url, "greedy", 40)
        counted += await ask(server.url, "greedy", 40)
        give_up = time.monotonic() + PATIENCE
        name, news = await events.next()
        while _outcomes(news) != (counted[200], counted[429]):
            assert time.monotonic() < give_up, f"{_outcomes(news)} and not {counted}"
            name, news = await events.next()
        assert name == "news"
        assert len(news["series"]) <= streams.NEWS
        assert {plan["plan"]: plan["admitted"] for plan in news["plans"]}["big"] == 100
        worst = max(news["callers"], key=lambda caller: sum(caller["refused"].values()))
        assert sum(worst["refused"].values()) == counted[429] > 0
        assert worst["plan"] == "default"
        assert len(news["workers"]) == 2


@pytest.mark.parametrize("workers", [1, 2])
async def test_open_streams_do_not_hold_up_a_server_that_stops(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer, workers: int
) -> None:
    """A server waits for open responses before it tells an app of its stop: they end by themselves."""
    server = start_app(APP, workers=workers, environment=environment(tmp_path, redis_server.url))
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(stream(server)) for _ in range(4)]
        for events in opened:
            await events.next()
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        start = time.monotonic()
        for events in opened:
            await events.drain()
        assert time.monotonic() - start < 5.0
        await stopping
    assert "Traceback" not in server.log


async def test_a_changed_token_ends_open_streams(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """A changed token shuts out everybody who came in by the old one, with the page open."""
    server = start_app(APP, environment=environment(tmp_path, redis_server.url))
    async with stream(server) as events:
        await events.next()
        (tmp_path / "dashboard.toml").write_text(SETTINGS.replace(TOKEN, "another"))
        async with asyncio.timeout(PATIENCE):
            await events.drain()
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/ops/snapshot", headers=BEARER)).status_code == 401


async def test_a_stream_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server that says nothing of its end doesn't wait for ever; the page opens another."""
    monkeypatch.setattr(streams, "STREAM_SECONDS", 1.5)
    limiter = Limiter()
    sent = [each async for each in streams.Stream(FleetView(limiter)).events(dict)]
    assert sent[0] == b"retry: 1000\n\n"
    assert [each.partition(b"\n")[0] for each in sent[1:]] == [b"event: full", b"event: news"]
    await limiter.close()


async def test_it_goes_on_while_the_backend_is_away(
    tmp_path: Path, start_app: StartApp, start_server: StartServer
) -> None:
    """The page stays, says that the backend is away, and has figures again when it is back."""
    backend = start_server("redis")
    server = start_app(APP, environment=environment(tmp_path, backend.url))
    async with stream(server) as events, asyncio.timeout(3 * PATIENCE):
        await events.next()
        backend.kill()
        while (await events.next())[1]["partial"] is None:
            pass
        async with httpx.AsyncClient(base_url=server.url, headers=BEARER) as client:
            answer = await client.post("/ops/caller", json={"caller": "k:0"})
            assert answer.status_code == 503
            assert "does not answer" in answer.json()["error"]
        backend.restart()
        while (await events.next())[1]["partial"] is not None:
            pass
    assert "Traceback" not in server.log


async def test_a_hundred_pages_ask_the_backend_no_more_than_one(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """All pages that a process serves share one reading a second."""
    server = start_app(APP, environment=environment(tmp_path, redis_server.url))
    seconds = 4.0

    def commands() -> int:
        with redis_server.client() as client:
            return int(client.info("stats")["total_commands_processed"])

    async def commands_while_open(pages: int) -> int:
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(stream(server)) for _ in range(pages)]
            await asyncio.gather(*[events.next() for events in opened])
            reading = [asyncio.create_task(events.drain()) for events in opened]
            before = commands()
            await asyncio.sleep(seconds)
            after = commands()
            assert not [task for task in reading if task.done()]
            for task in reading:
                task.cancel()
            await asyncio.wait(reading)
        return after - before

    one = await commands_while_open(1)
    hundred = await commands_while_open(100)
    assert hundred < 1.5 * one + 20, f"{one} commands in {seconds} s with one page, {hundred} with 100"
