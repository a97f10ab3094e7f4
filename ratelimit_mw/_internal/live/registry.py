"""The keys that are set live: read from the backend when they change there, and kept through its outages."""

import asyncio
import logging
import random
from collections.abc import Iterable, Mapping
from functools import partial
from threading import Lock
from typing import NamedTuple

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.key_store import Changes, KeyStore
from ratelimit_mw._internal.live.key_entries import read_entry, sound_entries, write_entry
from ratelimit_mw._internal.live.sound_keys import SoundKeys
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.identity import HASH, key_partition
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.layered import Layered
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError, SettingsProblem

logger = logging.getLogger("ratelimit_mw")

POLL_SECONDS = 0.7
"""Seconds between two requests for the version: all processes see a change within two seconds."""

READ_AGAIN = 3
"""Times that all entries are read where some are written meanwhile and the log doesn't tell which."""

SPREAD_SECONDS = 1.0
"""Seconds over which workers spread their readings of many entries; the change is still seen in time."""
SPREAD_PER_ENTRY = 0.000_1
"""Seconds of that for each entry: few entries are read at once."""


class _Known(NamedTuple):
    """Entries as this process knows them, at one version. Replaced as a whole, never changed."""

    version: bytes | None = None
    raw: Layered[bytes] = Layered()
    """Every entry as it is stored, by hash."""
    entries: Layered[KeyEntry] = Layered()
    """Every readable entry."""
    unreadable: Mapping[str, str] = {}
    """Errors of the others."""


class Registry:
    """Live keys, as far as this process knows them."""

    def __init__(self, store: KeyStore) -> None:
        """Many entries are worked on in threads, so that they don't hold up the event loop."""
        self._store = store
        self._lock = Lock()
        renew_after_fork(self)
        self._known = _Known()
        self._sound: SoundKeys | None = None
        self._unchecked: set[str] = set()
        """Hashes of entries that have changed since `_sound` looked at them."""
        self._reported: set[str] = set()
        self._failure = ""

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds."""
        self._lock = Lock()

    @property
    def is_shared(self) -> bool:
        """Whether other processes can change it."""
        return self._store.is_shared

    @property
    def entries(self) -> Mapping[str, KeyEntry]:
        """Every readable entry by hash, also those that don't fit the settings."""
        return self._known.entries

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Errors of the entries that can't be read, by hash."""
        return self._known.unreadable

    @property
    def hashes(self) -> frozenset[str]:
        """The hashes of all keys that are set live, readable or not."""
        return frozenset(self._known.raw)

    async def read(self, *, spread: bool = False) -> bool:
        """Read what has changed; whether anything has. Raises `BackendError`.

        If that is not known, and all entries have to be read, workers that `spread` wait for a moment.
        """
        while True:
            known = self._known
            version = await self._store.version()
            if version == known.version:
                return False
            if version is None:
                # No command removes the version: the backend lost what it had. Customers keep their plans.
                if known.entries:
                    logger.warning(
                        "the backend lost its keys; %d are kept until it has some", len(known.entries)
                    )
                self._known = known._replace(version=None)
                return False
            changes = None if known.version is None else await self._store.changes(known.version)
            if changes is None:
                if spread:
                    most = min(SPREAD_SECONDS, SPREAD_PER_ENTRY * len(known.raw))
                    await asyncio.sleep(random.uniform(0, most))  # noqa: S311 - spreads the workers
                every = await self._read_all()
                changes = await threads.call(partial(_differences, known.raw, every))
            if self._put(known, await threads.call(partial(_changed, known, changes)), changes.entries):
                return True

    async def _read_all(self) -> Changes:
        """Read every entry, as all are at one version. Raises `BackendError`."""
        for _ in range(READ_AGAIN):
            version = await self._store.version()
            entries: dict[str, bytes | None] = {**await self._store.entries()}
            # What was changed meanwhile may have been read before or after it.
            later = None if version is None else await self._store.changes(version)
            if later is not None:
                return Changes(later.version, entries | later.entries)
            if version is not None and version == await self._store.version():
                return Changes(version, entries)
        raise BackendError("live keys were set again and again while they were read")

    def _put(self, before: _Known, now: _Known, changed: Iterable[str]) -> bool:
        """Put what was read in force, unless another event loop has read meanwhile; whether it is."""
        with self._lock:
            if self._known is not before:
                return False
            self._known = now
            self._unchecked.update(changed)
            return True

    async def poll(self) -> bool:
        """Read what has changed, and return whether anything has. If the backend is away, known keys stay."""
        try:
            changed = await self.read(spread=True)
        except BackendError as error:
            if str(error) != self._failure:
                # A backend that is away tells so itself; one that refuses this alone does not.
                level = logging.WARNING if isinstance(error, ReplyError) else logging.DEBUG
                logger.log(level, "keys could not be read (%s); %d are kept", error, len(self.entries))
            self._failure = str(error)
            return False
        self._failure = ""
        return changed

    async def set(self, entries: Mapping[str, KeyEntry | None], settings: Settings) -> None:
        """Set the entries of these hashes, and remove those that are None, all or none.

        Raises `SettingsError` for what the settings file would not take, `BackendError`.
        """
        await self.read()
        await self._store.write(await threads.call(partial(_written, entries, self.entries, settings)))
        await self.read()

    async def remove(self, hashes: Iterable[str]) -> None:
        """Remove the entries of these hashes; nothing happens where there is none. Raises `BackendError`."""
        await self._store.write(dict.fromkeys(hashes))
        await self.read()

    async def try_write(self) -> None:
        """Raise the `BackendError` that a change would fail with for want of rights."""
        await self._store.try_write()

    async def close(self) -> None:
        """Close what the running event loop has opened."""
        await self._store.close()

    def sound_under(self, settings: Settings) -> Mapping[str, KeySettings]:
        """Return the keys that can be used under these settings. Problems of the others are logged once."""
        keys, wrong = self.checked_under(settings)
        said = {
            f"key {shown_name(each)} is set live and ignored: {problem}"
            for each, problems in wrong.items()
            for problem in problems
        }
        said |= {
            f"key {shown_name(each)} is set live and ignored: it {what}"
            for each, what in self.unreadable.items()
        }
        for text in sorted(said - self._reported):
            logger.warning("%s", text)
        self._reported = said
        return keys

    def checked_under(
        self, settings: Settings
    ) -> tuple[Mapping[str, KeySettings], Mapping[str, list[SettingsProblem]]]:
        """Return the keys that can be used under these settings, and the problems of the others, by hash."""
        with self._lock:  # one limiter serves the event loops of several threads
            known, names = self._known, self._unchecked
            sound = self._sound
            if sound is None or sound.settings is not settings:
                sound, names = SoundKeys(settings), set(known.entries)
            sound.update(known.entries, names)
            self._sound, self._unchecked = sound, set()
            return sound.keys, dict(sound.problems)


def shown_hash(name: str) -> str:
    """The name of an entry, unless it is no hash: somebody may have written a key in the clear."""
    return name if HASH.fullmatch(name) else "(no hash)"


def shown_name(name: str) -> str:
    """The name that the key of an entry is shown by, with the same exception."""
    return key_partition(name) if HASH.fullmatch(name) else "(no hash)"


def _written(
    entries: Mapping[str, KeyEntry | None], present: Mapping[str, KeyEntry], settings: Settings
) -> dict[str, bytes | None]:
    """Entries as the backend keeps them, checked together with those that are present.

    Raises `SettingsError`.
    """
    kept = {each: entry for each, entry in entries.items() if entry is not None}
    accounts = {entry.account for entry in kept.values()} - {None}  # keys contradict none but those of theirs
    others = {
        each: entry
        for each, entry in threads.in_pieces(present.items(), 5_000)
        if entry.account in accounts and each not in entries
    }
    _, wrong = sound_entries({**others, **kept}, settings)
    problems = [problem for each in kept for problem in wrong.get(each, ())]
    if problems:
        raise SettingsError(problems)
    return {each: None if entry is None else write_entry(entry) for each, entry in entries.items()}


def _differences(before: Mapping[str, bytes], now: Changes) -> Changes:
    """Find the changes, where all entries were read."""
    changed = {
        each: text for each, text in threads.in_pieces(now.entries.items(), 5_000) if before.get(each) != text
    }
    removed = [each for each in threads.in_pieces(before, 5_000) if each not in now.entries]
    return Changes(now.version, changed | dict.fromkeys(removed))


def _changed(known: _Known, changes: Changes) -> _Known:
    """The entries once these are changed."""
    entries: dict[str, KeyEntry | None] = {}
    unreadable = {each: what for each, what in known.unreadable.items() if each not in changes.entries}
    for api_key_hash, text in threads.in_pieces(changes.entries.items()):
        entries[api_key_hash] = None
        if text is not None:
            try:
                entries[api_key_hash] = read_entry(text)
            except ValueError as error:
                unreadable[api_key_hash] = str(error)
    return _Known(
        changes.version,
        known.raw.with_changes(changes.entries),
        known.entries.with_changes(entries),
        unreadable,
    )
