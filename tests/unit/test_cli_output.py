"""Output of commands: long tables page by page, with a bar where somebody waits at a terminal; encodings."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ratelimit_mw._internal.cli.output import PAGE, print_table
from tests.support.apps import ROOT
from tests.support.settings_files import written

KEYS = 2 * PAGE + 1


def test_a_long_table_comes_page_by_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row once and in its order, each page under headings of its own."""
    print_table(("number", "square"), [(number, number**2) for number in range(KEYS)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.count(["number", "square"]) == 3
    rows = [tuple(map(int, line)) for line in lines if line and line[0].isdigit()]
    assert rows == [(number, number**2) for number in range(KEYS)]


@pytest.fixture
def list_keys(tmp_path: Path) -> Sequence[str]:
    """A command that prints more keys than fit on a page."""
    keys = "".join(f'[[keys]]\nkey = "{number}"\nplan = "default"\n' for number in range(KEYS))
    file = written(tmp_path / "s.toml", keys)
    return (sys.executable, "-m", "ratelimit_mw", "keys", "list", "--settings", str(file))


@pytest.mark.once
def test_a_bar_shows_how_far_a_file_is(list_keys: Sequence[str], tmp_path: Path) -> None:
    """It is drawn on the terminal alone; the file holds the table and nothing else."""
    terminal, far_end = pty.openpty()
    with (tmp_path / "keys.txt").open("wb") as out:
        environment = {**os.environ, "TERM": "xterm"}
        command = subprocess.Popen(list_keys, stdout=out, stderr=far_end, cwd=ROOT, env=environment)
        os.close(far_end)
        drawn = b""
        while data := read(terminal):
            drawn += data
        assert command.wait(timeout=60) == 0
    os.close(terminal)
    text = (tmp_path / "keys.txt").read_text()
    assert b"printing" in drawn
    assert b"100%" in drawn
    assert "\x1b" not in text
    assert "printing" not in text
    assert text.count("sha256:") == KEYS


@pytest.mark.once
def test_no_bar_goes_into_a_log(list_keys: Sequence[str]) -> None:
    """Without a terminal, standard error stays empty."""
    command = subprocess.run(list_keys, capture_output=True, cwd=ROOT, check=True, timeout=120)
    assert command.stderr == b""
    assert command.stdout.count(b"sha256:") == KEYS


def read(terminal: int) -> bytes:
    """Return drawn output; nothing once the command has ended."""
    try:
        return os.read(terminal, 65_536)
    except OSError:
        return b""


@pytest.mark.once
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_that_lacks_a_character_fails_no_command(tmp_path: Path, encoding: str) -> None:
    """Characters outside the encoding are escaped, in JSON as JSON escapes them."""
    plan = "b\u00fcro \u2603"
    file = written(
        tmp_path / "s.toml", f'[plans."{plan}"]\n[[keys]]\nkey = "a"\nplan = "{plan}"\nlabel = "\u03a9"'
    )

    def output_of(*arguments: str) -> str:
        command = subprocess.run(
            (sys.executable, "-m", "ratelimit_mw", *arguments),
            check=False,
            capture_output=True,
            cwd=ROOT,
            timeout=120,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert (command.returncode, command.stderr) == (0, b"")
        return command.stdout.decode(encoding)

    request = ("explain", "GET", "/\u2603", "--key", "a", "--settings", str(file))
    shown = plan.encode(encoding, "backslashreplace").decode(encoding)
    assert shown in output_of(*request)
    assert shown in output_of("check", str(file))
    assert json.loads(output_of(*request, "--json"))["plan"]["name"] == plan
