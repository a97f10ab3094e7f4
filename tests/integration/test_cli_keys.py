"""`ratelimit-mw keys set`, `list` and `remove`: what they change, and what they refuse."""

import asyncio
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import KeyEntry, Limiter
from ratelimit_mw._internal.cli.commands import run
from ratelimit_mw._internal.cli.output import console
from ratelimit_mw._internal.live.key_entries import write_entry
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.live import SEEN_WITHIN, stored_keys, traffic
from tests.support.processes import free_port
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

K, LISTED, TEAM = (hash_api_key(key, "s") for key in (b"k", b"listed", b"team"))
K_NAME, LISTED_NAME, TEAM_NAME = (key_partition(each) for each in (K, LISTED, TEAM))

SETTINGS = """
[identity]
hash_secret = "s"
[plans.default]
requests = ["5000/hour"]
[plans.pro]
requests = ["6000/hour"]
spending = { daily = "5.00", currency = "EUR" }
[plans.team]
share = "account"
[[keys]]
key = "listed"
plan = "pro"
account = "acme"
[[keys]]
key = "team"
plan = "team"
account = "bolt"
"""


class Commands:
    """Runs `ratelimit-mw keys` in this process, on one settings file."""

    def __init__(self, capture: pytest.CaptureFixture[str], file: Path) -> None:
        self._capture = capture
        self.file = file

    def good(self, *arguments: str) -> str:
        """Run a command that has to succeed; return its output."""
        assert run(["keys", *arguments, "--settings", str(self.file)]) == 0
        printed = self._capture.readouterr()
        assert printed.err == ""
        return printed.out

    def json(self, *arguments: str) -> Any:
        """Run a command with `--json`; return its output, parsed."""
        return json.loads(self.good(*arguments, "--json"))

    def bad(self, *arguments: str, status: int = 1) -> str:
        """The one line that a command fails with, and with which exit status."""
        assert run(["keys", *arguments, "--settings", str(self.file)]) == status
        printed = self._capture.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("ratelimit-mw: ")
        assert printed.err.count("\n") == 1
        return printed.err.removeprefix("ratelimit-mw: ").rstrip()


@pytest.fixture
def file(tmp_path: Path, redis_server: StoreServer) -> Path:
    """A settings file with plans, listed keys and a real Redis."""
    return written(tmp_path / "s.toml", f'backend = {{ url = "{redis_server.url}" }}\n{SETTINGS}')


@pytest.fixture
def keys(capsys: pytest.CaptureFixture[str], file: Path) -> Commands:
    """The commands on that file."""
    return Commands(capsys, file)


def test_set_writes_what_it_is_told(keys: Commands, redis_server: StoreServer) -> None:
    """Every option is in the entry; setting a key again replaces all of it but its account and its label."""
    printed = keys.good(
        "set", "k", "--plan", "pro", "--account", "acme", "--requests", "9/hour",
        "--requests", "1 per second", "--concurrent", "3", "--daily", "1.50", "--monthly", "20",
        "--label", "Acme, batch",
    )  # fmt: skip
    assert printed == f"{K_NAME} (Acme, batch): plan pro, in force within 2 seconds\n"
    entry = KeyEntry("pro", "acme", ("9/hour", "1 per second"), 3, "1.50", "20", "Acme, batch")
    assert stored_keys(redis_server) == {K: entry}
    assert keys.json("set", K.upper(), "--plan", "default") == {
        "set": [K],
        "callers": [K_NAME],
        "plan": "default",
        "for": None,
    }
    assert stored_keys(redis_server) == {K: KeyEntry("default", "acme", label="Acme, batch")}
    keys.good("set", "k", "--plan", "pro", "--account", "core", "--label", "Core")
    assert stored_keys(redis_server) == {K: KeyEntry("pro", "core", label="Core")}


def test_set_keeps_the_account_that_the_file_names(keys: Commands) -> None:
    """A listed key stays in its account, whether it is set for good or for a while."""
    for options in ((), ("--for", "1h")):
        keys.good("set", "listed", "--plan", "default", *options)
        live, _ = keys.json("list")["keys"]
        assert (live["plan"], live["account"]) == ("default", "acme")


def test_set_reads_a_key_from_standard_input(
    keys: Commands, redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` keeps the key out of the shell's history and the list of processes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"k\n")))
    keys.good("set", "-", "--plan", "pro")
    assert set(stored_keys(redis_server)) == {K}


def test_several_keys_are_set_at_once(keys: Commands, redis_server: StoreServer) -> None:
    """Keys that share an account can only change their plan together."""
    assert "account 'bolt' has keys of plan 'team', too" in keys.bad(
        "set", "k", "--plan", "pro", "--account", "bolt"
    )
    keys.good("set", "k", "team", "--plan", "pro", "--account", "bolt")
    assert stored_keys(redis_server) == dict.fromkeys((K, TEAM), KeyEntry("pro", "bolt"))


def test_setting_one_key_takes_no_other_out_of_force(keys: Commands, redis_server: StoreServer) -> None:
    """A plan that an account's keys share is refused while one of them has another, live or in the file."""
    keys.good("set", "k", "--plan", "pro", "--account", "core")
    before = stored_keys(redis_server)
    for account, other in (("core", K_NAME), ("acme", LISTED_NAME)):
        said = keys.bad("set", "new", "--plan", "team", "--account", account)
        assert f"--account: '{account}' has the key {other} on plan 'pro'" in said
    assert stored_keys(redis_server) == before
    keys.good("set", "new", "k", "--plan", "team", "--account", "core")
    keys.good("set", "new", "listed", "--plan", "team", "--account", "acme")
    assert {each["plan"] for each in keys.json("list")["keys"] if each["account"] == "acme"} == {"team"}
    assert [each for each in keys.json("list")["keys"] if each["problems"]] == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--plan", "prp"), "--plan: there is no plan 'prp'; expected 'default', 'anonymous', 'pro' or"),
        (("--plan", "pro", "--requests", "5/fortnight"), "--requests: '5/fortnight' is not a rate"),
        (("--plan", "pro", "--requests", "5/hour", "--requests", "6/hour"), "--requests: '6/hour' has"),
        (("--plan", "pro", "--concurrent", "0"), "--concurrent: 0 is out of range; expected at least 1"),
        (("--plan", "pro", "--daily", "-1"), "--daily: '-1' is not an amount"),
        (("--plan", "pro", "--daily", "5", "--monthly", "4"), "--monthly: '4' is less than daily"),
        (("--plan", "pro", "--account", ""), "--account: '' is not an account name"),
        (("--plan", "pro", "--label", "a\nb"), "--label: 'a\\nb' is not a label"),
        (("--plan", "team"), "--account: is missing; expected the key's account"),
        (("--plan", "team", "--account", "core", "--daily", "1"), "--daily and --monthly: is set, though"),
    ],
)  # fmt: skip
def test_set_refuses_what_the_file_would(
    keys: Commands, redis_server: StoreServer, arguments: tuple[str, ...], complaint: str
) -> None:
    """One line, in the words of the settings, with the option in place of the path; nothing is written."""
    assert complaint in keys.bad("set", "k", *arguments)
    assert stored_keys(redis_server) == {}


def test_set_needs_a_plan(keys: Commands) -> None:
    """A missing option that a command needs is wrong usage."""
    assert "Missing option '--plan'" in keys.bad("set", "k", status=2)


def test_every_mistake_is_named(keys: Commands) -> None:
    """All mistakes of one command come in its one line."""
    said = keys.bad("set", "k", "--plan", "prp", "--concurrent", "0", "--daily", "x")
    assert said.startswith("--plan: there is no plan 'prp'")
    assert "--concurrent: " in said
    assert "--daily: " in said


@pytest.mark.parametrize("command", [("set", "--plan", "pro"), ("remove",)])
def test_a_hash_of_the_wrong_kind_is_refused(keys: Commands, command: tuple[str, ...]) -> None:
    """No request's key can have it under the secret that is set."""
    assert "a hash of the wrong kind" in keys.bad(*command, f"sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("sha256:abc", "is not a hash"), ("one\ntwo", "has a line break"), ("k" * 16_385, "is too long")],
)
def test_a_key_that_no_request_can_have_is_refused(keys: Commands, key: str, wrong: str) -> None:
    """A part of a hash, two lines, more than a header holds: nothing would ever come of it."""
    assert wrong in keys.bad("set", key, "--plan", "pro")
    assert keys.json("list")["keys"][0]["from"] != "live"


def test_list_keeps_each_hash_in_one_piece(keys: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is to say of a key, its hash can be copied."""
    monkeypatch.setattr(console, "width", 80)
    keys.good("set", "listed", "--plan", "pro", "--requests", "1000/minute", "--requests", "9/second")
    assert LISTED in keys.good("list")


def test_list_tells_live_keys_and_listed_ones(keys: Commands, redis_server: StoreServer) -> None:
    """Each with what it has in place of its plan; a live key stands for the listed one that it replaces."""
    assert [(row["hash"], row["from"]) for row in keys.json("list")["keys"]] == [
        (LISTED, "keys[0]"),
        (TEAM, "keys[1]"),
    ]
    keys.good("set", "listed", "--plan", "pro", "--concurrent", "2", "--daily", "1")
    live, team = keys.json("list")["keys"]
    assert live == {
        "hash": LISTED, "network": None, "caller": LISTED_NAME, "plan": "pro", "account": "acme",
        "until": None, "then": None,
        "label": None, "requests": None, "units": None, "concurrent": 2, "daily": "1",
        "monthly": None, "currency": "EUR", "from": "live", "problems": [],
    }  # fmt: skip
    assert team["hash"] == TEAM
    printed = keys.good("list")
    assert "1 EUR a day" in printed
    assert "live" in printed


def test_list_tells_what_is_ignored_and_why(keys: Commands, redis_server: StoreServer) -> None:
    """An entry that no worker goes by is shown with the reason; a key in the clear is not shown at all."""
    with redis_server.client() as client:
        client.hset("ratelimit:{keys}", mapping={LISTED: '{"plan":"gone"}', "clear-key": "{", TEAM: "{"})
        client.set("ratelimit:{keys}:version", "1")
    live = {row["hash"]: row["problems"][0] for row in keys.json("list")["keys"] if row["from"] == "live"}
    assert live["(not a hash)"] == live[TEAM] == "is not JSON"
    assert live[LISTED].startswith("plan: there is no plan 'gone'")
    assert {row["hash"] for row in keys.json("list")["keys"] if row["from"] != "live"} == {LISTED, TEAM}
    assert "clear-key" not in keys.good("list")


def test_an_ignored_key_is_named_as_any_other(keys: Commands, redis_server: StoreServer) -> None:
    """The name in the log's line about it is enough to set or remove it, and its account's name is, too."""

    def ignored() -> list[str]:
        return [row["hash"] for row in keys.json("list")["keys"] if row["problems"]]

    entries = {K: KeyEntry("team", "core"), TEAM: KeyEntry("pro", "core")}
    for command in (("remove", TEAM_NAME), ("set", "a:core", "--plan", "pro")):
        with redis_server.client() as client:  # two processes at once
            client.hset("ratelimit:{keys}", mapping={each: write_entry(entries[each]) for each in entries})
            client.set("ratelimit:{keys}:version", "1")
        assert ignored() == [TEAM]
        assert "has keys of plan 'team', too" in keys.bad("set", TEAM_NAME, "--plan", "pro")
        keys.good(*command)
        assert ignored() == []
    assert stored_keys(redis_server) == dict.fromkeys((K, TEAM), KeyEntry("pro", "core"))


def test_remove_takes_back_what_was_set(keys: Commands, redis_server: StoreServer) -> None:
    """The key is again what the settings say, or unknown; a key that was not set is an error."""
    keys.good("set", "k", "listed", "--plan", "default")
    assert keys.good("remove", "listed") == f"{LISTED_NAME}: plan pro again, as the settings say\n"
    assert keys.good("remove", K) == f"{K_NAME}: unknown from now on\n"
    assert stored_keys(redis_server) == {}
    assert keys.bad("remove", "k") == f"{K_NAME} is not set live"
    assert keys.bad("remove", "listed") == f"{LISTED_NAME} is not set live; it is listed in {keys.file}"
    keys.good("set", "k", "--plan", "default")
    assert keys.json("remove", "k") == {"removed": [K], "callers": [K_NAME]}


def test_other_commands_know_live_keys(keys: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """`explain` and `show` tell what a live key has, and that it is live."""
    keys.good("set", "k", "listed", "--plan", "pro", "--requests", "7/hour", "--account", "core")
    settings = ("--settings", str(keys.file), "--json")
    assert run(["explain", "GET", "/", "--key", "k", *settings]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["plan"] == {"name": "pro", "from": "live"}
    assert [limit["from"] for limit in explained["limits"]] == ["live.requests", "plans.pro.spending"]
    assert run(["show", "--account", "core", *settings]) == 0
    assert len(json.loads(capsys.readouterr().out)["callers"]) == 2
    assert run(["reset", "--key", "k", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["cleared"][0]["counters"] == 2


def test_explain_says_where_live_keys_are_unknown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """While the backend is away it tells what the file says, and that it may not be all."""
    text = f'backend = {{ url = "redis://127.0.0.1:{free_port()}" }}\n{SETTINGS}'
    file = written(tmp_path / "s.toml", text)
    assert run(["explain", "GET", "/", "--key", "listed", "--settings", str(file), "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["plan"] == {"name": "pro", "from": "keys[0]"}
    assert "the backend is away" in explained["live_keys_unread"]
    assert run(["explain", "GET", "/", "--key", "listed", "--settings", str(file)]) == 0
    assert "live keys" in capsys.readouterr().out


def test_memory_has_no_keys_to_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each process has its own, where no command can reach; the listed ones are listed all the same."""
    keys = Commands(capsys, written(tmp_path / "s.toml", SETTINGS))
    for command in (("set", "k", "--plan", "pro"), ("remove", "k")):
        assert keys.bad(*command).endswith("in the memory of each process, and no command can reach them")
    assert len(keys.json("list")["keys"]) == 2
    empty = Commands(capsys, written(tmp_path / "empty.toml", "shadow = false"))
    assert empty.good("list") == "no keys\n"


def test_a_backend_that_is_away_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No traceback, and no waiting."""
    text = f'backend = {{ url = "redis://127.0.0.1:{free_port()}" }}\n{SETTINGS}'
    keys = Commands(capsys, written(tmp_path / "s.toml", text))
    for command in (("set", "k", "--plan", "pro"), ("list",), ("remove", "k")):
        assert keys.bad(*command, status=3).startswith("the backend is away: ")


async def test_two_workers_go_by_it_within_two_seconds(start_app: StartApp, file: Path) -> None:
    """The command itself, from another process, against two workers under traffic that is never refused."""
    environment = {"RATELIMIT_SETTINGS": str(file), "RATELIMIT_BACKEND__TIMEOUT": "5"}

    def command(*arguments: str) -> None:
        words = [sys.executable, "-m", "ratelimit_mw", "keys", *arguments, "--settings", str(file)]
        subprocess.run(words, check=True, capture_output=True, cwd=ROOT)

    app = start_app("tests.support.live_app:app", workers=2, environment=environment)
    async with traffic(app.url, "k") as flow:
        await flow.until_limit("5000", workers=2)
        await asyncio.to_thread(command, "set", "k", "--plan", "pro", "--requests", "7000/hour")
        assert await flow.until_limit("7000", workers=2) < SEEN_WITHIN
        await asyncio.to_thread(command, "remove", "k")
        assert await flow.until_limit("5000", workers=2) < SEEN_WITHIN


async def test_a_key_set_by_command_is_one_that_an_app_reads(keys: Commands) -> None:
    """Both sides hash under the same secret."""
    await asyncio.to_thread(keys.good, "set", "k", "--plan", "pro", "--concurrent", "4")
    async with Limiter.from_settings(keys.file) as limiter:
        overrides = limiter.engine.identity_of(api_key="k").limits
        assert overrides is not None
        assert overrides.concurrent is not None
        assert overrides.concurrent.limit == 4
