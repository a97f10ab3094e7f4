"""Store of live keys, kept beside the counts: raw entries by hash, and a version that changes with them.

Unlike counts, entries never expire: they are configuration.
"""

import secrets
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from ratelimit_mw._internal.backends.connecting.client import Client
from ratelimit_mw._internal.backends.connecting.clients import Clients
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.runtime import threads

PAGE = 1_000
"""Entries read or written in one command, so that none takes the server long."""


class KeyStore(Protocol):
    """Live keys. Every method that fails raises `BackendError` and nothing else."""

    is_shared: bool
    """Whether other processes read and write it, too."""

    async def version(self) -> bytes | None:
        """Return the version, which changes with every entry; None before the first, and if all was lost."""

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash. Whoever reads the version first never misses a change."""

    async def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Set these entries, and remove those that are None, all at once."""

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

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash."""
        return dict(self._entries)

    async def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Set these entries, and remove those that are None."""
        for api_key_hash, entry in entries.items():
            if entry is None:
                self._entries.pop(api_key_hash, None)
            else:
                self._entries[api_key_hash] = entry
        self._version = _new_version()

    async def try_write(self) -> None:
        """Nobody needs rights here."""

    async def close(self) -> None:
        """There is nothing to close."""


class RedisKeyStore:
    """Keys in one hash of a Redis or Valkey.

    `<namespace>:{keys}` has a field for each API key's hash; `<namespace>:{keys}:version` is written in
    the same transaction as any of them. The braces keep both on one node of a cluster.
    """

    is_shared = True

    def __init__(self, new_client: Callable[[], Client], namespace: str) -> None:
        self._hash = keys_hash(namespace)
        self._version_key = f"{self._hash}:version"
        self._clients = Clients(new_client)

    async def version(self) -> bytes | None:
        """Return the version, which changes whenever an entry does."""
        version = await self._clients.get().execute("GET", self._version_key)
        if version is None or isinstance(version, bytes):
            return version
        raise BackendError(f"{version!r} is no version of live keys")

    async def entries(self) -> dict[str, bytes]:
        """All entries by hash."""
        entries: dict[str, bytes] = {}
        cursor = 0
        client = self._clients.get()
        async with client.reading():
            while True:
                cursor, page = await client.execute("HSCAN", self._hash, cursor, "COUNT", PAGE)
                entries |= {field.decode(errors="replace"): bytes(value) for field, value in page.items()}
                if not int(cursor):
                    return entries

    async def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Set these entries, and remove those that are None, in one transaction."""
        await self._clients.get().transact(await threads.call(lambda: self._commands(entries)))

    async def try_write(self) -> None:
        """Raise what `write` would fail with for want of rights. Nothing is written."""
        commands = [
            ("HDEL", self._hash, "-"),
            ("HSET", self._hash, "-", "-"),
            ("SET", self._version_key, "-"),
        ]
        await self._clients.get().try_out(commands)

    def _commands(self, entries: Mapping[str, bytes | None]) -> list[tuple[str | bytes, ...]]:
        """Return the commands that write entries, many of them in one command, and set a new version."""
        commands: list[tuple[str | bytes, ...]] = []
        removed = iter([each for each, entry in entries.items() if entry is None])
        while hashes := tuple(islice(removed, PAGE)):
            commands.append(("HDEL", self._hash, *hashes))
        kept = iter([(each, entry) for each, entry in entries.items() if entry is not None])
        while page := tuple(islice(kept, PAGE)):
            commands.append(("HSET", self._hash, *[part for item in page for part in item]))
        # Random, not counted: a server that lost its data must not come back to a number known before.
        return [*commands, ("SET", self._version_key, _new_version())]

    async def close(self) -> None:
        """Close the connection of the running event loop."""
        await self._clients.close()


def keys_hash(namespace: str) -> str:
    """The key of the hash that holds all entries."""
    return f"{namespace}:{{keys}}"


def _new_version() -> bytes:
    return secrets.token_hex(8).encode()
