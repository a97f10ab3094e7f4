"""`ratelimit-mw show` and `reset`, on a real Redis: what callers have used, held and left."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from tests.conftest import StartServer
from tests.support.commands import Commands
from tests.support.processes import free_port
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun


@pytest.fixture
def shared(tmp_path: Path, redis_server: StoreServer) -> str:
    """A settings file with a real Redis."""
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        application = {{ requests = ["500/minute"] }}
        [plans.default]
        requests = ["10/minute"]
        concurrent = 2
        [plans.pro]
        share = "account"
        spending = {{ daily = "1.00" }}
        [plans.each]
        requests = ["5/minute"]
        [[keys]]
        key = "a"
        plan = "pro"
        account = "acme"
        [[keys]]
        key = "b"
        plan = "each"
        account = "bolt"
        [[keys]]
        key = "c"
        plan = "each"
        account = "bolt"
        [[routes]]
        path = "/search"
        methods = ["GET"]
        requests = ["3/minute"]
        total = ["100/minute"]
        [[routes]]
        path = "/predict"
        price = "0.10"
    """
    return str(written(tmp_path / "shared.toml", text))


async def use(file: str, api_key: str, *paths: str) -> None:
    """Send requests to paths, each over before the next."""
    async with Limiter.from_settings(file) as limiter:
        for path in paths:
            async with await limiter.acquire(api_key=api_key, path=path) as lease:
                assert lease.allowed


async def in_thread(function: Any, *arguments: str) -> Any:
    """Run a command as a process of its own would: in no event loop."""
    return await asyncio.to_thread(function, *arguments)


async def test_show_tells_what_was_used_over_all_routes(commands: Commands, shared: str) -> None:
    """The plan's limits and each route's own, whatever route they were used on."""
    await use(shared, "k", "/", "/search", "/search")
    for key in ("k", hash_api_key(b"k", "")):
        said = await in_thread(commands.json, "show", "--key", key, "--settings", shared)
        (caller,) = said["callers"]
        assert caller["plan"] == "default"
        figures = [(limit["from"], limit.get("used"), limit["remaining"]) for limit in caller["limits"]]
        assert figures == [
            ("plans.default.requests", 3, 7),
            ("plans.default.concurrent", None, 2),
            ("routes[0].requests", 2, 1),
        ]
    printed = await in_thread(commands.good, "show", "--key", "k", "--settings", shared)
    assert re.search(
        r"^3/minute +2 +- +1 +in \d+ s +this caller +routes\[0\]\.requests", printed, re.MULTILINE
    )


async def test_show_tells_what_is_held(commands: Commands, shared: str) -> None:
    """Slots and money of requests that still run, of one account under any of its keys."""
    async with (
        Limiter.from_settings(shared) as limiter,
        await limiter.acquire(api_key="a", path="/predict"),
        await limiter.acquire(api_key="k", path="/"),
    ):
        for who in (("--account", "acme"), ("--key", "a")):
            (caller,) = (await in_thread(commands.json, "show", *who, "--settings", shared))["callers"]
            budget = caller["limits"][0]
            assert (budget["spent"], budget["held"], budget["remaining"]) == ("0.00", "0.10", "0.90")
        (caller,) = (await in_thread(commands.json, "show", "--key", "k", "--settings", shared))["callers"]
        assert [limit.get("active") for limit in caller["limits"]] == [None, 1, None]
        printed = await in_thread(commands.good, "show", "--account", "acme", "--settings", shared)
        assert "0.10 USD" in printed


async def test_show_tells_of_each_key_of_an_account_that_does_not_share(
    commands: Commands, shared: str
) -> None:
    """Keys that are counted one by one are shown one by one."""
    await use(shared, "b", "/")
    callers = (await in_thread(commands.json, "show", "--account", "bolt", "--settings", shared))["callers"]
    assert [caller["limits"][0]["used"] for caller in callers] == [1, 0]


async def test_show_without_a_caller_tells_of_what_all_share(commands: Commands, shared: str) -> None:
    """The application's limits and the routes' totals."""
    await use(shared, "k", "/search", "/")
    (everyone,) = (await in_thread(commands.json, "show", "--settings", shared))["callers"]
    figures = {limit["from"]: limit["used"] for limit in everyone["limits"]}
    assert figures == {"application.requests": 2, "routes[0].total": 1}


async def test_reset_clears_a_caller_and_nobody_else(commands: Commands, shared: str) -> None:
    """Everything counted of the caller is gone, what all share and what others used stays."""
    await use(shared, "k", "/search")
    await use(shared, "other", "/search")
    cleared = await in_thread(commands.json, "reset", "--key", "k", "--settings", shared)
    assert [(each["counters"], each["in_use"]) for each in cleared["cleared"]] == [(3, 2)]
    again = await in_thread(commands.good, "reset", "--key", "k", "--settings", shared)
    assert "3 counters cleared; none of them had counted anything" in again
    (caller,) = (await in_thread(commands.json, "show", "--key", "k", "--settings", shared))["callers"]
    assert [limit["remaining"] for limit in caller["limits"]] == [10, 2, 3]
    (other,) = (await in_thread(commands.json, "show", "--key", "other", "--settings", shared))["callers"]
    assert other["limits"][0]["used"] == 1
    (everyone,) = (await in_thread(commands.json, "show", "--settings", shared))["callers"]
    assert everyone["limits"][0]["used"] == 2


def test_show_of_an_unknown_account_names_the_nearest(commands: Commands, shared: str) -> None:
    """A typing mistake is not shown as an account that has used nothing."""
    message = commands.bad("show", "--account", "acm", "--settings", shared)
    assert message == "no known key belongs to account 'acm'; did you mean 'acme'?"


def test_show_of_who_is_counted_by_address_asks_for_it(
    commands: Commands, tmp_path: Path, redis_server: StoreServer
) -> None:
    """An unknown key that counts as anonymous has no counts of its own to show."""
    text = f'backend.url = "{redis_server.url}"\nidentity.unknown_keys = "anonymous"'
    file = str(written(tmp_path / "s.toml", text))
    assert "name the address with --address" in commands.bad("show", "--key", "k", "--settings", file)


def test_a_backend_that_is_away_is_one_line(commands: Commands, tmp_path: Path) -> None:
    """No traceback, no log line, and no waiting."""
    file = str(written(tmp_path / "s.toml", f'backend.url = "redis://127.0.0.1:{free_port()}"'))
    for command in ("show", "reset"):
        assert commands.bad(command, "--key", "k", "--settings", file, status=3).startswith(
            "the backend is away: "
        )


def test_a_backend_that_hangs_is_one_line(
    commands: Commands, tmp_path: Path, start_server: StartServer
) -> None:
    """A server that accepts and never answers is given up on."""
    server = start_server("redis")
    server.stop_signal()
    file = str(written(tmp_path / "s.toml", f'backend.url = "{server.url}"'))
    assert commands.bad("show", "--key", "k", "--settings", file, status=3).startswith(
        "the backend is away: "
    )
