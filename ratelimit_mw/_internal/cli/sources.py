"""Sources of a command's settings: `--settings`, `RATELIMIT_SETTINGS`, `ratelimit.toml` here, or none."""

import os
from pathlib import Path

from ratelimit_mw._internal.cli.output import note
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.salvage import load_sound

HERE = "ratelimit.toml"
"""The file that is looked for in the working folder."""


def settings_file(named: str | None) -> str | None:
    """The settings file of a command, None for the built-in defaults; what was not named is noted."""
    if named is not None:
        return named
    if os.environ.get("RATELIMIT_SETTINGS"):
        return None  # which `Settings.load` reads itself
    if Path(HERE).is_file():
        note(f"using {HERE} in this folder")
        return HERE
    note(
        "using the built-in defaults: no --settings, no RATELIMIT_SETTINGS, and no ratelimit.toml in this "
        "folder"
    )
    return None


def load(named: str | None) -> Settings:
    """The settings of a command, which have to be good. Raises `SettingsError`."""
    return _remembered(Settings.load(settings_file(named)))


def load_usable(named: str | None) -> Settings:
    """The settings of a command that needs the backend's place and the hash secret alone.

    What is wrong with anything else is noted and left out. Raises `SettingsError`.
    """
    settings, wrong = load_sound(settings_file(named))
    if wrong is not None:
        more = len(wrong.problems) - 1
        others = f" (and {more} more: ratelimit-mw check)" if more else ""
        note(
            "the settings have mistakes, which this command ignores; running apps keep the settings that are "
            f"in force. The first mistake: {wrong.problems[0]}{others}"
        )
    return _remembered(settings)


def last_loaded() -> Settings | None:
    """The settings that the command goes by, as far as it came."""
    return _loaded[-1] if _loaded else None


_loaded: list[Settings] = []


def _remembered(settings: Settings) -> Settings:
    _loaded[:] = [settings]
    return settings
