"""The settings file, watched while the app runs: good changes apply, bad ones are reported and ignored."""

import asyncio
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.printable import printable
from ratelimit_mw._internal.settings import Settings, SettingsError, SettingsProblem
from ratelimit_mw._internal.settings.sources import parse, read_bytes

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger("ratelimit_mw")

POLL_SECONDS = 0.4
"""Seconds between two looks at the file. A change is read once two looks in a row find the file the same."""
RESTLESS_SECONDS = 0.8
"""Seconds for which a file may differ at each look before it is read all the same.

Such a file is replaced again and again."""
STILL_SECONDS = 0.05
"""Such a file is used if what was opened of it stays the same for so long: it is not being written."""
READ_SECONDS = 2.0
"""Seconds after which a look that has not come to an end is reported."""

Signature = tuple[int, ...]
"""Figures that change with a file, read through symlinks; empty if there is no file."""


class _Found(NamedTuple):
    """Result of a look at a changed file."""

    settings: Settings | None
    """None where the error says why there are none."""
    waiting: tuple[str, ...] = ()
    """Names of what has changed and applies at restart."""
    error: str = ""


class FileWatch:
    """Looks at one settings file, and says what to put in force instead of what is."""

    def __init__(self, file: str) -> None:
        """The file is read in a thread, so that no slow disk holds up the event loop."""
        self._file = file
        self._look: Future[_Found | None] | None = None
        self._is_reading = self._is_late = False
        self._seen: Signature | None = None
        self._read: Signature | None = None
        self._restless_since: float | None = None
        self._reported = ""
        self._waiting: tuple[str, ...] = ()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave a look that is under way to the parent process, and read what it may have found."""
        if self._look is not None:
            self._look, self._seen, self._read = None, None, None
        self._is_reading = False

    async def check(self, running: Settings) -> Settings | None:
        """The settings to put in force instead of the `running` ones; None where they stay.

        The environment's values stay in force. What is wrong with the file is logged once, and so is that
        it can't be read in time; it is looked at anew as soon as that has come to an end.
        """
        look = self._look
        if look is None:
            look = self._look = threads.start(partial(self._look_at_file, running))
        await asyncio.wait([asyncio.wrap_future(look)], timeout=READ_SECONDS)
        if not look.done():
            self._report_late()
            return None
        if self._look is not look:
            return None  # another event loop has seen to it
        self._look = None
        found = look.result()
        if self._is_late:
            self._is_late = False
            logger.warning("%s: the file can be read again", printable(self._file))
        if found is None:
            return None
        self._report(found.error, found.waiting)
        settings = found.settings
        if settings is None or await threads.call(partial(_is_same, settings, running)):
            return None
        return settings

    # in a thread --------------------------------------------------------------------------------

    def _look_at_file(self, running: Settings) -> _Found | None:
        """Look at the file and return the result; None if the file is as it was, or may just be written."""
        self._is_reading = True
        try:
            data = self._changed()
        except SettingsError as bad:
            return _Found(None, self._waiting, str(bad))
        finally:
            self._is_reading = False
        if data is None:
            return None
        try:
            return _Found(*_load(self._file, data, running))
        except SettingsError as bad:
            return _Found(None, self._waiting, str(bad))

    def _changed(self) -> bytes | None:
        """Return the content of the file if it is to be read now, else None. Raises `SettingsError`."""
        found = _signature(self._file)
        if found == self._read:
            self._restless_since = None
            return None
        if found == self._seen:
            self._restless_since = None
            return self._settled(found)
        self._seen = found  # somebody may be writing it just now
        now = time.monotonic()
        if self._restless_since is None:
            self._restless_since = now
        if now - self._restless_since < RESTLESS_SECONDS:
            return None
        try:
            data = read_bytes(self._file, still=STILL_SECONDS)
        except (SettingsError, BlockingIOError):
            return None  # between two of its replacements
        self._restless_since = now
        return data

    def _settled(self, found: Signature) -> bytes | None:
        try:
            data = read_bytes(self._file)
        except SettingsError:
            if _signature(self._file) != found:
                return None
            self._read = found
            raise
        if _signature(self._file) != found:
            return None
        self._read = found
        return data

    # what the log says --------------------------------------------------------------------------

    def _report_late(self) -> None:
        if self._is_reading and not self._is_late:
            self._is_late = True
            logger.error(
                "%s: the file can't be read within %g s; the previous settings stay in force",
                printable(self._file),
                READ_SECONDS,
                extra={"ratelimit": {"event": "settings_unread"}},
            )

    def _report(self, error: str, waiting: tuple[str, ...]) -> None:
        if error and error != self._reported:
            logger.error(
                "changed settings are ignored, and the previous settings stay in force:\n%s",
                error,
                extra={"ratelimit": {"event": "settings_ignored"}},
            )
        elif self._reported and not error:
            logger.warning("%s: the settings are good again", printable(self._file))
        self._reported = error
        if waiting and waiting != self._waiting:
            logger.warning(
                "%s: %s changed; the change applies at restart", printable(self._file), ", ".join(waiting)
            )
        self._waiting = waiting


def _signature(file: str) -> Signature:
    try:
        stat = Path(file).stat()
    except (OSError, ValueError):
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _load(file: str, data: bytes, running: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings of a file, and the names of changed values that apply at restart.

    Those values stay as they run. Raises `SettingsError`.
    """
    tables = parse(file, data)
    if not tables:
        # Truncated by whoever is about to write it, most likely. It must not lift every limit till then.
        raise SettingsError([SettingsProblem(file, "", "is empty", "at least one table")])
    loaded = Settings.of_file(file, tables)
    waiting = tuple(_waiting(loaded, running))
    if not waiting:
        return loaded, ()
    try:
        return loaded.with_backend_of(running), waiting
    except SettingsError as error:
        what = f"{', '.join(waiting)} changed, which applies at restart; other changes have to wait for it: "
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
