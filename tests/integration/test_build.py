"""An installation succeeds wherever Python is, whatever becomes of what could be compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ratelimit_mw._internal.runtime.compiled import PURE
from tests.support.apps import ROOT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without anything compiled."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "ratelimit_mw", copy / "ratelimit_mw", ignore=ignored)
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def wheel_of(source: Path) -> tuple[str, str]:
    """The name of the wheel that a source makes, and what the build said."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "out"]
    environment = {name: value for name, value in os.environ.items() if name != PURE}
    done = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (wheel,) = (source / "out").glob("*.whl")
    return wheel.name, said


def test_sources_that_the_compiler_rejects_break_no_installation(source: Path) -> None:
    """The package is installed uncompiled, and the build says so."""
    broken = [*source.rglob("*.pyx"), *source.rglob("*.pxd")]
    assert broken
    for file in broken:
        file.write_text(f"{file.read_text('utf-8')}\ncdef this is none (\n", encoding="utf-8")
    name, said = wheel_of(source)
    assert name.endswith("-none-any.whl")
    assert "Nothing is compiled" in said
