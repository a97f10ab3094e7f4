"""Pages that a reader types in: their blocks, and a shell that follows them from top to bottom."""

import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tests.support.apps import ROOT

if TYPE_CHECKING:
    from tests.conftest import StartApp


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]


class MakeModule(Protocol):
    """Runs the block of a page that begins with `# NAME.py`, and returns it as a module."""

    def __call__(self, name: str) -> Any:
        """Make the module of this name, which other blocks can import."""
        ...


@contextmanager
def modules_of(page: str) -> Iterator[MakeModule]:
    """Make modules of the Python blocks of a page; they are gone at the end."""
    made: list[str] = []

    def module(name: str) -> Any:
        (code,) = re.findall(rf"^ *```python\n( *# {name}\.py\n.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
        found = sys.modules[name] = types.ModuleType(name)
        made.append(name)
        exec(compile(dedent(code), f"{name}.py", "exec"), vars(found))
        return found

    try:
        yield module
    finally:
        for name in made:
            sys.modules.pop(name, None)


def write_settings(page: str, folder: Path) -> Path:
    """Write the one TOML block of a page to a settings file in this folder."""
    (text,) = [block.text for block in blocks(page) if block.language == "toml"]
    file = folder / "ratelimit.toml"
    file.write_text(text, encoding="utf-8")
    return file


class Shell:
    """Place in which a reader types: a folder, an environment and an app."""

    def __init__(self, folder: Path, redis: str) -> None:
        self.folder = folder
        self.commands = folder / "bin"
        self.commands.mkdir()
        # The project need not be installed where its tests run.
        command = self.commands / "ratelimit-mw"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ratelimit_mw "$@"\n')
        command.chmod(0o755)
        self.redis = redis
        self.port = 0
        self.environment = {"PYTHONPATH": str(ROOT)}

    def follow(self, page: str, start_app: "StartApp") -> None:
        """Write the files of a page, start its app, and compare what its commands print."""
        for block in blocks(page):
            if block.language in ("python", "toml"):
                self.write(block.text)
            elif block.language == "console":
                self.check(block.text)
            elif "uvicorn app:app" in block.text:
                self.export(block.text)
                options = ("--app-dir", str(self.folder))
                self.port = start_app("app:app", *options, environment=self.environment).port

    def write(self, text: str) -> None:
        """Write a file, if its first line names one."""
        named = re.match(r"# (app\.py|ratelimit\.toml)\n", text)
        if named:
            (self.folder / named[1]).write_text(text, encoding="utf-8")

    def export(self, text: str) -> None:
        """Set what a block exports."""
        for name, value in re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE):
            self.environment[name] = self._here(value)

    def check(self, text: str) -> None:
        """Run each command of a block and compare what it prints: `…` stands for anything."""
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            printed = self._run(self._here(command))
            assert re.fullmatch(_pattern(self._here(expected)), printed), f"{command} printed:\n{printed}"

    def _here(self, text: str) -> str:
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}").replace("127.0.0.1:6379", self.redis)

    def _run(self, command: str) -> str:
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **self.environment}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.returncode == 0, f"{command} failed:\n{done.stderr}"
        return _plain(done.stdout)


def _pattern(expected: str) -> str:
    """Times pass: any time since 1970 is as good as the one that is printed."""
    pattern = re.escape(_plain(expected))
    return re.sub(r"1795\d{6}", r"\\d{10}", pattern).replace("…", r"[\s\S]*?")


def _plain(text: str) -> str:
    """Without what depends on the longest value of a table."""
    return re.sub(" {2,}", " ", re.sub("─+", "─", "\n".join(map(str.rstrip, text.rstrip().splitlines()))))
