"""Networks and changes for a while, live: set by commands, in force everywhere, and back by themselves."""

import asyncio
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ratelimit_mw import KeyEntry, Limiter, RateLimitMiddleware, SettingsError
from ratelimit_mw._internal.live import registry
from ratelimit_mw._internal.live.timed_entries import TimedEntry, read_live
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from tests.conftest import StartApp, StartServer
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limited, ok_app, settings_of
from tests.support.commands import Commands
from tests.support.servers import StoreServer
from tests.support.settings_files import written
from tests.support.slots import until_async

pytestmark = pytest.mark.rerun

PLANS = """
[plans.pro]
requests = ["100/hour"]
[plans.blocked]
blocked = true
[[keys]]
key = "listed"
plan = "pro"
account = "acme"
[[addresses]]
network = "10.0.0.0/8"
plan = "pro"
"""
K, LISTED = (hash_api_key(key, "") for key in ("k", "listed"))
NETWORK = "203.0.113.0/24"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are looked at more often than in earnest."""
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.05)
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)


@pytest.fixture
def file(tmp_path: Path, server: StoreServer) -> Path:
    """A settings file with plans and a real server."""
    return written(tmp_path / "s.toml", f'backend = {{ url = "{server.url}", timeout = 5.0 }}\n{PLANS}')


def stored(server: StoreServer) -> dict[str, KeyEntry]:
    """The live entries in the server."""
    with server.client() as client:
        entries = client.hgetall("ratelimit:{keys}")
    return {each.decode(): read_live(entry) for each, entry in entries.items()}


def in_another_process(file: Path, *arguments: str) -> None:
    """Run a command in a process that has ended when this returns."""
    words = [sys.executable, "-m", "ratelimit_mw", *arguments, "--settings", str(file)]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT, timeout=60)


def plan_of(limiter: Limiter, api_key: str) -> str:
    """The plan that a key has."""
    return limiter.engine.identity_of(api_key=api_key).plan


def has_plan(limiter: Limiter, api_key: str, plan: str) -> bool:
    """Whether a key has this plan."""
    return plan_of(limiter, api_key) == plan


def plan_at(limiter: Limiter, address: str) -> str:
    """The plan of a caller without a key at an address."""
    return limiter.engine.identity_of(address=address).plan


# for a while ------------------------------------------------------------------------------------


async def test_a_change_for_a_while_goes_back_without_who_set_it(file: Path, server: StoreServer) -> None:
    """The process that set it is dead; a worker goes back to the file's plan in time, and not before."""
    async with Limiter.from_settings(file) as worker:
        assert plan_of(worker, "listed") == "pro"
        sent = time.monotonic()
        command = asyncio.create_task(
            asyncio.to_thread(
                in_another_process, file, "keys", "set", "listed", "--plan", "blocked", "--for", "4s"
            )
        )
        await until_async(lambda: plan_of(worker, "listed") == "blocked")
        assert not (await worker.acquire(api_key="listed")).allowed
        await command  # its process has ended
        await until_async(lambda: plan_of(worker, "listed") == "pro")
        assert time.monotonic() - sent >= 4
        assert (await worker.acquire(api_key="listed")).allowed
    async with Limiter.from_settings(file) as later:  # one that starts when it is over
        assert plan_of(later, "listed") == "pro"
    entry = stored(server)[LISTED]
    assert isinstance(entry, TimedEntry)
    assert entry.then is None


async def test_it_goes_back_to_what_was_set_live_before(file: Path) -> None:
    """With all of it: a live entry with limits of its own is there again."""
    own = KeyEntry("pro", account="bolt", requests=("7/hour",))
    async with Limiter.from_settings(file) as one, Limiter.from_settings(file) as other:
        await one.engine.live.set_keys({K: own})
        entries = await one.engine.live.for_a_while({K: KeyEntry("blocked")}, 1.0)
        await one.engine.live.set_keys(entries)
        assert plan_of(one, "k") == "blocked"
        await until_async(lambda: plan_of(other, "k") == "blocked")
        for limiter in (one, other):
            await until_async(partial(has_plan, limiter, "k", "pro"))
            identity = limiter.engine.identity_of(api_key="k")
            assert identity.account == "bolt"
            assert identity.limits is not None


async def test_ends_go_by_the_servers_clock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose own clock is a day wrong goes back at the same moment as any other."""
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 86_400)
    monkeypatch.setattr(registry, "time", clock)
    async with Limiter.from_settings(file) as worker:
        command = asyncio.create_task(
            asyncio.to_thread(in_another_process, file, "keys", "set", "k", "--plan", "pro", "--for", "3s")
        )
        await until_async(lambda: plan_of(worker, "k") == "pro")
        await command
        await until_async(lambda: plan_of(worker, "k") == "default")


async def test_it_goes_back_while_the_backend_is_away(start_server: StartServer, tmp_path: Path) -> None:
    """A worker knows the end, and needs nobody for it."""
    server = start_server("redis")
    file = written(tmp_path / "s.toml", f'backend.url = "{server.url}"\n{PLANS}')
    async with Limiter.from_settings(file) as worker:
        entries = await worker.engine.live.for_a_while(
            {K: KeyEntry("pro"), NETWORK: KeyEntry("blocked")}, 2.0
        )
        await worker.engine.live.set_keys(entries)
        assert (plan_of(worker, "k"), plan_at(worker, "203.0.113.7")) == ("pro", "blocked")
        server.stop()
        await until_async(lambda: plan_of(worker, "k") == "default")
        assert plan_at(worker, "203.0.113.7") == "anonymous"


async def test_entries_that_are_over_are_cleared(file: Path, server: StoreServer) -> None:
    """The next change takes them out of the backend, but for those that somebody has set again meanwhile."""
    async with Limiter.from_settings(file) as one, Limiter.from_settings(file) as other:
        live = one.engine.live
        await live.set_keys({LISTED: KeyEntry("pro")})
        names = [K, LISTED, "10.1.0.0/16"]
        await live.set_keys(await live.for_a_while({each: KeyEntry("default") for each in names}, 0.3))
        await until_async(lambda: not set(names) & set(live.in_force) - {LISTED})
        assert set(stored(server)) == set(names)
        registry_of_one = live._registry
        over = registry_of_one._over()
        await other.engine.live.set_keys({K: KeyEntry("pro")})
        await registry_of_one._store.write({NETWORK: None}, over)
        assert stored(server) == {K: KeyEntry("pro"), LISTED: KeyEntry("pro")}


async def test_too_deep_a_change_is_refused(file: Path) -> None:
    """Changes for a while that lie one over the other are bounded."""
    async with Limiter.from_settings(file) as limiter:
        live = limiter.engine.live
        for hours in range(40, 20, -1):
            await live.set_keys(await live.for_a_while({K: KeyEntry("pro")}, hours * 3600))
        with pytest.raises(SettingsError, match="on top of each other"):
            await live.for_a_while({K: KeyEntry("pro")}, 3600)


def test_commands_tell_how_long_it_holds(commands: Commands, file: Path, server: StoreServer) -> None:
    """`set`, `list`, `show`, `explain` and `audit` name the end; `remove` takes all of it back."""
    settings = ("--settings", str(file))
    commands.good("keys", "set", "k", "--plan", "pro", *settings)
    said = commands.good("keys", "set", "k", "--plan", "blocked", "--for", "2h", *settings)
    assert said.startswith(f"{key_partition(K)}: plan blocked until 20")
    assert said.endswith(" UTC, in force within 2 seconds\n")
    end = said.partition("until ")[2].partition(",")[0]
    (row,) = [each for each in commands.json("keys", "list", *settings)["keys"] if each["from"] == "live"]
    assert (row["plan"], row["then"]) == ("blocked", "pro")
    assert abs(row["until"] - time.time() - 7_200) < 60
    assert f"live until {end}, then plan pro" in commands.good("keys", "list", *settings)
    assert f"blocked (live until {end})" in commands.good("show", "k", *settings)
    assert "every request is refused with 403 (plans.blocked.blocked)" in commands.good(
        "show", "k", *settings
    )
    explained = commands.json("explain", "GET", "/", "--key", "k", *settings)
    assert explained["plan"] == {"name": "blocked", "from": f"live until {end}"}
    assert commands.json("audit", *settings)["changes"][0]["detail"] == f"plan blocked until {end}"
    commands.good("keys", "remove", "k", *settings)
    assert stored(server) == {}
    assert "is not a duration" in commands.bad(
        "keys", "set", "k", "--plan", "pro", "--for", "2", *settings, status=2
    )


async def test_the_dashboard_sets_for_a_while_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, too, a change of an address goes back by itself, and can be undone before."""
    text = PLANS + '[operations]\ndashboard_path = "/d"\ndashboard_token = "t"\ndashboard_changes = true\n'
    app = RateLimitMiddleware(ok_app(), settings=settings_of(text))
    await app.limiter.open()
    try:
        async with client_of(app, address="203.0.113.7") as caller, client_of(app) as operator:
            operator.headers["authorization"] = "Bearer t"

            async def change(path: str, **values: Any) -> httpx.Response:
                return await operator.post(f"/d/{path}", json=values)

            assert (await caller.get("/")).status_code == 200
            answer = await change("plan", caller="ip:203.0.113.7", plan="blocked", **{"for": 3600})
            told = answer.json()["change"]
            assert told["callers"] == ["203.0.113.7/32"]
            assert told["detail"].startswith("plan blocked until 20")
            assert (await caller.get("/")).status_code == 403
            page = (await change("caller", caller="ip:203.0.113.7")).json()
            assert (page["network"], page["set_live"], page["plan"]) == (
                "203.0.113.7/32",
                ["203.0.113.7/32"],
                "blocked",
            )
            assert abs(page["until"] - time.time() - 3600) < 60
            await change("undo", id=told["id"])
            assert (await caller.get("/")).status_code == 200
            await change("plan", caller="ip:203.0.113.7", plan="blocked", **{"for": 1})
            assert (await caller.get("/")).status_code == 403
            await until_async(lambda: plan_at(app.limiter, "203.0.113.7") == "anonymous")
            assert (await caller.get("/")).status_code == 200
            for wrong in (0, "1h", True, 10**12, [1]):
                assert (await change("plan", key=K, plan="pro", **{"for": wrong})).status_code == 400
            assert (await change("plan", key="203.0.113.7/24", plan="pro")).status_code == 400
    finally:
        await app.limiter.close()


# networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("203.0.113.0/24", "203.0.113.0/24"),
        ("203.0.113.7", "203.0.113.7/32"),
        ("::ffff:203.0.113.0/120", "203.0.113.0/24"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_keys_set_takes_networks(
    commands: Commands, file: Path, server: StoreServer, text: str, name: str
) -> None:
    """A network, an address, or a caller's name as it is shown; `list` and `remove` know it."""
    settings = ("--settings", str(file))
    status, out, error = commands.any(
        "keys", "set", text, "--plan", "blocked", "--label", "scraper", *settings
    )
    assert (status, out) == (0, f"{name} (scraper): plan blocked, in force within 2 seconds\n")
    assert "identity.blocked_networks refuses them, too" in error
    assert stored(server) == {name: KeyEntry("blocked", label="scraper")}
    rows = commands.json("keys", "list", *settings)["keys"]
    (row,) = [each for each in rows if each["network"] == name]
    assert (row["plan"], row["label"], row["hash"], row["from"]) == ("blocked", "scraper", None, "live")
    assert commands.json("keys", "remove", text, *settings) == {"removed": [name], "callers": [name]}
    assert stored(server) == {}
    assert commands.bad("keys", "remove", text, *settings) == f"{name} is not set live"


async def test_a_caller_who_was_seen_is_blocked_by_its_name(
    commands: Commands, file: Path, server: StoreServer
) -> None:
    """The name that is shown of it takes the entry back, too, when nothing is counted any more."""
    settings = ("--settings", str(file))
    async with Limiter.from_settings(file) as limiter:
        await limiter.acquire(address="2001:db8:0:1::5")
    name, network = "ip:2001:db8:0:1::/64", "2001:db8:0:1::/64"
    await asyncio.to_thread(commands.any, "keys", "set", name, "--plan", "blocked", *settings)
    assert set(stored(server)) == {network}
    await asyncio.to_thread(commands.good, "reset", "--address", "2001:db8:0:1::5", *settings)
    await asyncio.to_thread(commands.good, "keys", "remove", name, *settings)
    assert stored(server) == {}


def test_a_network_of_the_file_is_replaced_and_comes_back(commands: Commands, file: Path) -> None:
    """The live entry of the same network counts before the file's."""
    settings = ("--settings", str(file))
    commands.any("keys", "set", "10.0.0.0/8", "--plan", "blocked", *settings)
    assert commands.json("explain", "GET", "/", "--address", "10.1.1.1", *settings)["plan"] == {
        "name": "blocked",
        "from": "no API key: live: 10.0.0.0/8",
    }
    networks = [row for row in commands.json("keys", "list", *settings)["keys"] if row["network"]]
    assert [(row["plan"], row["from"]) for row in networks] == [("blocked", "live")]
    assert commands.good("keys", "remove", "10.0.0.0/8", *settings) == (
        "10.0.0.0/8: plan pro again, as the settings say\n"
    )
    assert commands.good("show", "--address", "10.1.1.1", *settings).count("addresses[0]: 10.0.0.0/8") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("203.0.113.7/24", "--plan", "pro"),
            "'203.0.113.7/24' has bits set beyond its prefix; did you mean '203.0.113.0/24'?",
        ),
        (("203.0.113.0/24", "--plan", "prp"), "--plan: there is no plan 'prp'"),
        (
            ("203.0.113.0/24", "--plan", "pro", "--requests", "5/hour"),
            "--requests: can't be set for a network",
        ),
        (("203.0.113.0/24", "--plan", "pro", "--account", "acme"), "--account: can't be set for a network"),
        (("ip:192.0.9", "--plan", "pro"), "no caller who is known or has counts has this name"),
    ],
)
def test_what_a_network_cannot_have(
    commands: Commands, file: Path, server: StoreServer, arguments: tuple[str, ...], complaint: str
) -> None:
    """One line says what is wrong; nothing is written."""
    assert complaint in commands.bad("keys", "set", *arguments, "--settings", str(file))
    assert stored(server) == {}


async def test_every_worker_blocks_a_network_and_frees_it(start_app: StartApp, file: Path) -> None:
    """The command against two workers: within two seconds all refuse, and after the time none does."""
    environment = {"RATELIMIT_SETTINGS": str(file)}
    app = start_app("tests.support.live_app:app", workers=2, environment=environment)
    each_its_own = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=app.url, timeout=30, limits=each_its_own) as client:

        async def last(number: int = 8) -> set[int]:
            return {(await client.get("/")).status_code for _ in range(number)}

        async def until(statuses: set[int]) -> None:
            deadline = time.monotonic() + 60
            while await last() != statuses:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)

        assert 403 not in await last()
        command = asyncio.create_task(
            asyncio.to_thread(
                in_another_process, file, "keys", "set", "127.0.0.0/8", "--plan", "blocked", "--for", "8s"
            )
        )
        await until({403})
        await command
        deadline = time.monotonic() + 60
        while 403 in await last():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def test_damaged_network_entries_are_told_and_ignored(
    file: Path, server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad entry leaves the others in force."""
    with server.client() as client:
        entries = {"10.9.0.0/16": '{"plan":"gone"}', "10.8.0.0/16": "{", NETWORK: '{"plan":"blocked"}'}
        client.hset("ratelimit:{keys}", mapping=entries)
        client.set("ratelimit:{keys}:version", "1")
    async with Limiter.from_settings(file) as limiter:
        assert [plan_at(limiter, each) for each in ("10.9.1.1", "10.8.1.1", "203.0.113.1")] == [
            "pro",
            "pro",
            "blocked",
        ]
    assert "network 10.9.0.0/16 is set live, but ignored: plan: there is no plan 'gone'" in caplog.text
    assert "network 10.8.0.0/16 is set live, but ignored: it is not JSON" in caplog.text


async def test_a_live_network_holds_for_a_hooks_nobody() -> None:
    """A caller whom `identify=` leaves to the address has the plan of the network."""
    app = limited(PLANS, FakeClock(), identify=lambda _: None)
    await app.limiter.engine.live.set_keys({NETWORK: KeyEntry("pro")})
    async with client_of(app, address="203.0.113.7") as client:
        assert (await client.get("/")).headers["x-ratelimit-limit"] == "100"
