"""The keys that are set live: read from the backend when they change there, and kept through its outages."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from threading import Lock

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.key_store import KeyStore
from ratelimit_mw._internal.live.key_entries import Known, read_entry, sound_entries, write_entry
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.identity import HASH, key_partition
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError

logger = logging.getLogger("ratelimit_mw")

POLL_SECONDS = 0.7
"""Seconds between two requests for the version: all processes see a change within two seconds."""

READ_AGAIN = 3
"""Times that the entries are read anew where some were written meanwhile: keys set together come together."""


class Registry:
    """Live keys, as far as this process knows them."""

    def __init__(self, store: KeyStore) -> None:
        """Many entries are worked on in threads, so that they don't hold up the event loop."""
        self._store = store
        self._lock = Lock()
        renew_after_fork(self)
        self._version: bytes | None = None
        self._raw: dict[str, bytes] = {}
        self._known: tuple[Settings | None, Known] = (None, {})
        self._reported: set[str] = set()
        self._failure = ""
        self.entries: Mapping[str, KeyEntry] = {}
        """Every readable entry by hash, also those that don't fit the settings. Replaced, never changed."""
        self.unreadable: Mapping[str, str] = {}
        """Errors of the entries that can't be read, by hash."""

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds."""
        self._lock = Lock()

    @property
    def is_shared(self) -> bool:
        """Whether other processes can change it."""
        return self._store.is_shared

    @property
    def hashes(self) -> frozenset[str]:
        """The hashes of all keys that are set live, readable or not."""
        return frozenset(self._raw)

    async def read(self) -> bool:
        """Read what has changed; whether anything has. Raises `BackendError`."""
        version = await self._store.version()
        if version == self._version:
            return False
        if version is None:
            # No command removes the version: the backend lost what it had. Customers keep their plans.
            if self.entries:
                logger.warning("the backend lost its keys; %d are kept until it has some", len(self.entries))
            self._version = None
            return False
        raw = await self._store.entries()
        for _ in range(READ_AGAIN):
            again = await self._store.version()
            if again == version:
                break
            version, raw = again, await self._store.entries()
        parsed = await threads.call(partial(_parsed, raw, self._raw, self.entries))
        self.entries, self.unreadable = parsed
        self._raw, self._version = raw, version
        return True

    async def poll(self) -> bool:
        """Read what has changed, and return whether anything has. If the backend is away, known keys stay."""
        try:
            changed = await self.read()
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

    def sound_under(self, settings: Settings) -> dict[str, KeySettings]:
        """Return the keys that can be used under these settings. Problems of the others are logged once."""
        with self._lock:  # one limiter serves the event loops of several threads
            return self._sound_under(settings)

    def _sound_under(self, settings: Settings) -> dict[str, KeySettings]:
        made_for, known = self._known
        if made_for is not settings:
            known = {}
        sound, wrong = sound_entries(self.entries, settings, known)
        self._known = (settings, known)
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
        return sound


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
    others = {each: entry for each, entry in present.items() if each not in entries}
    _, wrong = sound_entries({**others, **kept}, settings)
    problems = [problem for each in kept for problem in wrong.get(each, ())]
    if problems:
        raise SettingsError(problems)
    return {each: None if entry is None else write_entry(entry) for each, entry in entries.items()}


def _parsed(
    raw: Mapping[str, bytes], known_raw: Mapping[str, bytes], known: Mapping[str, KeyEntry]
) -> tuple[dict[str, KeyEntry], dict[str, str]]:
    """The entries that are readable, those that didn't change taken from `known`, and what the others are."""
    entries: dict[str, KeyEntry] = {}
    unreadable: dict[str, str] = {}
    for api_key_hash, text in raw.items():
        try:
            same = api_key_hash in known and known_raw.get(api_key_hash) == text
            entries[api_key_hash] = known[api_key_hash] if same else read_entry(text)
        except ValueError as error:
            unreadable[api_key_hash] = str(error)
    return entries, unreadable
