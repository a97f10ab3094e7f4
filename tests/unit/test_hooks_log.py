"""Refusals in the log: few lines, each with fields that programs read, and never a key."""

import asyncio
import logging
from typing import Any

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.observe.refusal_log import RefusalLog
from tests.conftest import StartServer
from tests.support.asgi import FakeClock, limited_client, settings_of, statuses

SHADOW = """
shadow = true
plans.default = { requests = ["2/minute"], concurrent = 1 }
plans.pro = { requests = ["1/minute"] }
keys = [{ key = "pro-key", plan = "pro" }]
routes = [{ path = "/v1/{x}" }]
"""


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def limiter_at(clock: Clock, text: str = SHADOW) -> Limiter:
    """A limiter whose log goes by this clock."""
    limiter = Limiter(settings_of(text))
    limiter.engine.decider.log_refusal = RefusalLog(clock)
    return limiter


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The structured fields of all records that have some."""
    return [record.__dict__["ratelimit"] for record in caplog.records if hasattr(record, "ratelimit")]


async def ask(limiter: Limiter, times: int, key: str = "secret-key", path: str = "/v1/x") -> None:
    """So many requests, one after the other."""
    for _ in range(times):
        await (await limiter.acquire(api_key=key, path=path)).release()


async def test_what_shadow_mode_lets_through_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A line says who would have been refused, where and by what, for people and for programs."""
    limiter = limiter_at(Clock())
    await ask(limiter, 3)
    caller = limiter.engine.identity_of(api_key="secret-key").partition
    assert fields(caplog) == [
        {
            "event": "shadow",
            "caller": caller,
            "plan": "default",
            "route": "/v1/{x}",
            "reason": "rate",
            "limit": "2/minute",
            "count": 1,
        }
    ]
    assert caplog.records[-1].levelno == logging.WARNING
    assert f"caller='{caller}' plan='default' route='/v1/{{x}}'" in caplog.text
    assert "secret-key" not in caplog.text


async def test_a_flood_is_one_line_a_second_with_its_number(caplog: pytest.LogCaptureFixture) -> None:
    """Of each plan and reason the first is logged at once, the others are counted into the next line."""
    clock = Clock()
    limiter = limiter_at(clock)
    await ask(limiter, 2 + 100)
    await ask(limiter, 1 + 10, "pro-key")
    clock.now = 0.999
    await ask(limiter, 5)
    assert [(each["plan"], each["count"]) for each in fields(caplog)] == [("default", 1), ("pro", 1)]
    clock.now = 1.0
    await ask(limiter, 3)
    assert [(each["plan"], each["count"]) for each in fields(caplog)][2:] == [("default", 105)]
    clock.now = 60.0
    await ask(limiter, 1, "pro-key")
    assert fields(caplog)[3]["count"] == 10


async def test_reasons_have_lines_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    """A flood of one kind doesn't hide another."""
    limiter = limiter_at(Clock())
    async with await limiter.acquire(api_key="a"):
        await limiter.acquire(api_key="a")
        await limiter.acquire(api_key="a", cost=3)
    assert [(each["reason"], each["limit"]) for each in fields(caplog)] == [
        ("concurrency", "slots"),
        ("cost", "2/minute"),
    ]


async def test_refusals_are_logged_for_who_debugs(caplog: pytest.LogCaptureFixture) -> None:
    """At level DEBUG each refusal is a line; at any other there is none."""
    text = SHADOW.replace("shadow = true", "")
    async with limited_client(text, FakeClock(), x_api_key="secret-key") as client:
        with caplog.at_level(logging.INFO, "ratelimit_mw"):
            assert await statuses(client, 4, "/v1/x") == [200, 200, 429, 429]
        assert fields(caplog) == []
        with caplog.at_level(logging.DEBUG, "ratelimit_mw"):
            assert await statuses(client, 2, "/v1/x") == [429, 429]
    assert [(each["event"], each["limit"]) for each in fields(caplog)] == [("refused", "2/minute")] * 2
    assert "secret-key" not in caplog.text


async def test_nobody_writes_lines_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A log record is one line without control characters, whatever path or address a caller sends."""
    evil = "evil\nWARNING forged\x1b[31m"
    limiter = limiter_at(Clock(), 'shadow = true\nplans.anonymous = { requests = ["1/minute"] }')
    for _ in range(2):
        await limiter.acquire(address=evil, path=f"/{evil}")
    (record,) = [each for each in caplog.records if hasattr(each, "ratelimit")]
    assert record.getMessage().isprintable()


async def test_changes_of_state_are_events(
    caplog: pytest.LogCaptureFixture, start_server: StartServer
) -> None:
    """Changes of state can be filtered in the log by their event, without reading texts."""
    server = start_server("valkey")
    text = 'plans.default.spending.daily = "1.00"\nroutes = [{path = "/", price = "0.10"}]'
    backend = RedisBackend(server.url, timeout=0.5)
    with caplog.at_level(logging.INFO, "ratelimit_mw"):
        async with Limiter(settings_of(text), backend=backend) as limiter:
            lease = await limiter.acquire(api_key="a")
            await lease.settle("0.05")
            await lease.settle("0.06")
            limiter.apply(settings_of(f"shadow = true\n{text}"))
            server.stop()
            await limiter.acquire(api_key="a")
            server.restart()
            async with asyncio.timeout(20):
                while backend.is_away:
                    await asyncio.sleep(0.05)
            version = limiter.version
    settle, settings, away, back = fields(caplog)
    assert settle == {"event": "settle_ignored", "lease": lease.id, "reason": "different"}
    assert settings == {"event": "settings_in_force", "version": version}
    assert (away, back) == ({"event": "backend_away"}, {"event": "backend_back"})
