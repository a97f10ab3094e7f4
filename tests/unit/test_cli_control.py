"""No command and no log prints a character of outside texts that a terminal would obey."""

import json
import logging
from pathlib import Path

import pytest

from ratelimit_mw import Settings
from ratelimit_mw._internal.checks.startup import log_findings
from ratelimit_mw._internal.settings import SettingsError, SettingsProblem, findings
from tests.support.commands import Commands
from tests.support.servers import StoreServer
from tests.support.settings_files import written

NASTY = "\x1b[31m\x9b2J\u202e\x07"
"""Colours, a cleared screen, writing from the right, a bell."""


@pytest.fixture
def file(tmp_path: Path, redis_server: StoreServer) -> str:
    """Settings with such characters in the one name that may have them, and in a key that is set live."""
    entry = {"plan": f"pro{NASTY}", "account": f"acme{NASTY}"}
    with redis_server.client() as client:
        client.hset("ratelimit:{keys}", f"sha256:{'0' * 64}", json.dumps(entry))
        client.hset("ratelimit:{keys}", f"sha256:{'1' * 64}", f'{{"plan": "pro", "x{NASTY}": 1}}')
        client.set("ratelimit:{keys}:version", "1")
    path = json.dumps(f"/a{NASTY}/{{id")
    text = f'backend.url = "{redis_server.url}"\n[[routes]]\npath = {path}\ncost = 900\n'
    return str(written(tmp_path / "s.toml", text))


def is_harmless(text: str) -> bool:
    """Whether a terminal does nothing with it but show it."""
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ("explain", f"G{NASTY}", f"/a{NASTY}/{{id"),
        ("explain", "GET", "/%1b%5b31m%c2%9b"),
        ("keys", "list"),
        ("check",),
        ("show", "--key", "k"),
        ("show",),
        ("top", "--once"),
    ],
    ids=" ".join,
)
def test_nothing_is_printed_raw(
    commands: Commands, file: str, command: tuple[str, ...], *, as_json: bool
) -> None:
    """Paths, methods, plans and accounts are shown without what a terminal would obey."""
    json_option = ["--json"] if as_json else []
    _, out, error = commands.any(*command, "--settings", file, *json_option)
    assert out or error
    assert is_harmless(out)
    assert is_harmless(error)
    if as_json and out:
        json.loads(out)


@pytest.mark.parametrize(
    "command",
    [
        ("explain", "GET", f"a{NASTY}"),
        ("show", "--key", f"sha256:{NASTY}"),
        ("show", "--account", f"acme{NASTY}"),
        ("show", "--address", f"1{NASTY}"),
        ("keys", "set", "k", "--plan", f"pro{NASTY}"),
        ("keys", "set", "k", "--plan", "default", "--requests", f"5/{NASTY}"),
        (f"nonsense{NASTY}",),
        ("check", f"/no{NASTY}"),
    ],
    ids=" ".join,
)
def test_no_error_is_printed_raw(commands: Commands, file: str, command: tuple[str, ...]) -> None:
    """The line that a command fails with is one line, whatever it was given."""
    more = [] if command[0] in ("check", f"nonsense{NASTY}") else ["--settings", file]
    status, out, error = commands.any(*command, *more)
    assert status != 0
    assert is_harmless(out)
    assert is_harmless(error)
    assert error.count("\n") == 1


def test_json_says_what_was_there(commands: Commands, file: str) -> None:
    """Programs get every character, escaped."""
    explained = commands.json("explain", "GET", f"/a{NASTY}/{{id", "--settings", file)
    assert explained["path"] == f"/a{NASTY}/{{id"


def test_findings_and_problems_are_logged_harmless(
    file: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in a finding or in a settings error can't forge a line of the log."""
    monkeypatch.setattr(findings, "_said", set())
    with caplog.at_level(logging.INFO):
        log_findings(Settings.load(file))
    assert "cost of 900" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    problem = SettingsProblem(f"s{NASTY}\n.toml", f"a{NASTY}", f"is{NASTY}", f"b{NASTY}", f"c{NASTY}")
    assert str(problem).isprintable()
    assert str(SettingsError([problem])).isprintable()
