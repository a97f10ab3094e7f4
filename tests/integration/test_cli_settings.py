"""Tests of a command's choice of settings, and of commands whose settings file has mistakes."""

from pathlib import Path

import pytest

from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from ratelimit_mw._internal.settings import SettingsError
from ratelimit_mw._internal.settings.salvage import load_sound
from tests.support.commands import Commands
from tests.support.processes import free_port
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

GONE_WRONG = {
    "a rate": ('[plans.pro]\nrequests = ["60/minit"]', "plans.pro.requests[0]: '60/minit' is not a rate"),
    "an unknown plan": ('[[keys]]\nkey = "other"\nplan = "prp"', "there is no plan 'prp'"),
    "a hash of the wrong kind": (
        f'[[keys]]\nhash = "sha256:{"0" * 64}"\nplan = "pro"',
        "a hash of the wrong kind, since identity.hash_secret is set",
    ),
    "an unknown table": ("[plan.small]\nconcurrent = 1", "plan: unknown name"),
    "no TOML": ('[plans.small]\nrequests = ["60/minute"', "is not valid TOML"),
    "a table twice": ("[plans.default]\nconcurrent = 1", "is not valid TOML"),
    "another table": ('[response]\nreset = "unx"', "response.reset: 'unx' is not a choice"),
}


@pytest.fixture
def commands(commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    """Commands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return commands


def broken(folder: Path, url: str, mistake: str) -> Path:
    """A settings file with one mistake between what is good."""
    text = f"""
backend = {{ url = "{url}", timeout = 5, on_failure = "deny" }}
identity = {{ hash_secret = "s" }}
[plans.default]
requests = ["10/minute"]
{mistake}
[[keys]]
key = "listed"
plan = "default"
label = "Acme"
"""
    return written(folder / "broken.toml", text)


# which file -------------------------------------------------------------------------------------


def test_a_file_in_this_folder_is_found_and_named(commands: Commands, tmp_path: Path) -> None:
    """`ratelimit.toml` of the working folder, where neither the option nor the environment names another."""
    written(tmp_path / "ratelimit.toml", "[plans.mine]\nconcurrent = 1")
    status, out, error = commands.any("explain", "GET", "/")
    assert (status, error) == (0, "note: using ratelimit.toml in this folder\n")
    assert out
    assert "mine" in commands.json("check")["plans"]


def test_option_and_environment_come_before_the_folder(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settings file that is named by the option or the environment is not announced."""
    written(tmp_path / "ratelimit.toml", "")
    other = str(written(tmp_path / "other.toml", "[plans.other]\nconcurrent = 1"))
    assert commands.any("check", "--settings", other)[2] == ""
    assert "other" in commands.json("check", "--settings", other)["plans"]
    monkeypatch.setenv("RATELIMIT_SETTINGS", other)
    assert commands.any("check")[2] == ""
    assert "other" in commands.json("check")["plans"]


def test_built_in_defaults_are_announced(commands: Commands) -> None:
    """A user who forgot to name a file is told that none was read, on success and in the line of an error."""
    status, _, error = commands.any("explain", "GET", "/")
    assert status == 0
    assert error.startswith("note: using the built-in defaults: no --settings, no RATELIMIT_SETTINGS")
    assert "using the built-in defaults" in commands.bad("show", "k")


# a file with a mistake --------------------------------------------------------------------------


@pytest.mark.parametrize(("mistake", "said"), GONE_WRONG.values(), ids=GONE_WRONG)
def test_a_mistake_elsewhere_locks_nobody_out(
    commands: Commands, tmp_path: Path, redis_server: StoreServer, mistake: str, said: str
) -> None:
    """Keys, show, reset and top need the backend's place and the secret alone, and say what is wrong."""
    file = str(broken(tmp_path, redis_server.url, mistake))
    name = key_partition(hash_api_key(b"k", "s"))
    for arguments in (
        ("keys", "set", "k", "--plan", "default"),
        ("keys", "list"),
        ("show", "k"),
        ("show", name[:8]),
        ("reset", name),
        ("top",),
        ("keys", "remove", name),
        ("keys", "hash", "k"),
    ):
        status, out, error = commands.any(*arguments, "--settings", file)
        assert status == 0, error
        assert out
        assert error.startswith("note: the settings have mistakes, which this command ignores; ")
        assert said in error
        assert "running apps keep the settings that are in force" in error
    assert "Acme" in commands.good("show", "listed", "--settings", file)
    assert "mistakes" not in commands.bad("explain", "GET", "/", "--settings", file)
    assert commands.any("check", file)[0] == 1


@pytest.mark.parametrize(
    "mistake",
    [
        '[backend]\nurl = "reddis://h"',
        '[backend]\nurll = "redis://h"',
        '[backend]\nurl = "redis://h"\nnamespace = ""',
        "[identity]\nhash_secret = 5",
        '[backend]\nurl = "redis://h',
        '[identity]\nhash_secret = "',
    ],
)
def test_a_mistake_in_what_is_needed_is_an_error(commands: Commands, tmp_path: Path, mistake: str) -> None:
    """Nobody is sent to another backend, and no key is hashed under another secret."""
    file = str(written(tmp_path / "s.toml", f"{mistake}\n[plans.default]\n"))
    for arguments in (("keys", "hash", "k"), ("show", "k"), ("keys", "set", "k", "--plan", "default")):
        assert commands.bad(*arguments, "--settings", file).startswith(f"{file}: ")


def test_the_hash_is_of_the_secret_whatever_else_is_wrong(commands: Commands, tmp_path: Path) -> None:
    """The command that cures a hash of the wrong kind works on a file that has one."""
    file = str(broken(tmp_path, "redis://h", GONE_WRONG["a hash of the wrong kind"][0]))
    assert commands.good("keys", "hash", "k", "--settings", file).strip() == hash_api_key(b"k", "s")


def test_what_is_sound_stays_sound(tmp_path: Path) -> None:
    """A mistake takes no more with it than it has to, and a good file is loaded as it is."""
    text = """
[identity]
default_plan = "gone"
[plans.good]
requests = ["1/minute"]
[plans.half]
requests = ["1/minit"]
concurrent = 3
[[keys]]
key = "a"
plan = "good"
[[keys]]
key = "a"
plan = "half"
[[routes]]
path = "/x"
requests = ["5/minute"]
[[routes]]
path = "x"
"""
    settings, wrong = load_sound(str(written(tmp_path / "s.toml", text)))
    assert wrong is not None
    assert len(wrong.problems) == 4
    assert [window.text for window in settings.plans["good"].requests] == ["1/minute"]
    assert settings.plans["half"].requests == ()
    assert settings.plans["half"].concurrent is not None
    assert [key.plan for key in settings.keys] == ["good"]
    assert [route.path for route in settings.routes] == ["/x"]
    assert settings.source.endswith("s.toml")
    _, wrong = load_sound(str(written(tmp_path / "good.toml", "shadow = true")))
    assert wrong is None


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A wrong path is not made up for by defaults."""
    with pytest.raises(SettingsError, match="there is no such file"):
        load_sound(str(tmp_path / "missing.toml"))


def test_a_backend_that_is_away_keeps_the_note(commands: Commands, tmp_path: Path) -> None:
    """An error is one line, with what was noted in it."""
    file = str(broken(tmp_path, f"redis://127.0.0.1:{free_port()}", GONE_WRONG["a rate"][0]))
    message = commands.bad("show", "k", "--settings", file, status=3)
    assert message.startswith("the backend is away: ")
    assert "the settings have mistakes" in message
