"""The first steps of the docs, word for word: a newcomer who types them in sees what the page shows."""

from pathlib import Path

import pytest

from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.pages import Shell, blocks
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

PAGE = (ROOT / "docs" / "first-steps.md").read_text("utf-8")


def test_a_newcomer_sees_what_the_page_shows(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, commands and their output are as printed, from the empty folder to the shared count."""
    monkeypatch.chdir(tmp_path)
    Shell(tmp_path, f"127.0.0.1:{redis_server.port}").follow(PAGE, start_app)


def test_commands_that_no_test_runs_are_known() -> None:
    """Each command of the page is run here, or makes the environment that the tests run in."""
    commands = "".join([block.text for block in blocks(PAGE) if block.language == "sh"]).splitlines()
    assert [command for command in commands if not command.startswith("export RATELIMIT_")] == [
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        'pip install "ratelimit-mw[cli]" fastapi',
        "uvicorn app:app",
        "uvicorn app:app --workers 2",
    ]
