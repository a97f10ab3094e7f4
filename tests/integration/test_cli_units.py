"""Metered units on the command line and where callers read their usage, on a real Redis."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from ratelimit_mw import Limit, Limiter, RateLimitMiddleware
from tests.support.commands import Commands
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun


@pytest.fixture
def shared(tmp_path: Path, redis_server: StoreServer) -> str:
    """A settings file with a real Redis."""
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        identity = {{ hash_secret = "s" }}
        operations = {{ usage_path = "/limits" }}
        application = {{ units = {{ tokens = ["5000/minute"] }} }}
        [plans.default]
        requests = ["10/minute"]
        units = {{ tokens = ["1000/minute", "9000/day"], images = ["5/minute"] }}
        [[routes]]
        path = "/chat"
        units = {{ tokens = 400 }}
    """
    return str(written(tmp_path / "shared.toml", text))


APP = """
from starlette.applications import Starlette
from starlette.routing import Route
from ratelimit_mw import Limit, limited

@limited(Limit("exports", "7/hour"))
async def handler(request): ...

app = Starlette(routes=[Route("/exports", handler)])
"""


def test_show_and_reset_know_limits_in_the_apps_code(
    commands: Commands, shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--app`, both tell of limits in code that count by caller; without, of the others alone."""
    (tmp_path / "app_for_show.py").write_text(APP)
    monkeypatch.chdir(tmp_path)

    async def export() -> None:
        async with Limiter.from_settings(shared) as limiter:
            lease = await limiter.acquire(api_key="k")
            await lease.charge(Limit("exports", "7/hour"))
            await lease.release()

    asyncio.run(export())
    named = ["--key", "k", "--settings", shared]
    assert "exports" not in commands.good("show", *named)
    with_app = [*named, "--app", "app_for_show:app"]
    (line,) = [each for each in commands.good("show", *with_app).splitlines() if "code: exports" in each]
    assert line.split()[:2] == ["7/hour", "1"]
    commands.good("reset", *with_app)
    (line,) = [each for each in commands.good("show", *with_app).splitlines() if "code: exports" in each]
    assert line.split()[:2] == ["7/hour", "0"]


async def use(file: str, tokens: int) -> None:
    """Send a request that uses so many tokens."""
    async with (
        Limiter.from_settings(file) as limiter,
        await limiter.acquire(api_key="k", path="/chat") as lease,
    ):
        assert lease.allowed
        await lease.settle(units={"tokens": tokens})


async def usage(file: str) -> Any:
    """Return the usage that the caller reads."""
    app = RateLimitMiddleware(Starlette(), settings=file)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/limits", headers={"x-api-key": "k"})).json()
    finally:
        await app.limiter.close()


def test_commands_know_units(commands: Commands, shared: str) -> None:
    """`show` what was used, `explain` what is estimated, `check` both; `reset` clears it."""
    asyncio.run(use(shared, 120))
    (caller,) = commands.json("show", "--key", "k", "--settings", shared)["callers"]
    told = {(each.get("unit"), each["window"]): each for each in caller["limits"]}
    assert {place: each["used"] for place, each in told.items()} == {
        (None, 60): 1,
        ("tokens", 60): 120,
        ("tokens", 86_400): 120,
        ("images", 60): 0,
    }
    assert told["tokens", 60]["from"] == "plans.default.units.tokens"
    assert "9000 tokens/day" in commands.good("show", "--key", "k", "--settings", shared)
    (everybody,) = commands.json("show", "--settings", shared)["callers"]
    assert [(each["unit"], each["used"]) for each in everybody["limits"]] == [("tokens", 120)]
    assert everybody["limits"][0]["from"] == "application.units.tokens"

    explained = commands.json("explain", "POST", "/chat", "--key", "k", "--settings", shared)
    assert explained["units"] == {"tokens": 400, "images": 0}
    printed = commands.good("explain", "POST", "/chat", "--key", "k", "--settings", shared)
    assert "400 tokens until settled" in printed
    assert "1000 tokens/minute" in printed
    checked = commands.json("check", shared)
    assert checked["plans"]["default"]["units"]["images"][0]["limit"] == 5
    assert checked["routes"][0]["units"] == {"tokens": 400}

    commands.good("reset", "--key", "k", "--settings", shared)
    (caller,) = commands.json("show", "--key", "k", "--settings", shared)["callers"]
    assert {each["used"] for each in caller["limits"]} == {0}


def test_a_key_gets_units_live(commands: Commands, shared: str) -> None:
    """In place of all of its plan's; what is not a rate of a unit is an error of one line."""
    options = ["--plan", "default", "--units", "tokens=200000/minute", "--units", "tokens=10/second"]
    commands.good("keys", "set", "k", *options, "--settings", shared)
    (row,) = commands.json("keys", "list", "--settings", shared)["keys"]
    assert row["units"] == {"tokens": ["200000/minute", "10/second"]}
    (caller,) = commands.json("show", "--key", "k", "--settings", shared)["callers"]
    assert [each["policy"] for each in caller["limits"] if "unit" in each] == ["200000/minute", "10/second"]
    assert {each["from"] for each in caller["limits"] if "unit" in each} == {"live.units.tokens"}
    for wrong in ("tokens", "tokens=", "tokens=many", "Tokens=5/minute", "requests=5/minute", "=5/minute"):
        said = commands.any("keys", "set", "k", "--plan", "default", "--units", wrong, "--settings", shared)
        status, out, error = said
        assert status != 0
        assert out == ""
        assert "--units" in error
        assert error.count("\n") == 1


def test_callers_read_their_usage_of_units(shared: str) -> None:
    """By unit, with each window; never what all callers share."""
    asyncio.run(use(shared, 70))
    told = asyncio.run(usage(shared))
    assert {unit: [each["used"] for each in rates] for unit, rates in told["units"].items()} == {
        "tokens": [70, 70],
        "images": [0],
    }
    assert told["units"]["tokens"][0] == {
        "policy": "1000/minute",
        "limit": 1_000,
        "used": 70,
        "remaining": 930,
        "window": 60,
        "reset": told["units"]["tokens"][0]["reset"],
    }
    assert told["routes"] == []
