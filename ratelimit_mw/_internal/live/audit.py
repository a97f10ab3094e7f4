"""Changes by operators: who changed what and when, and what was there before, so that it can be undone."""

import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ratelimit_mw._internal.backends.audit_store import AuditStore
from ratelimit_mw._internal.live.timed_entries import read_live, write_live
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime.printable import printable

logger = logging.getLogger("ratelimit_mw")

SHOWN = 100
"""Changes that are read unless told otherwise."""
MOST_UNDONE = 100
"""Keys of a change beyond which it can't be undone, so that its record stays small."""

Action = Literal["plan", "take-back", "reset", "undo"]
Entries = Mapping[str, KeyEntry | None]
"""Live keys by hash; None for one that is not set."""


class Change(NamedTuple):
    """One change."""

    id: str
    at: float
    """In seconds since 1970."""
    who: str
    """The token's name and the address, or the user and the host of a command."""
    action: Action
    callers: tuple[str, ...]
    """Names of those who are concerned."""
    detail: str
    before: Mapping[str, str | None] | None = None
    """Text that was set live for each key before the change; None if the change can't be undone."""
    after: Mapping[str, str | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the entries."""
        values = self._asdict()
        del values["before"], values["after"]
        return {**values, "callers": list(self.callers), "can_undo": self.before is not None}


class AuditLog:
    """Records changes in the backend, and in the log of this process."""

    def __init__(self, store: AuditStore) -> None:
        self._store = store

    async def add(
        self,
        who: str,
        action: Action,
        callers: Iterable[str],
        detail: str,
        entries: tuple[Entries, Entries] | None = None,
    ) -> Change:
        """Record a change, with the entries before and after it where it can be undone.

        Raises `BackendError`.
        """
        before, after = (None, None) if entries is None else (_texts(entries[0]), _texts(entries[1]))
        if before is not None and len(before) > MOST_UNDONE:
            before = after = None
        names = tuple(callers)
        change = Change(secrets.token_hex(8), time.time(), who, action, names, detail, before, after)
        logger.warning(
            "change: %s: %s, by %s", printable(", ".join(names)), printable(detail), printable(who)
        )
        await self._store.add(change.at, json.dumps(change._asdict(), separators=(",", ":")).encode())
        return change

    async def latest(self, number: int = SHOWN) -> list[Change]:
        """The latest changes, newest first; what is not a record is left out. Raises `BackendError`."""
        found = [_change(text) for text in await self._store.latest(number)]
        return [change for change in found if change is not None]

    async def find(self, change_id: str) -> Change | None:
        """One of the latest changes. Raises `BackendError`."""
        return next((each for each in await self.latest(10 * SHOWN) if each.id == change_id), None)

    async def close(self) -> None:
        """Close what the running event loop has opened."""
        await self._store.close()


def entries_of(texts: Mapping[str, str | None]) -> dict[str, KeyEntry | None]:
    """Entries as a change has them. Raises ValueError for what is none."""
    return {each: None if text is None else read_live(text.encode()) for each, text in texts.items()}


def _texts(entries: Entries) -> dict[str, str | None]:
    return {each: None if entry is None else write_live(entry).decode() for each, entry in entries.items()}


def _change(text: bytes) -> Change | None:
    """A change as it was recorded; None for what others may have written there."""
    try:
        values = json.loads(text)
        change = Change(**{**values, "callers": tuple(map(str, values["callers"]))})
        float(change.at)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (change.id, change.who, change.action, change.detail)
    return change if all(isinstance(each, str) for each in texts) else None
