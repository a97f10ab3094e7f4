"""Map from the hash slots of a cluster to the nodes that serve them."""

import asyncio
import random
from binascii import crc_hqx
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ratelimit_mw._internal.backends.cluster.first import first_answer
from ratelimit_mw._internal.backends.connecting.client import CONNECT_TIMEOUT, Client
from ratelimit_mw._internal.backends.connecting.connector import ServerConnector
from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.connecting.hosts import Address, read_hosts
from ratelimit_mw._internal.model.backend import BackendError

SLOTS = 16_384
"""Hash slots of a cluster."""
NODE_PORT = 6_379

Owners = list[Address | None]
"""The node that serves each hash slot; None where none does."""


def hash_tag(key: bytes) -> bytes:
    """The part of a key that decides about its hash slot: the partition, in every key of this package.

    Of nothing it is nothing: without keys, any node will do.
    """
    start = key.find(b"{") + 1
    return key[start : key.find(b"}", start)]


def hash_slot(tag: bytes) -> int:
    """The hash slot of all keys with this tag."""
    return crc_hqx(tag, 0) % SLOTS


class Nodes:
    """The nodes of the cluster that a URL names some of."""

    def __init__(self, url: str, *, timeout: float, options: dict[str, Any] | None = None) -> None:
        self._hosts = read_hosts(url, NODE_PORT, options)
        self._timeout = timeout
        self._options = options
        self.seeds = self._hosts.hosts
        """The nodes that the URL names."""

    def url_of(self, node: Address) -> str:
        """The URL of one node."""
        return self._hosts.url_of(node)

    def connector(self, node: Address) -> ServerConnector:
        """Connections to one node."""
        return ServerConnector(self.url_of(node), timeout=self._timeout, options=self._options)

    async def owners(self, known: Iterable[Address] = ()) -> Owners:
        """Return the node that serves each hash slot, as the first node that answers says.

        The nodes `known` to be there are asked first, then the seeds. Raises `BackendError` if no node
        answers.
        """
        first = list(known)
        random.shuffle(first)
        nodes = dict.fromkeys([*first, *self.seeds])
        try:
            return await first_answer([partial(self._ask, node) for node in nodes], self._timeout)
        except BackendError as error:
            raise BackendError(f"no node says which node serves which slot: {error}") from error

    def client_for(self, key: str) -> Callable[[], Client]:
        """Makes clients for the node that serves a key at the time."""

        async def node_of_key() -> ServerConnector:
            owner = (await self.owners())[hash_slot(hash_tag(key.encode()))]
            if owner is None:
                raise BackendError("no node of the cluster serves the keys' slot")
            return self.connector(owner)

        return lambda: Client(node_of_key)

    async def _ask(self, node: Address) -> Owners:
        client = self.connector(node).client()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT + self._timeout):
                ranges = await client.execute("CLUSTER", "SLOTS")
            async with client.reading():
                return _owners_of(ranges, node)
        except ReplyError as error:
            if _NO_CLUSTER not in str(error):
                raise
            if len(self.seeds) == 1:
                return [node] * SLOTS  # a server of its own, which has everything
            name = f"{node.host}:{node.port}"
            raise BackendError(f"{name} is a single server, not a node of a cluster: {error}") from error
        except TimeoutError as error:
            raise BackendError(f"{node.host}:{node.port} does not answer") from error
        finally:
            await client.close()


_NO_CLUSTER = "cluster support disabled"
"""In the answer of a server that was not started as a node."""


def _owners_of(ranges: Any, node: Address) -> Owners:
    """Read what a node answers to `CLUSTER SLOTS`."""
    owners: Owners = [None] * SLOTS
    for first, last, (host, port, *_), *_ in ranges:
        # A node that doesn't know its own address leaves it out.
        owner = Address(host.decode() if host and host != b"?" else node.host, int(port))
        owners[first : last + 1] = [owner] * (last + 1 - first)
    if not ranges:
        raise BackendError(f"{node.host}:{node.port} reports no slots")
    if len(owners) != SLOTS:
        raise ValueError(f"{ranges!r} are not slots")
    return owners
