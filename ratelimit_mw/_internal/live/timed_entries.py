"""Entries that hold for a while, and then go back by themselves to what held before.

What comes after is a part of the entry, and so is its end, by the backend's clock. So each process goes back
by itself at the same moment, whatever has become of the one that set it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from ratelimit_mw._internal.live.key_entries import read_entry, write_entry
from ratelimit_mw._internal.policy.key_entry import KeyEntry

MOST_NESTED = 20
"""Entries for a while that may lie one over the other."""


@dataclass(frozen=True, slots=True)
class TimedEntry(KeyEntry):
    """An entry that holds until a time."""

    until: float = 0.0
    """In seconds since 1970, by the backend's clock."""
    then: KeyEntry | None = None
    """The entry that holds from then on; None for what the settings say."""


def entry_at(entry: KeyEntry | None, now: float) -> KeyEntry | None:
    """The entry that holds at a time: this one, or what comes after it."""
    while isinstance(entry, TimedEntry) and entry.until <= now:
        entry = entry.then
    return entry


def timed(entry: KeyEntry, until: float, before: KeyEntry | None) -> TimedEntry:
    """Make an entry that holds until a time in place of the one that held before.

    Of that, what is over by then is left out. Raises ValueError where too many lie one over the other.
    """
    then = entry_at(before, until)
    below, depth = then, 1
    while isinstance(below, TimedEntry):
        below, depth = below.then, depth + 1
    if depth > MOST_NESTED:
        raise ValueError(
            f"has {depth} temporary changes on top of each other; expected at most {MOST_NESTED}"
        )
    values = {field.name: getattr(entry, field.name) for field in fields(KeyEntry)}
    return TimedEntry(**values, until=until, then=then)


def lasting(entry: KeyEntry) -> KeyEntry:
    """Make the same entry without an end."""
    return KeyEntry(**{field.name: getattr(entry, field.name) for field in fields(KeyEntry)})


class EntriesAt(Mapping[str, KeyEntry]):
    """The entries that hold at a time, by name; each is worked out when it is asked for."""

    __slots__ = ("_entries", "_now")

    def __init__(self, entries: Mapping[str, KeyEntry], now: float) -> None:
        self._entries, self._now = entries, now

    def __getitem__(self, name: str) -> KeyEntry:
        entry = entry_at(self._entries[name], self._now)
        if entry is None:
            raise KeyError(name)
        return entry

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._entries if entry_at(self._entries[name], self._now) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def next_end(entries: Mapping[str, KeyEntry]) -> float:
    """The time at which the first of these entries is over."""
    ends = [entry.until for entry in entries.values() if isinstance(entry, TimedEntry)]
    return min(ends, default=float("inf"))


def until_text(entries: Mapping[str, KeyEntry | None]) -> str:
    """The time until which entries hold that were set together, as text; empty where they have no end."""
    end = next_end({name: entry for name, entry in entries.items() if entry is not None})
    return f" until {time_text(end)}" if math.isfinite(end) else ""


def time_text(at: float) -> str:
    """A time in seconds since 1970, as people read it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def write_live(entry: KeyEntry) -> bytes:
    """An entry as the backend keeps it, with its end and what comes after."""
    if not isinstance(entry, TimedEntry):
        return write_entry(entry)
    values = json.loads(write_entry(lasting(entry)))
    values["until"] = entry.until
    if entry.then is not None:
        values["then"] = json.loads(write_live(entry.then))
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()


def read_live(text: bytes) -> KeyEntry:
    """The entry that `write_live` wrote. Raises ValueError for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    return _read(values, MOST_NESTED)


def _read(values: Any, depth: int) -> KeyEntry:
    if depth < 0:
        raise ValueError("has too many temporary changes on top of each other")
    if not isinstance(values, dict) or "until" not in values:
        return read_entry(json.dumps(values).encode())
    until, then = values["until"], values.get("then")
    if isinstance(until, bool) or not isinstance(until, int | float) or not math.isfinite(until):
        raise ValueError("has an `until` that is not a time")
    plain = read_entry(json.dumps({n: v for n, v in values.items() if n not in ("until", "then")}).encode())
    return timed(plain, float(until), None if then is None else _read(then, depth - 1))
