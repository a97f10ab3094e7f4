"""The keys that are set live: read from the backend when they change there, and kept through its outages."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import NamedTuple

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.key_store import PAGE, Changes, KeyStore
from ratelimit_mw._internal.live.key_entries import sound_entries
from ratelimit_mw._internal.live.known_entries import KnownEntries, changed, differences, merged
from ratelimit_mw._internal.live.network_entries import network_of, shown_name, sound_networks
from ratelimit_mw._internal.live.sound_keys import SoundKeys
from ratelimit_mw._internal.live.timed_entries import (
    EntriesAt,
    TimedEntry,
    entry_at,
    next_end,
    timed,
    write_live,
)
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.identity import HASH
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.settings import (
    AddressSettings,
    KeySettings,
    Settings,
    SettingsError,
    SettingsProblem,
)

logger = logging.getLogger("ratelimit_mw")

POLL_SECONDS = 1.0
"""Seconds between two requests for the version: all processes see a change within two seconds."""

CLOCK_SECONDS = 60.0
"""Seconds between two looks at the backend's clock."""

READ_AGAIN = 3
"""Times that all entries are read where some are written meanwhile and the log doesn't tell which."""

SPREAD_SECONDS = 0.7
"""Seconds over which workers spread their readings of many entries; the change is still seen in time."""
SPREAD_PER_ENTRY = 0.000_1
"""Seconds of that for each entry: few entries are read at once."""


class LiveTables(NamedTuple):
    """Live entries as the settings have them."""

    keys: Mapping[str, KeySettings] = {}
    """By hash."""
    networks: Sequence[AddressSettings] = ()


class Registry:
    """Live keys, as far as this process knows them."""

    def __init__(self, store: KeyStore) -> None:
        """Many entries are worked on in threads, so that they don't hold up the event loop."""
        self._store = store
        self._lock = Lock()
        """Held for a moment, by event loops too."""
        self._checking = Lock()
        """Held as long as entries are looked at. One limiter serves the event loops of several threads."""
        renew_after_fork(self)
        self._known = KnownEntries()
        self._sound: SoundKeys | None = None
        self._unchecked: list[Iterable[str]] = []
        """Hashes of entries that have changed since `_sound` looked at them, of each change."""
        self._reported: set[str] = set()
        self._failure = ""
        self._ahead: float | None = None
        """The backend's clock, less this process's steady one; None where it is not known."""
        self._ahead_at = 0.0
        self._checked_at = 0.0
        """Time, by the backend's clock, at which `_sound` looked at the entries last."""
        self._next_end = math.inf
        """Time, by that clock, at which the first of the entries in force then is over."""

    def after_fork(self) -> None:
        """Have locks that no thread of the parent process holds."""
        self._lock, self._checking = Lock(), Lock()

    @property
    def is_shared(self) -> bool:
        """Whether other processes can change it."""
        return self._store.is_shared

    @property
    def entries(self) -> Mapping[str, KeyEntry]:
        """Every readable entry by hash or network, also those that don't fit the settings or are over."""
        return self._known.entries

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Errors of the entries that can't be read, by hash."""
        return self._known.unreadable

    @property
    def hashes(self) -> frozenset[str]:
        """The hashes and networks of all entries in force, readable or not."""
        return frozenset([*self.in_force(), *self.unreadable])

    def in_force(self) -> Mapping[str, KeyEntry]:
        """The readable entries that hold now, by hash or network."""
        return EntriesAt(self.entries, self._now())

    @property
    def is_outdated(self) -> bool:
        """Whether an entry is over that was in force when `sound_under` was asked last."""
        return self._next_end <= self._now()

    async def for_a_while(self, entries: Mapping[str, KeyEntry], seconds: float) -> dict[str, KeyEntry]:
        """Make the entries go back by themselves to what is known to hold now, after so many seconds.

        Raises `SettingsError`, `BackendError`.
        """
        until = round(await self._store.time() + seconds, 6)
        try:
            return {name: timed(entry, until, self.entries.get(name)) for name, entry in entries.items()}
        except ValueError as error:
            raise SettingsError([SettingsProblem("", "for", str(error))]) from None

    def _now(self) -> float:
        """Time by the backend's clock, as far as it is known."""
        return time.time() if self._ahead is None else time.monotonic() + self._ahead

    async def _look_at_clock(self) -> None:
        """Learn the backend's time, if there are entries whose ends go by it, now and then."""
        is_due = self._ahead is None or time.monotonic() >= self._ahead_at + CLOCK_SECONDS
        if is_due and any(isinstance(entry, TimedEntry) for entry in self._known.special.values()):
            now = await self._store.time()
            self._ahead_at = time.monotonic()
            self._ahead = now - self._ahead_at

    async def read(self, *, spread: bool = False) -> bool:
        """Read what has changed; whether anything has. Raises `BackendError`.

        If that is not known, and all entries have to be read, workers that `spread` wait for a moment.
        """
        while True:
            known = self._known
            version = await self._store.version()
            if version == known.version:
                await self._look_at_clock()
                return False
            if version is None:
                # No command removes the version: the backend lost what it had. Customers keep their plans.
                if known.entries:
                    logger.warning(
                        "the backend lost its live keys; "
                        "the %d known ones stay in force until some are set again",
                        len(known.entries),
                    )
                self._known = known._replace(version=None)
                return False
            changes = None if known.version is None else await self._store.changes(known.version)
            if changes is None:
                if spread:
                    most = min(SPREAD_SECONDS, SPREAD_PER_ENTRY * len(known.raw))
                    await asyncio.sleep(random.uniform(0, most))  # noqa: S311 - spreads the workers
                every = await self._read_all()
                changes = await threads.call(partial(differences, known.raw, every))
            # The first time requests may be waiting for them.
            now = await threads.call(partial(changed, known, changes), pauses=bool(known.entries))
            if self._put(known, now, changes.entries):
                await self._look_at_clock()
                return True

    async def _read_all(self) -> Changes:
        """Read every entry, as all are at one version. Raises `BackendError`."""
        for _ in range(READ_AGAIN):
            version = await self._store.version()
            entries = await self._store.entries()
            # What was changed meanwhile may have been read before or after it.
            later = None if version is None else await self._store.changes(version)
            if later is not None:
                return await threads.call(partial(merged, entries, later))
            if version is not None and version == await self._store.version():
                return Changes(version, entries)
        raise BackendError("live keys were set again and again while they were read")

    def _put(self, before: KnownEntries, now: KnownEntries, changed: Iterable[str]) -> bool:
        """Put what was read in force, unless another event loop has read meanwhile; whether it is."""
        with self._lock:
            if self._known is not before:
                return False
            self._known = now
            self._unchecked.append(changed)
            return True

    async def poll(self) -> bool:
        """Read what has changed, and return whether anything has. If the backend is away, known keys stay."""
        try:
            changed = await self.read(spread=True)
        except BackendError as error:
            if str(error) != self._failure:
                # A backend that is away tells so itself; one that refuses this alone does not.
                level = logging.WARNING if isinstance(error, ReplyError) else logging.DEBUG
                logger.log(
                    level,
                    "live keys could not be read (%s); the %d known ones stay in force",
                    error,
                    len(self.entries),
                )
            self._failure = str(error)
            return False
        self._failure = ""
        return changed

    async def set(self, entries: Mapping[str, KeyEntry | None], settings: Settings) -> None:
        """Set the entries of these hashes, and remove those that are None, all or none.

        Raises `SettingsError` for what the settings file would not take, `BackendError`.
        """
        await self.read()
        present = self.in_force()
        await self._store.write(
            await threads.call(partial(_written, entries, present, settings)), self._over()
        )
        await self.read()

    async def remove(self, hashes: Iterable[str]) -> None:
        """Remove the entries of these hashes; nothing happens where there is none. Raises `BackendError`."""
        await self._store.write(dict.fromkeys(hashes), self._over())
        await self.read()

    def _over(self) -> dict[str, tuple[bytes, bytes | None]]:
        """Entries that are over, as they are stored, and what comes after them: a page to be cleared."""
        now, found = self._now(), dict[str, tuple[bytes, bytes | None]]()
        for name, entry in self._known.special.items():
            then = entry_at(entry, now)
            if then is not entry and len(found) < PAGE:
                found[name] = (self._known.raw[name], None if then is None else write_live(then))
        return found

    async def try_write(self) -> None:
        """Raise the `BackendError` that a change would fail with for want of rights."""
        await self._store.try_write()

    async def close(self) -> None:
        """Close what the running event loop has opened."""
        await self._store.close()

    def sound_under(self, settings: Settings) -> LiveTables:
        """Return the entries that can be used under these settings; problems of others are logged once."""
        tables, wrong = self.checked_under(settings)
        said = {
            f"{_kind(each)} {shown_name(each)} is set live, but ignored: {problem}"
            for each, problems in wrong.items()
            for problem in problems
        }
        said |= {
            f"{_kind(each)} {shown_name(each)} is set live, but ignored: it {what}"
            for each, what in self.unreadable.items()
        }
        for text in sorted(said - self._reported):
            logger.warning("%s", text)
        self._reported = said
        return tables

    def checked_under(self, settings: Settings) -> tuple[LiveTables, Mapping[str, list[SettingsProblem]]]:
        """Return the entries that can be used under these settings, and the problems of the others."""
        with self._checking:
            with self._lock:
                known, unchecked, self._unchecked = self._known, self._unchecked, []
            names, now = {each for change in unchecked for each in change}, self._now()
            sound, self._sound = self._sound, None  # where this fails, all are looked at the next time
            if sound is None or sound.settings is not settings:
                sound, names = SoundKeys(settings), set(known.entries)
            held, before = EntriesAt(known.special, now), EntriesAt(known.special, self._checked_at)
            names |= {each for each in known.special if held.get(each) is not before.get(each)}
            sound.update(EntriesAt(known.entries, now), [each for each in names if network_of(each) is None])
            self._sound = sound
            self._checked_at, self._next_end = now, next_end(held)
            networks = {each: entry for each, entry in held.items() if network_of(each) is not None}
            of_networks, wrong = sound_networks(networks, settings)
            return LiveTables(sound.keys, of_networks), {**sound.problems, **wrong}


def shown_hash(name: str) -> str:
    """The name of an entry, unless it is not a hash: somebody may have written a key in the clear."""
    return name if HASH.fullmatch(name) else "(not a hash)"


def _kind(name: str) -> str:
    return "key" if network_of(name) is None else "network"


def _by_kind(entries: Mapping[str, KeyEntry]) -> tuple[dict[str, KeyEntry], dict[str, KeyEntry]]:
    """The entries of keys, and those of networks."""
    keys, networks = dict[str, KeyEntry](), dict[str, KeyEntry]()
    for name, entry in entries.items():
        (keys if network_of(name) is None else networks)[name] = entry
    return keys, networks


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
    networks = {each: entry for each, entry in kept.items() if network_of(each) is not None}
    keys = {each: entry for each, entry in kept.items() if each not in networks}
    wrong = sound_entries({**others, **keys}, settings)[1] | sound_networks(networks, settings)[1]
    problems = [problem for each in kept for problem in wrong.get(each, ())]
    problems = problems or [*_put_out_of_force(keys, others, settings)]
    if problems:
        raise SettingsError(problems)
    return {each: None if entry is None else write_live(entry) for each, entry in entries.items()}


def _put_out_of_force(
    keys: Mapping[str, KeyEntry], others: Mapping[str, KeyEntry], settings: Settings
) -> Iterator[SettingsProblem]:
    """Yield the other keys of an account, live and in the file, that would contradict the plan it shares."""
    shared = {
        entry.account: entry.plan for entry in keys.values() if settings.plans[entry.plan].share == "account"
    }
    if not shared:
        return
    held: dict[str, KeySettings | KeyEntry] = {key.hash: key for key in settings.keys if key.hash not in keys}
    held.update(others)
    for name, other in held.items():
        if other.account in shared and shared[other.account] != other.plan:
            yield SettingsProblem(
                "",
                "account",
                f"{other.account!r} has the key {shown_name(name)} on plan {other.plan!r}",
                "one plan for all keys of an account: name them in one command",
            )
