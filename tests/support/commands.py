"""Commands of `ratelimit-mw`, run in the tests' own process."""

import json
from typing import Any

import pytest

from ratelimit_mw._internal.cli.commands import run


class Commands:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def good(self, *arguments: str) -> str:
        """Run a command that succeeds and return its output, without the notes about its settings."""
        status, out, error = self.any(*arguments)
        assert status == 0, error
        assert [line for line in error.splitlines() if not line.startswith("note: ")] == []
        return out

    def json(self, *arguments: str) -> Any:
        """Run a command with `--json`; return its output, parsed."""
        return json.loads(self.good(*arguments, "--json"))

    def bad(self, *arguments: str, status: int = 1) -> str:
        """The one line that a command fails with, and with which exit status."""
        found, out, error = self.any(*arguments)
        assert found == status, error
        assert out == ""
        assert error.startswith("ratelimit-mw: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        return error.removeprefix("ratelimit-mw: ").rstrip()

    def any(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status and what was printed on both outputs."""
        status = run(arguments)
        printed = self._capture.readouterr()
        return status, printed.out, printed.err
