"""Helpers for tests of the settings: loading a text as if it were a file."""

from pathlib import Path

import pytest

from ratelimit_mw._internal.settings import Settings, SettingsError


def load(tmp_path: Path, text: str) -> Settings:
    """Load a file with this text."""
    file = tmp_path / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return Settings.load(file)


def problems(tmp_path: Path, text: str = "") -> list[str]:
    """Return what loading a file with this text complains about, file names left out."""
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    return [str(problem).removeprefix(f"{problem.file}: ") for problem in caught.value.problems]


def written(file: Path, text: str) -> Path:
    """Write a file and return its path."""
    file.write_text(text, encoding="utf-8")
    return file
