"""Live entries as a process knows them at one version, and what changes them."""

from collections.abc import Mapping
from typing import NamedTuple

from ratelimit_mw._internal.backends.key_store import Changes
from ratelimit_mw._internal.live.network_entries import network_of
from ratelimit_mw._internal.live.timed_entries import TimedEntry, read_live
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.layered import Layered


class KnownEntries(NamedTuple):
    """Entries as this process knows them, at one version. Replaced as a whole, never changed."""

    version: bytes | None = None
    raw: Layered[bytes] = Layered()
    """Every entry as it is stored, by hash."""
    entries: Layered[KeyEntry] = Layered()
    """Every readable entry."""
    unreadable: Mapping[str, str] = {}
    """Errors of the others."""
    special: Mapping[str, KeyEntry] = {}
    """Entries of networks, and those that hold for a while."""


def merged(entries: Mapping[str, bytes], later: Changes) -> Changes:
    """All entries as they are after later changes."""
    return Changes(later.version, {**entries, **later.entries})


def differences(before: Mapping[str, bytes], now: Changes) -> Changes:
    """Find the changes, where all entries were read."""
    changed = {
        each: text for each, text in threads.in_pieces(now.entries.items(), 5_000) if before.get(each) != text
    }
    removed = [each for each in threads.in_pieces(before, 5_000) if each not in now.entries]
    return Changes(now.version, changed | dict.fromkeys(removed))


def changed(known: KnownEntries, changes: Changes) -> KnownEntries:
    """The entries once these are changed."""
    entries: dict[str, KeyEntry | None] = {}
    unreadable = {each: what for each, what in known.unreadable.items() if each not in changes.entries}
    for api_key_hash, text in threads.in_pieces(changes.entries.items()):
        entries[api_key_hash] = None
        if text is not None:
            try:
                entries[api_key_hash] = read_live(text)
            except ValueError as error:
                unreadable[api_key_hash] = str(error)
    special = {name: entry for name, entry in known.special.items() if name not in entries}
    special |= {
        name: entry
        for name, entry in threads.in_pieces(entries.items())
        if entry is not None and (isinstance(entry, TimedEntry) or network_of(name) is not None)
    }
    return KnownEntries(
        changes.version,
        known.raw.with_changes(changes.entries),
        known.entries.with_changes(entries),
        unreadable,
        special,
    )
