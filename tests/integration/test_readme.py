"""The README, word for word: its files load, its commands run and print what it says."""

import re
import tomllib
from pathlib import Path

import pytest

import ratelimit_mw
from ratelimit_mw import Settings
from ratelimit_mw._internal.cli.commands import run
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.pages import Shell, blocks
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun

README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = blocks(README)


def test_every_link_leads_somewhere() -> None:
    """A reader who follows a link finds a file."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_settings_block_loads() -> None:
    """Text that is printed as settings is accepted as settings."""
    texts = [block.text for block in BLOCKS if block.language == "toml"]
    assert texts
    for text in texts:
        Settings(**tomllib.loads(text))


def test_every_python_block_compiles() -> None:
    """Text that is printed as Python is Python; a block without a file name stands inside a coroutine."""
    for number, block in enumerate(block for block in BLOCKS if block.language == "python"):
        is_file = block.text.startswith("# app.py\n")
        lines = (
            block.text
            if is_file
            else "async def f():\n" + re.sub(r"^", "    ", block.text, flags=re.MULTILINE)
        )
        compile(lines, f"README, Python block {number}", "exec")


def test_what_is_said_to_be_importable_is_exported() -> None:
    """The names and modules that the README tells users to import are public."""
    (paragraph,) = re.findall(
        r"^Import from `ratelimit_mw` itself: (.*?)\n\n", README, re.MULTILINE | re.DOTALL
    )
    names = set(re.findall(r"`(\w+)`", paragraph))
    assert {"RateLimitMiddleware", "get_lease"} <= names <= set(ratelimit_mw.__all__)
    for module in re.findall(r"`ratelimit_mw\.([a-z]\w+)`", paragraph):
        assert (ROOT / "ratelimit_mw" / f"{module}.py").is_file(), module


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that the README lists are those there are."""
    listed = set(re.findall(r"^\| .*", README, re.MULTILINE))
    named = {name for row in listed for name in re.findall(r"`ratelimit-mw ((?:keys )?[a-z]+)", row)}
    run([])
    run(["keys"])
    helped = re.findall(r"^  ([a-z]+) {2,}", capsys.readouterr().out, re.MULTILINE)
    assert {name.removeprefix("keys ") for name in named} == set(helped) - {"keys"}


def test_commands_that_no_test_runs_are_known() -> None:
    """Each command that is printed is run by a test, or by whoever builds the project."""
    commands = "".join(block.text for block in BLOCKS if block.language == "sh").splitlines()
    assert [command for command in commands if not command.startswith("export RATELIMIT_")] == [
        "make demo",
        'pip install ".[cli]" fastapi',
        "uvicorn app:app",
        "uvicorn app:app --workers 4",
        "make test",
    ]


@pytest.mark.once
def test_the_app_behaves_as_printed(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who types in the README, from top to bottom, sees the output that it shows."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, f"127.0.0.1:{redis_server.port}")
    shell.follow(README, start_app)
