"""Tests of the command line's own help: examples in each help, and completions for a shell."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Commands
from tests.support.processes import free_port
from tests.support.settings_files import written

COMMANDS = [
    (), ("check",), ("schema",), ("explain",), ("show",), ("reset",), ("top",), ("routes",), ("demo",),
    ("keys",), ("keys", "set"), ("keys", "list"), ("keys", "remove"), ("keys", "hash"),
]  # fmt: skip

NAME = "k:ca978112ca1bbdcafac231b39a23dc4d"
"""Of the API key `a` without a secret."""


@pytest.fixture
def commands(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return commands


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Settings with plans and a key, whose backend is away."""
    text = f"""
        backend.url = "redis://127.0.0.1:{free_port()}"
        [plans.pro]
        [plans.proper]
        [plans.other]
        [[keys]]
        key = "a"
        plan = "pro"
        account = "acme"
        label = "Acme, batch"
    """
    return str(written(tmp_path / "s.toml", text))


def completed(*words: str) -> list[str]:
    """Return the completions that a shell offers after these words, the last of which is incomplete."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RATELIMIT_")}
    line = "\n".join(["ratelimit-mw", *words])
    asked = {"_RATELIMIT_MW_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    code = "import sys; sys.argv = ['ratelimit-mw']; from ratelimit_mw._internal.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples_that_are_commands(commands: Commands, command: tuple[str, ...]) -> None:
    """Each example is one that the command itself takes: no unknown option, no missing argument."""
    printed = commands.good(*command, "--help")
    lines = printed[printed.index("Examples:") :].splitlines()[1:]
    examples = [shlex.split(line.strip()) for line in lines if line.strip()]
    assert examples
    for program, *words in examples:
        assert program == "ratelimit-mw"
        assert tuple(words[: len(command)]) == command
        assert commands.any(*words, "--help")[0] == 0
        status, _, error = commands.any(*words, "--no-such-option")
        assert (status, "--no-such-option" in error) == (2, True), error


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("keys", "set", "x", "--settings", "{file}", "--plan", "pr"), ["pro", "proper"]),
        (("top", "--settings", "{file}", "--plan", ""), ["default", "anonymous", "pro", "proper", "other"]),
        (("show", "--settings", "{file}", "k:ca9"), [NAME]),
        (("keys", "remove", "--settings", "{file}", "k:"), [NAME]),
        (("show", "--settings", "{file}", "--account", "a"), ["acme"]),
        (("show", "--settings", "{folder}/"), ["{file}"]),
        (("check", "{folder}/s"), ["{file}"]),
        (("keys", "set", "x", "--settings", "{folder}/missing.toml", "--plan", ""), []),
    ],
)
@pytest.mark.once
def test_a_shell_completes(file: str, words: tuple[str, ...], offered: list[str]) -> None:
    """Plans, known callers, accounts and settings files; with a backend that is away, what the file knows."""
    place = {"file": file, "folder": str(Path(file).parent)}
    assert completed(*(word.format(**place) for word in words)) == [each.format(**place) for each in offered]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("show", "k", ":", "ca"), "ca978112ca1bbdcafac231b39a23dc4d"),
        (("show", "k", ":"), "ca978112ca1bbdcafac231b39a23dc4d"),
        (("keys", "set", "ip", ":", "2001", ":", "db8", "::", "--plan", "=", "oth"), "other"),
        (("keys", "set", "k", ":", "ca", "--plan", "oth"), "other"),
    ],
)
@pytest.mark.once
def test_bash_completes_what_it_takes_apart(file: str, typed: tuple[str, ...], offered: str) -> None:
    """The script that bash is given completes names of callers, though bash ends a word at each colon.

    The variables are set as bash's manual says ("Programmable Completion", `COMP_WORDS`).
    """
    words = shlex.join(["ratelimit-mw", *typed])
    script = f"""
        eval "$(SHELL=/bin/bash ratelimit-mw --show-completion)"
        COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _ratelimit_mw_completion ratelimit-mw
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RATELIMIT_SETTINGS": file}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [offered], done.stderr
