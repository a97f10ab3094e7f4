"""Store for records of operators' changes, beside the keys: the latest records, each a text and its time."""

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from ratelimit_mw._internal.backends.connecting.clients import Clients
from ratelimit_mw._internal.backends.key_store import keys_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ratelimit_mw._internal.backends.connecting.client import Client

KEPT = 500
"""Records that are kept."""


class AuditStore(Protocol):
    """Records of changes. Every method that fails raises `BackendError` and nothing else."""

    async def add(self, at: float, record: bytes) -> None:
        """Add a record, and forget the oldest of too many."""

    async def latest(self, number: int) -> list[bytes]:
        """The latest records, newest first."""

    async def close(self) -> None:
        """Close what the running event loop has opened; it may be used again."""


class MemoryAuditStore:
    """Records of one process."""

    def __init__(self) -> None:
        self._records: deque[bytes] = deque(maxlen=KEPT)

    async def add(self, at: float, record: bytes) -> None:
        """Add a record, and forget the oldest of too many."""
        self._records.appendleft(record)

    async def latest(self, number: int) -> list[bytes]:
        """The latest records, newest first."""
        return [*self._records][:number]

    async def close(self) -> None:
        """There is nothing to close."""


class RedisAuditStore:
    """Records in a sorted set of a Redis or Valkey, `<namespace>:{keys}:audit`, by their times."""

    def __init__(self, new_client: "Callable[[], Client]", namespace: str) -> None:
        self._key = f"{keys_hash(namespace)}:audit"
        self._clients = Clients(new_client)

    async def add(self, at: float, record: bytes) -> None:
        """Add a record, and forget the oldest of too many."""
        add = ("ZADD", self._key, f"{at:.6f}", record)
        await self._ask([add, ("ZREMRANGEBYRANK", self._key, 0, -KEPT - 1)])

    async def latest(self, number: int) -> list[bytes]:
        """The latest records, newest first."""
        (found,) = await self._ask([("ZRANGE", self._key, 0, number - 1, "REV")])
        return [each for each in found if isinstance(each, bytes)] if isinstance(found, list) else []

    async def _ask(self, commands: "Sequence[Sequence[str | bytes | int]]") -> list[Any]:
        """Ask over a connection that lasts no longer: changes are rare."""
        try:
            return await self._clients.get().ask(commands)
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection of the running event loop."""
        await self._clients.close()
