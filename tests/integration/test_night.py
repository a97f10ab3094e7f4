"""A night on call: find who is the trouble, look, act, undo, and nobody else notices."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from tests.conftest import StartApp
from tests.support.commands import Commands
from tests.support.live import SEEN_WITHIN, Traffic, replace_file, traffic
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

WORKERS = 2


def settings(redis_url: str, small: int) -> str:
    """A settings file with so many requests an hour on the small plan."""
    return f"""
        backend = {{ url = "{redis_url}", timeout = 5 }}
        [plans.default]
        requests = ["100000/hour"]
        [plans.small]
        requests = ["{small}/hour"]
        [plans.trickle]
        requests = ["1/hour"]
        [[keys]]
        key = "small"
        plan = "small"
    """


@contextlib.asynccontextmanager
async def abuse(url: str) -> AsyncIterator[list[Traffic]]:
    """Several times the traffic of anybody else, with one key, whatever it is answered."""
    flows = [Traffic(url, "abusive") for _ in range(4)]
    tasks = [asyncio.create_task(flow.run()) for flow in flows]
    try:
        yield flows
        assert [task.exception() for task in tasks if task.done()] == []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_answered(flows: list[Traffic], status: int) -> float:
    """Wait until every answer of half a second has this status; seconds until the last other one."""
    start = time.monotonic()
    while True:
        answers = [answer for flow in flows for answer in flow.answers if answer.at > start]
        last_other = max((answer.at for answer in answers if answer.status != status), default=start)
        if any(answer.at > last_other + 0.5 for answer in answers):
            return last_other - start
        assert time.monotonic() - start < 20, f"not {status} within 20 s"
        await asyncio.sleep(0.02)


async def test_whoever_is_on_call_finds_the_abuser_and_stops_it(
    commands: Commands, tmp_path: Path, redis_server: StoreServer, start_app: StartApp
) -> None:
    """By commands alone, each in force within two seconds, and not one request of the others is refused."""
    file = written(tmp_path / "ratelimit.toml", settings(redis_server.url, 20_000))
    app = start_app(
        "tests.support.live_app:app", workers=WORKERS, environment={"RATELIMIT_SETTINGS": str(file)}
    )

    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(commands.json, *arguments, "--settings", str(file))

    async def stands_out() -> Any:
        """Wait for a caller that asks twice as much as anybody else, and return it."""
        async with asyncio.timeout(30):
            while True:
                callers = (await run("top", "-n", "2"))["callers"]
                if len(callers) == 2 and callers[0]["rate"] > 2 * callers[1]["rate"]:
                    return callers[0]
                await asyncio.sleep(0.2)

    async with traffic(app.url, "good"), traffic(app.url, "small") as small, abuse(app.url) as flows:
        await small.until_limit("20000", WORKERS)
        abuser = await stands_out()
        assert abuser["api_key_hash"] == hash_api_key(b"abusive", "")
        (shown,) = (await run("show", "--key", abuser["api_key_hash"]))["callers"]
        assert (shown["partition"], shown["plan"]) == (abuser["caller"], "default")
        assert shown["limits"][0]["used"] > 0

        await run("keys", "set", abuser["api_key_hash"], "--plan", "trickle")
        assert await until_answered(flows, 429) < SEEN_WITHIN
        replace_file(file, settings(redis_server.url, 30_000))
        assert await small.until_limit("30000", WORKERS) < SEEN_WITHIN

        async def is_seen_refused() -> bool:
            (refused,) = (await run("top", "--sort", "refused", "-n", "1"))["callers"]
            return (refused["caller"], refused["plan"]) == (abuser["caller"], "trickle")

        async with asyncio.timeout(30):
            while not await is_seen_refused():
                await asyncio.sleep(0.2)

        await run("keys", "remove", abuser["api_key_hash"])
        assert await until_answered(flows, 200) < SEEN_WITHIN
        replace_file(file, settings(redis_server.url, 20_000))
        assert await small.until_limit("20000", WORKERS) < SEEN_WITHIN
