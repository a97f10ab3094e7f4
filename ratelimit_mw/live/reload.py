"""The settings file, watched while the app runs: good changes apply, bad ones are reported and ignored."""

import asyncio
import logging
from concurrent.futures import Executor
from pathlib import Path

from ratelimit_mw.settings import Settings, SettingsError, SettingsProblem
from ratelimit_mw.settings.sources import read_file

logger = logging.getLogger("ratelimit_mw")

POLL_SECONDS = 0.4
"""How often the file is looked at. A change is read once two looks in a row have found it the same."""

Signature = tuple[int, ...]
"""What changes with a file, through symlinks; empty where there is none."""


class FileWatch:
    """Looks at one settings file, and says what to put in force instead of what is."""

    def __init__(self, file: str, executor: Executor) -> None:
        """The file is read in a thread of `executor`, so that no slow disk holds up the event loop."""
        self._file = file
        self._executor = executor
        self._seen: Signature | None = None
        self._read: Signature | None = None
        self._reported = ""
        self._waiting: tuple[str, ...] = ()

    async def check(self, running: Settings) -> Settings | None:
        """The settings to put in force instead of the `running` ones; None where they stay.

        The environment's values stay in force. What is wrong with the file is logged once.
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._executor, _signature, self._file)
        if found == self._read:
            return None
        if found != self._seen:
            self._seen = found  # somebody may be writing it just now
            return None
        try:
            settings, waiting = await loop.run_in_executor(self._executor, _load, self._file, running)
            error = ""
        except SettingsError as bad:
            settings, waiting, error = running, self._waiting, str(bad)
        if await loop.run_in_executor(self._executor, _signature, self._file) != found:
            return None
        self._read = found
        self._report(error, waiting)
        return None if error or _is_same(settings, running) else settings

    def _report(self, error: str, waiting: tuple[str, ...]) -> None:
        if error and error != self._reported:
            logger.error(
                "changed settings are ignored, those before stay in force:\n%s",
                error,
                extra={"ratelimit": {"event": "settings_ignored"}},
            )
        elif self._reported and not error:
            logger.warning("%s: the settings are good again", self._file)
        self._reported = error
        if waiting and waiting != self._waiting:
            logger.warning("%s: %s changed, which applies at restart", self._file, ", ".join(waiting))
        self._waiting = waiting


def _signature(file: str) -> Signature:
    try:
        stat = Path(file).stat()
    except (OSError, ValueError):
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _load(file: str, running: Settings) -> tuple[Settings, tuple[str, ...]]:
    """What the file says, less what applies at restart; and the names of the latter that have changed."""
    if not read_file(file):
        # Truncated by whoever is about to write it, most likely. It must not lift every limit till then.
        raise SettingsError([SettingsProblem(file, "", "is empty", "at least one table")])
    loaded = Settings.load(file)
    waiting = tuple(_waiting(loaded, running))
    if not waiting:
        return loaded, ()
    try:
        return loaded.with_backend_of(running), waiting
    except SettingsError as error:
        what = f"{', '.join(waiting)} changed, which applies at restart, and the rest has to wait for it: "
        raise SettingsError(
            [SettingsProblem(file, each.path, what + each.what, each.expected) for each in error.problems]
        ) from None


def _waiting(loaded: Settings, running: Settings) -> list[str]:
    names = [
        f"backend.{name}"
        for name in type(loaded.backend).model_fields
        if getattr(loaded.backend, name) != getattr(running.backend, name)
    ]
    if loaded.identity.hash_secret != running.identity.hash_secret:
        names.append("identity.hash_secret (and with it the keys)")
    return names


def _is_same(settings: Settings, running: Settings) -> bool:
    return all(getattr(settings, name) == getattr(running, name) for name in type(settings).model_fields)
