"""The command line: what each command prints, its exit status, and one line for an error."""

import io
import json
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ratelimit_mw import Settings, __version__
from ratelimit_mw._internal import cli
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.runtime.compiled import is_compiled
from tests.support.apps import ROOT
from tests.support.commands import Commands
from tests.support.settings_files import written

GOOD = ROOT / "tests" / "settings_good"
BAD = ROOT / "tests" / "settings_bad"
FULL = str(GOOD / "ratelimit.toml")


def test_the_version_says_what_runs(commands: Commands) -> None:
    """`--version` tells the version, the Python that runs it, and whether it is compiled."""
    words = "compiled" if is_compiled() else "not compiled"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    assert commands.good("--version") == f"ratelimit-mw {__version__}, {python}, {words}\n"


def test_the_version_needs_no_extra() -> None:
    """Without the packages of the extra `cli` it is told all the same."""
    program = "import sys; sys.modules['typer'] = None; sys.argv[1:] = ['--version']\n"
    program += "from ratelimit_mw._internal.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(f"ratelimit-mw {__version__}, ")


# check ------------------------------------------------------------------------------------------


def test_check_prints_a_summary(commands: Commands) -> None:
    """A good file: exit status 0, and what it means: backend, plans, keys, routes."""
    printed = commands.good("check", FULL)
    assert printed.startswith(f"{FULL}: good\n")
    assert commands.json("check", FULL)["compiled"] is is_compiled()
    for said in ("redis://127.0.0.1:6379/0", "4 listed", "1000/minute, 20000/hour", "/v1/predictions/{id}"):
        assert said in printed


def test_check_prints_every_error(commands: Commands) -> None:
    """A bad file: exit status 1 and a line for each mistake, in the words of the loader."""
    expected = (BAD / "keys.txt").read_text().splitlines()
    status, out, error = commands.any("check", str(BAD / "keys.toml"))
    assert (status, out) == (1, "")
    assert len(error.splitlines()) == len(expected) > 1
    status, out, error = commands.any("check", str(BAD / "keys.toml"), "--json")
    assert (status, error) == (1, "")
    assert json.loads(out)["errors"][0]["path"] == "keys[0].plan"


def test_check_says_where_each_error_is(commands: Commands, tmp_path: Path) -> None:
    """File, line and column before each error, and in the JSON that editors and CI systems mark a file by."""
    text = '[plans.pro]\nrequests = [\n  "60/m",\n]\n[[routes]]\npath = "x"\n'
    file = str(written(tmp_path / "s.toml", text))
    lines = commands.any("check", file)[2].splitlines()
    assert lines[0].startswith(f"ratelimit-mw: {file}:3:3: plans.pro.requests[0]: '60/m' is not a rate")
    assert lines[0].endswith("did you mean '60/minute'?")
    assert lines[1].startswith(f"ratelimit-mw: {file}:6:1: routes[0].path: ")
    first, second = json.loads(commands.any("check", file, "--json")[1])["errors"]
    assert (first["file"], first["line"], first["column"], first["severity"]) == (file, 3, 3, "error")
    assert first["message"].startswith("plans.pro.requests[0]: '60/m' is not a rate")
    assert second["line"] == 6


def test_check_warns_of_a_method_that_is_none(commands: Commands, tmp_path: Path) -> None:
    """A typing mistake in a method is not an error, as an app may have its own, and is marked in the file."""
    text = (
        '[[routes]]\npath = "/a"\nmethods = ["PSOT"]\n[[routes]]\npath = "/b"\nmethods = ["PURGE", "QUERY"]\n'
    )
    file = str(written(tmp_path / "s.toml", text))
    assert "'PSOT' is not a method that clients use; did you mean 'POST'?" in commands.good("check", file)
    warnings = commands.json("check", file)["warnings"]
    (method,) = [each for each in warnings if each["name"] == "unknown-method"]
    assert (method["file"], method["line"], method["severity"]) == (file, 1, "warning")


@pytest.mark.parametrize(
    ("rate", "nearest"),
    [
        ("60/m", "60/minute"),
        ("5/2 h", "5/2 hour"),
        ("9 per d", "9 per day"),
        ("7/MIN", "7/minute"),
        ("1/s", "1/second"),
    ],
)
def test_check_knows_abbreviations(commands: Commands, tmp_path: Path, rate: str, nearest: str) -> None:
    """Common spellings of a unit of time are understood well enough to suggest the right one."""
    file = str(written(tmp_path / "s.toml", f'[plans.pro]\nrequests = ["{rate}"]\n'))
    (error,) = json.loads(commands.any("check", file, "--json")[1])["errors"]
    assert error["nearest"] == nearest
    written(tmp_path / "s.toml", f'[plans.pro]\nrequests = ["{nearest}"]\n')
    assert commands.good("check", file)


def test_check_warns_of_what_has_no_effect(commands: Commands) -> None:
    """Units can't be taken ahead of a plan whose every request draws on what all callers share."""
    assert "prefetch has no effect: each request draws on" in commands.good("check", FULL)
    names = [warning["name"] for warning in commands.json("check", FULL)["warnings"]]
    assert "no-effect" in names


def test_check_warns_of_a_cost_that_never_fits(commands: Commands, tmp_path: Path) -> None:
    """A route that costs more than a plan ever grants is not a mistake, but nobody can use it."""
    text = '[[routes]]\npath = "/batch"\ncost = 30\n'
    printed = commands.good("check", str(written(tmp_path / "s.toml", text)))
    assert "its cost of 30 never fits into 20/minute of plans.anonymous" in printed


def test_check_shows_no_password_and_no_secret(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check prints no password and no secret, since somebody else may see the terminal."""
    monkeypatch.setenv("RATELIMIT_BACKEND__URL", "redis://user:hunter2@h:6379/0")
    monkeypatch.setenv("RATELIMIT_IDENTITY__HASH_SECRET", "hunter2")
    for printed in (commands.good("check"), commands.good("check", "--json")):
        assert "hunter2" not in printed
        assert "redis://h:6379/0" in printed


def test_settings_come_from_the_option_else_the_environment(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--settings FILE`, else what RATELIMIT_SETTINGS names, else the built-in defaults."""
    assert commands.json("check")["source"] == "built-in defaults"
    monkeypatch.setenv("RATELIMIT_SETTINGS", str(GOOD / "minimal.toml"))
    assert commands.json("check")["source"].endswith("minimal.toml")
    assert commands.json("check", "--settings", FULL)["source"] == FULL


# explain ----------------------------------------------------------------------------------------


def test_explain_says_what_applies_and_why(commands: Commands) -> None:
    """Plan, route, price, shadow and what happens without the backend, each with its place in the file."""
    said = commands.json(
        "explain", "post", "/v1/predictions?x=1", "--key", "demo-research", "--settings", FULL
    )
    assert said["plan"] == {"name": "research", "from": "keys[2]"}
    assert said["route"] == {"rule": "POST /v1/predictions", "from": "routes[2]"}
    assert said["price"] == {"amount": "0.02", "currency": "USD"}
    assert said["shadow"] == {"value": False, "from": "plans.research.shadow"}
    assert said["on_failure"] == {"value": "allow", "from": "plans.research.on_failure"}
    assert [limit["from"] for limit in said["limits"]] == [
        "keys[2].requests",
        "plans.research.concurrent",
        "keys[2].spending",
        "application.requests",
        "application.concurrent",
        "application.units.tokens",
    ]


def test_explain_follows_route_before_plan(commands: Commands) -> None:
    """A route's own shadow and failure settings hold before those of its caller's plan."""
    said = commands.json("explain", "GET", "/v1/batch", "--address", "198.51.100.1", "--settings", FULL)
    assert said["shadow"] == {"value": True, "from": "routes[4].shadow"}
    assert said["on_failure"] == {"value": "deny", "from": "routes[4].on_failure"}
    assert said["identity"]["partition"] == "ip:198.51.100.1"
    places = {limit["from"] for limit in said["limits"]}
    assert {"routes[4].total, at plans.anonymous.application_share", "identity.per_address"} <= places


def test_explain_says_that_money_goes_first(commands: Commands) -> None:
    """A priced request follows what the budget says of failure."""
    arguments = ("explain", "POST", "/v1/predictions", "--key", "demo-enterprise-1", "--settings", FULL)
    assert commands.json(*arguments)["on_failure"] == {
        "value": "deny",
        "from": "plans.enterprise.spending.on_failure",
    }


def test_explain_prints_for_people(commands: Commands) -> None:
    """Explain prints a page for people: exempt routes, estimates, prices that nobody is charged."""
    assert "none: the route is exempt (routes[1])" in commands.good(
        "explain", "GET", "/health", "--settings", FULL
    )
    anonymous = commands.good("explain", "POST", "/v1/predictions", "--settings", FULL)
    assert "0.02, not charged: the caller has no budget" in anonymous
    assert re.search(r"^caller +ip:ADDRESS$", anonymous, re.MULTILINE)
    known = commands.good("explain", "POST", "/v1/predictions", "--key", "demo-research", "--settings", FULL)
    assert "0.02 USD until the request is settled" in known


def test_explain_says_that_a_cost_never_fits(commands: Commands, tmp_path: Path) -> None:
    """A request that is always refused is not explained as if it could be admitted."""
    file = str(written(tmp_path / "s.toml", '[[routes]]\npath = "/batch"\ncost = 30\n'))
    assert "never fits into 20/minute: always refused" in commands.good(
        "explain", "GET", "/batch", "--settings", file
    )
    assert commands.json("explain", "GET", "/batch", "--settings", file)["never_admitted"]


def test_explain_asks_no_backend(commands: Commands) -> None:
    """It works while the backend is away, and charges nothing."""
    assert commands.good("explain", "GET", "/", "--settings", FULL)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("explain", "GET", "v1"), 2, "'v1' is not a path: it begins with a slash"),
        (("explain", "GET", "/", "--address", "300.1.1.1"), 2, "'300.1.1.1' is not an address"),
        (("explain", "GET", "/", "--key", ""), 1, "the API key is empty"),
        (("explain", "GET", "/", "--key", f"hmac-sha256:{'0' * 64}"), 1, "a hash of the wrong kind"),
        (("explain", "GET"), 2, "Missing argument 'path'."),
        (("explain", "GET", "/", "--nope"), 2, "No such option"),
        (("nope",), 2, "No such command 'nope'."),
        (("keys", "nope"), 2, "No such command 'nope'."),
        (
            ("show",),
            1,
            "built-in defaults: backend.url is memory://, so counts are in the memory of each process",
        ),
        (("reset",), 2, "reset needs a caller: give CALLER, --key, --address or --account"),
        (("show", "--settings", "missing.toml"), 1, "missing.toml: there is no such file"),
        (("demo", "--port", "70000"), 2, "Invalid value for '--port'"),
    ],
)
def test_an_error_is_one_line(
    commands: Commands, arguments: tuple[str, ...], status: int, message: str
) -> None:
    """Any error of a command is told in one line; the status is 2 for wrong usage."""
    assert message in commands.bad(*arguments, status=status)


def test_settings_with_several_mistakes_are_one_line_too(commands: Commands) -> None:
    """All commands but check name the first mistake, and where to see the others."""
    message = commands.bad("explain", "GET", "/", "--settings", str(BAD / "keys.toml"))
    assert "keys[0].plan" in message
    assert re.search(r"\(and \d+ more: ratelimit-mw check\)$", message)


# keys -------------------------------------------------------------------------------------------


def test_keys_hash_prints_what_settings_take(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A key as an argument or on standard input; its hash under the secret, where there is one."""
    assert commands.good("keys", "hash", "a b\t").strip() == hash_api_key(b"a b", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"k\xff\r\n")))
    assert commands.good("keys", "hash", "-").strip() == hash_api_key(b"k\xff", "")
    secret = str(written(tmp_path / "s.toml", 'identity.hash_secret = "s"'))
    api_key_hash = commands.json("keys", "hash", "k", "--settings", secret)["hash"]
    assert api_key_hash == hash_api_key(b"k", "s")
    assert commands.good("keys", "hash", api_key_hash, "--settings", secret).strip() == api_key_hash
    listed = {"identity": {"hash_secret": "s"}, "keys": [{"hash": api_key_hash, "plan": "default"}]}
    assert Settings.model_validate(listed).keys[0].hash == api_key_hash


# the command itself -----------------------------------------------------------------------------


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m ratelimit_mw` does what `ratelimit-mw` does, exit status included."""
    command = [sys.executable, "-m", "ratelimit_mw", "check", str(BAD / "rates.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("ratelimit-mw: ")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ratelimit-mw": "ratelimit_mw._internal.cli:main"}


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A library without its extra `cli` has a command that says so in one line."""
    for module in [name for name in sys.modules if name.startswith("ratelimit_mw._internal.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(cli, "commands")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main() == 1
    assert capsys.readouterr().err == (
        'ratelimit-mw: the command line is an extra: pip install "ratelimit-mw[cli]"\n'
    )


def test_without_a_command_it_prints_help(commands: Commands) -> None:
    """The name alone, of the command or of a group of commands, prints help."""
    assert "explain" in commands.good()
    assert "hash" in commands.good("keys")


def test_ctrl_c_is_no_error(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C prints nothing, and the exit status says that the command was ended."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ratelimit_mw._internal.cli.commands.check_command.check", interrupt)
    assert commands.any("check") == (130, "", "")


def test_what_nobody_thought_of_is_one_line(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a traceback."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("ratelimit_mw._internal.cli.commands.check_command.check", fail)
    assert commands.bad("check", FULL) == "RuntimeError: first line second line"
