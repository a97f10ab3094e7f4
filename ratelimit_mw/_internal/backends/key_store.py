"""Store of live keys, kept beside the counts: raw entries by hash, a version, and a log of what has changed.

Unlike counts, entries never expire: they are configuration.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ratelimit_mw._internal.backends.connecting.clients import Clients
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.runtime import threads

if TYPE_CHECKING:
    from ratelimit_mw._internal.backends.connecting.client import Client

PAGE = 1_000
"""Entries written in one command, so that none takes the server long."""
READ_PAGE = 250
"""Entries read in one command, so that neither the server nor an event loop is held long."""
MOST_TRIES = 50
"""Number of times that a write is sent while other processes write as well."""
LOGGED = 2_000
"""Records that the log of changes keeps: one for each entry that has changed, and one for each change."""


class Changes(NamedTuple):
    """Changes between two versions."""

    version: bytes
    """The later of the two."""
    entries: Mapping[str, bytes | None]
    """Every entry that has changed, as it is at that version; None for one that was removed."""


Over = Mapping[str, tuple[bytes, bytes | None]]
"""Entries that are over, by name: each as it was read, and what comes after it; None for nothing."""


class KeyStore(Protocol):
    """Live keys. Every method that fails raises `BackendError` and nothing else."""

    is_shared: bool
    """Whether other processes read and write it, too."""

    async def version(self) -> bytes | None:
        """Return the version, which changes with every entry; None before the first, and if all was lost."""

    async def changes(self, since: bytes) -> Changes | None:
        """Return all that has changed since a version, whole changes only; None where that isn't known."""

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash. Whoever reads the version first never misses a change."""

    async def write(self, entries: Mapping[str, bytes | None], over: Over | None = None) -> None:
        """Set these entries, and remove those that are None, all at once.

        Of entries that are `over`, those still as they were read are replaced, by what comes after them.
        """

    async def time(self) -> float:
        """Seconds since 1970, by the clock that the ends of entries go by."""

    async def try_write(self) -> None:
        """Raise what `write` would fail with for want of rights. Nothing is written."""

    async def close(self) -> None:
        """Close what the running event loop has opened; it may be used again."""


class MemoryKeyStore:
    """Keys of one process; nothing shared, nothing kept."""

    is_shared = False

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self._version: bytes | None = None

    async def version(self) -> bytes | None:
        """Return the version, which changes whenever an entry does."""
        return self._version

    async def changes(self, since: bytes) -> Changes | None:
        """Nothing is logged: all entries are at hand."""

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash."""
        return dict(self._entries)

    async def write(self, entries: Mapping[str, bytes | None], over: Over | None = None) -> None:
        """Set these entries, and remove those that are None."""
        after = {name: then for name, (read, then) in (over or {}).items() if self._entries.get(name) == read}
        for name, entry in {**after, **entries}.items():
            if entry is None:
                self._entries.pop(name, None)
            else:
                self._entries[name] = entry
        self._version = _new_version()

    async def time(self) -> float:
        """Seconds since 1970, by this machine's clock."""
        return time.time()

    async def try_write(self) -> None:
        """Nobody needs rights here."""

    async def close(self) -> None:
        """There is nothing to close."""


class RedisKeyStore:
    """Keys in one hash of a Redis or Valkey.

    `<namespace>:{keys}` has a field for each API key's hash; `<namespace>:{keys}:version` and
    `<namespace>:{keys}:changes` are written in the same transaction as any of them. The braces keep all on
    one node of a cluster.
    """

    is_shared = True

    def __init__(self, new_client: "Callable[[], Client]", namespace: str) -> None:
        from ratelimit_mw._internal.backends.redis.script import get_script  # noqa: PLC0415 - not in memory

        self._script = get_script
        self._hash = keys_hash(namespace)
        self._version_key = f"{self._hash}:version"
        self._log = f"{self._hash}:changes"
        self._clients = Clients(new_client)

    async def version(self) -> bytes | None:
        """Return the version, which changes whenever an entry does."""
        version = await self._clients.get().execute("GET", self._version_key, is_short=True)
        if version is None or isinstance(version, bytes):
            return version
        raise BackendError(f"{version!r} is not a version of live keys")

    async def changes(self, since: bytes) -> Changes | None:
        """Return all that has changed since a version, whole changes only; None where that isn't known.

        As long as the log has the record of that version, it has every later one: the oldest go first.
        """
        client, known = self._clients.get(), b"v" + since
        async with client.reading():
            (position,) = await client.ask([("ZSCORE", self._log, known)], is_short=True)
            records: list[bytes] = []
            while position is not None:
                later = (f"({int(position)}", "+inf", "BYSCORE", "LIMIT", 0, READ_PAGE, "WITHSCORES")
                version, page, is_logged = await client.ask(
                    [("GET", self._version_key), ("ZRANGE", self._log, *later), ("ZSCORE", self._log, known)],
                    is_short=True,
                )
                records += page[::2]
                if is_logged is None:
                    break
                if len(page) < 2 * READ_PAGE:
                    return _read_records(records, since, version)
                position = page[-1]
        return None

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash. Between two pages the server has as much time for others as for each page."""
        entries: dict[str, bytes] = {}
        cursor = 0
        client = self._clients.get()
        loop = asyncio.get_running_loop()
        async with client.reading():
            while True:
                start = loop.time()
                cursor, page = await client.execute("HSCAN", self._hash, cursor, "COUNT", READ_PAGE)
                entries.update({_text(field): bytes(value) for field, value in page.items()})
                if not int(cursor):
                    return entries
                await asyncio.sleep(loop.time() - start)

    async def write(self, entries: Mapping[str, bytes | None], over: Over | None = None) -> None:
        """Set these entries, and remove those that are None, in one transaction.

        Where the version changes meanwhile, as another process writes too, the transaction is sent again.
        So one that was given up, and is executed late, changes nothing after a newer one.
        """
        client = self._clients.get()
        commands = await threads.call(lambda: self._commands(entries, over or {}))
        for waits in range(MOST_TRIES):
            if await client.transact(commands, self._version_key):
                return
            await asyncio.sleep(random.uniform(0, 0.01 * waits))  # noqa: S311 - spreads the writers
        raise BackendError("others change the live keys at the same time, again and again")

    async def time(self) -> float:
        """Seconds since 1970, by the server's clock."""
        seconds, microseconds = await self._clients.get().execute("TIME", is_short=True)
        return int(seconds) + int(microseconds) / 1_000_000

    async def try_write(self) -> None:
        """Raise what `write` would fail with for want of rights. Nothing is written."""
        commands = [
            ("HDEL", self._hash, "-"),
            ("HSET", self._hash, "-", "-"),
            ("EVAL", "return 0", 3, self._hash, self._log, self._version_key),
            ("HGET", self._hash, "-"),
            ("SET", self._version_key, "-"),
        ]
        await self._clients.get().try_out(commands, self._version_key)

    def _commands(
        self, entries: Mapping[str, bytes | None], over: Over
    ) -> list[tuple[str | bytes | int, ...]]:
        """Return the commands that write entries, many in one command, log the change and set a version."""
        commands: list[tuple[str | bytes | int, ...]] = []
        over = {name: each for name, each in over.items() if name not in entries}
        old = iter([(name.encode(), read, then or b"") for name, (read, then) in over.items()])
        while some := tuple(islice(old, PAGE)):
            commands.append(
                (
                    "EVAL",
                    self._script("replace_entries").text,
                    1,
                    self._hash,
                    *[part for item in some for part in item],
                )
            )
        removed = iter([each for each, entry in entries.items() if entry is None])
        while hashes := tuple(islice(removed, PAGE)):
            commands.append(("HDEL", self._hash, *hashes))
        kept = iter([(each, entry) for each, entry in entries.items() if entry is not None])
        while page := tuple(islice(kept, PAGE)):
            commands.append(("HSET", self._hash, *[part for item in page for part in item]))
        keys = (self._hash, self._log, self._version_key)
        too_many = len(entries) + len(over) >= LOGGED
        names = () if too_many else (*entries, *over)
        return [
            *commands,
            ("EVAL", self._script("changes").text, 3, *keys, _new_version(), LOGGED, int(too_many), *names),
        ]

    async def close(self) -> None:
        """Close the connection of the running event loop."""
        await self._clients.close()


def keys_hash(namespace: str) -> str:
    """The key of the hash that holds all entries."""
    return f"{namespace}:{{keys}}"


def _read_records(records: list[bytes], since: bytes, version: Any) -> Changes | None:
    """Read what the log has of the changes since a version; None where it lacks one that was set before."""
    entries: dict[str, bytes | None] = {}
    versions = [since]
    for each in records:
        kind, text = each[:1], each[1:]
        if kind == b"v":
            versions.append(text)
        elif kind == b"=":
            name, _, entry = text.partition(b"\0")
            entries[_text(name)] = entry
        else:
            entries[_text(text)] = None
    # Others may set a version and log nothing.
    return Changes(versions[-1], entries) if version in versions else None


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _new_version() -> bytes:
    """Make a version: random, since a server that lost data must not come back to one that was known."""
    return secrets.token_hex(8).encode()
