"""Probes of the nodes of a cluster: each in a slot that its node serves, as no other tells of its writes."""

from itertools import count

from ratelimit_mw._internal.backends.cluster.nodes import Owners, hash_slot
from ratelimit_mw._internal.backends.connecting.hosts import Address
from ratelimit_mw._internal.backends.redis.operations import Operation, probe_of


class Probes:
    """Makes the probes of all nodes."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._latest: dict[Address, Operation] = {}
        self._tags: dict[Address, bytes] = {}
        """Hash tag of each node's probe."""
        self._imported: dict[Address, bytes] = {}
        """Hash tag of a slot that is moving to a node, which may serve no other yet."""
        self._moving: set[int] = set()
        """Slots in which a probe got no answer, as their keys were being moved."""

    def can_reach(self, node: Address, owners: Owners) -> bool:
        """Whether there is a slot in which a node would answer a probe."""
        return node in self._imported or node in owners

    def new(self, node: Address, owners: Owners) -> Operation:
        """A probe for a node: in a slot that it serves, or in one that is moving to it."""
        tag = self._tag(node, owners)
        probe = self._latest[node] = probe_of(b"%b{%b}:probe" % (self._prefix, tag))
        probe.is_asking = owners[hash_slot(tag)] != node
        return probe

    def is_one(self, node: Address, operation: Operation) -> bool:
        """Whether an operation is the probe of a node."""
        return operation is self._latest.get(node)

    def try_another(self, node: Address, owners: Owners) -> bool:
        """Probe in another slot from now on; false where the node has none."""
        self._moving.add(hash_slot(self._tags.get(node, b"")))
        return not self._served(node, owners) <= self._moving

    def imports(self, node: Address, tag: bytes) -> None:
        """Remember a slot that is moving to a node."""
        self._imported[node] = tag

    def _tag(self, node: Address, owners: Owners) -> bytes:
        served = self._served(node, owners)
        if not served:
            return self._imported[node]
        if served <= self._moving:
            self._moving -= served
        fit = served - self._moving
        tag = self._tags.get(node)
        if tag is None or hash_slot(tag) not in fit:
            tags = (b"probe %d" % number for number in count())
            tag = self._tags[node] = next(tag for tag in tags if hash_slot(tag) in fit)
        return tag

    def _served(self, node: Address, owners: Owners) -> set[int]:
        return {slot for slot, owner in enumerate(owners) if owner == node}
