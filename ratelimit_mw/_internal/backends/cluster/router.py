"""Takes the operations of a cluster to the nodes that serve their keys, and after keys that have moved.

A node that answers MOVED, ASK or TRYAGAIN has done nothing, so that every operation may be sent again.
A router belongs to one event loop.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial, reduce
from typing import Protocol

from ratelimit_mw._internal.backends.cluster.grouping import Grouping
from ratelimit_mw._internal.backends.cluster.nodes import Nodes, Owners, hash_slot, hash_tag
from ratelimit_mw._internal.backends.cluster.probes import Probes
from ratelimit_mw._internal.backends.connecting.connection import Connection
from ratelimit_mw._internal.backends.connecting.errors import ServerMovedError
from ratelimit_mw._internal.backends.connecting.hosts import Address
from ratelimit_mw._internal.backends.redis.batcher import Batcher, Group
from ratelimit_mw._internal.backends.redis.calls import LATER
from ratelimit_mw._internal.backends.redis.operations import Operation, Template
from ratelimit_mw._internal.backends.redis.replies import Redirect
from ratelimit_mw._internal.model.backend import BackendError, Load

AT_ONCE = 3
"""Times that an operation follows a redirection without a pause."""
RETRY_WAITS = (0.002, 0.004, 0.008, 0.016, 0.03)
"""Seconds before an operation is sent again; the last one repeats."""
REFRESH_EVERY = 0.1
"""Seconds between two looks at who serves what."""

logger = logging.getLogger("ratelimit_mw")

Connect = Callable[[Callable[[BackendError], None]], Awaitable[Connection]]


class NewBatcher(Protocol):
    """Makes the batcher of one node."""

    def __call__(
        self, connect: Connect, *, group: Group, redirect: Redirect, new_probe: Callable[[], Operation]
    ) -> Batcher:
        """A batcher with hooks of the router's."""


class Router:
    """Sends each operation to the node that serves its keys. Looks like one batcher from outside."""

    def __init__(self, nodes: Nodes, new_batcher: NewBatcher, *, timeout: float, prefix: bytes) -> None:
        self._nodes = nodes
        self._new_batcher = new_batcher
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._owners: Owners = []
        self._probes = Probes(prefix)
        self._grouping = Grouping(prefix, lambda node, operation: self._batcher(node).submit(operation))
        self._batchers: dict[Address, Batcher] = {}
        self._paused: dict[Operation, asyncio.TimerHandle] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._no_map: BackendError | None = None
        self._refreshed = 0.0

    @property
    def error(self) -> BackendError | None:
        """Error that marks a node as away; None if no node is."""
        batchers = list(self._batchers.values())  # other threads ask, too
        return next((each.error for each in batchers if each.error is not None), None)

    @property
    def load(self) -> Load:
        """Load of all nodes together: operations carried, and operations that wait."""
        return reduce(Load.plus, [each.load for each in list(self._batchers.values())], Load())

    def submit(self, operation: Operation) -> None:
        """Queue an operation for the node that serves its keys."""
        template = operation.template
        if template.tag is None:
            _find_slot(template)
        owner = self._owners[template.slot] if self._owners else None
        batcher = None if owner is None else self._batchers.get(owner)
        (batcher or self._batcher_for(template.slot)).submit(operation)

    async def connect(self) -> None:
        """Find out who serves what and connect to all nodes; waits as long as an operation would."""
        self._refresh_soon()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=self._timeout)
        found = {owner for owner in self._owners if owner is not None}
        await asyncio.gather(*[self._batcher(node).connect() for node in found])

    async def connection_to(self, key: bytes) -> Connection | None:
        """The connection to the node that serves a key; None where that is away, or not known yet."""
        owner = self._owners[hash_slot(hash_tag(key))] if self._owners else None
        return None if owner is None else await self._batcher(owner).connection_to(key)

    async def drain(self, timeout: float) -> int:
        """Wait until everything has been answered; how much was left after `timeout` seconds."""
        deadline = self._loop.time() + timeout
        while self._is_busy and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        left = await asyncio.gather(*[each.drain(0) for each in self._batchers.values()])
        return len(self._paused) + sum(left)

    def undo_doubtful(self) -> None:
        """Undo now what may have been done and whose answer was lost, though it may still be on its way."""
        for batcher in list(self._batchers.values()):
            batcher.undo_doubtful()

    def bequeath(self) -> list[Operation]:
        """Hand out what is owed, and what was sent and may have to be undone."""
        left = [each for batcher in self._batchers.values() for each in batcher.bequeath()]
        left += [each for each in self._paused if each.resend]
        self._paused.clear()
        return left

    def leave_to_parent(self) -> None:
        """Give up the connections in a process that was forked off."""
        for batcher in self._batchers.values():
            batcher.leave_to_parent()

    def close(self) -> None:
        """Close the connections; whoever still waits gets a `BackendError`."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        for operation, pause in list(self._paused.items()):
            pause.cancel()
            self._batcher_for(0).submit(operation)  # which closes now, and says what is lost
        self._paused.clear()
        for batcher in self._batchers.values():
            batcher.close()

    # who serves what ----------------------------------------------------------------------------

    def _batcher_for(self, slot: int) -> Batcher:
        owner = self._owners[slot] if self._owners else None
        if owner is not None:
            return self._batcher(owner)
        # Any node knows where to go.
        seeds = [self._batcher(seed) for seed in self._nodes.seeds]
        return next((each for each in seeds if each.error is None), seeds[0])

    def _batcher(self, node: Address) -> Batcher:
        batcher = self._batchers.get(node)
        if batcher is None:
            batcher = self._batchers[node] = self._new_batcher(
                partial(self._connect, node),
                group=lambda operations: self._grouping.group(node, self._owners, operations),
                redirect=partial(self._redirect, node),
                new_probe=partial(self._new_probe, node),
            )
        return batcher

    def _new_probe(self, node: Address) -> Operation:
        return self._probes.new(node, self._owners)

    async def _connect(self, node: Address, on_lost: Callable[[BackendError], None]) -> Connection:
        batcher = self._batchers.get(node)
        if not self._owners or (batcher is not None and batcher.error is not None):
            self._refresh_soon()  # others may have taken over
        if not self._owners and self._refreshing is not None:
            await asyncio.wait([self._refreshing])  # without a map, nothing is known that the node serves
            if not self._owners:
                raise self._no_map or BackendError("no node says which node serves which slot")
        if not self._probes.can_reach(node, self._owners):
            self._refresh_soon()
            raise ServerMovedError(f"{node.host}:{node.port} serves no slots")
        self._grouping.forget(node)
        return await self._nodes.connector(node).connect(on_lost)

    def _refresh_soon(self) -> None:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self._loop.create_task(self._refresh(), name="ratelimit_mw slots")

    async def _refresh(self) -> None:
        await asyncio.sleep(self._refreshed + REFRESH_EVERY - self._loop.time())
        self._refreshed = self._loop.time()
        there = [node for node, batcher in self._batchers.items() if batcher.error is None]
        try:
            self._adopt(await self._nodes.owners(there))
        except BackendError as error:
            self._no_map = error  # no node is there: their batchers say so, and ask for this again
        except Exception:  # noqa: BLE001
            return  # no node is there, or none is understood: their batchers say so, and ask for this again

    def _adopt(self, owners: Owners) -> None:
        """Go by a new map: what waits for a node that is away may have another one now."""
        self._owners = owners
        serving = set(owners)
        for node, batcher in list(self._batchers.items()):
            if node in serving and batcher.error is None:
                continue
            for operation in batcher.withdraw():
                self._count(operation)
                self._send_again(operation, 0)
            if node not in serving and not batcher.is_busy:
                if batcher.error is not None:
                    text = "backend is back: other nodes serve the slots of %s:%d"
                    logger.warning(text, *node, extra={"ratelimit": {"event": "backend_back"}})
                batcher.close()
                del self._batchers[node]

    # redirections -------------------------------------------------------------------------------

    def _redirect(self, node: Address, operations: list[Operation], error: str) -> bool:
        """Whether an error of `node` means that operations belong elsewhere, or later; sends them there."""
        if self._grouping.take_over(node, operations, error):
            return True
        word, _, rest = error.partition(" ")
        if word not in ("MOVED", "ASK", "TRYAGAIN") and not error.startswith(_UNSERVED):
            return False
        slot, _, address = rest.partition(" ")
        target = _address(address, node) if word in ("MOVED", "ASK") else None
        if word != "MOVED":
            self._grouping.moves(operations[0].template.slot)
        else:
            if self._owners:
                self._owners[int(slot)] = target
            self._refresh_soon()
        operations = self._of_first_slot(operations)
        if word == "ASK" and len(operations) > 1:
            # A key of one of them has moved, which says nothing of those of the others: each asks alone.
            for operation in operations:
                self._count(operation)
                self._send_again(operation, 0, node)
            return True
        if self._probes.is_one(node, operations[0]):
            self._redirect_probe(node, operations[0], error)
        else:
            self._send_on(operations, error, target)
        return True

    def _of_first_slot(self, operations: list[Operation]) -> list[Operation]:
        """Return the operations of a call that share the slot of the first, whose keys were declared.

        The others are sent again: the error says nothing of them.
        """
        first = operations[0].template.slot
        for operation in operations:
            if operation.template.slot != first:
                self._send_again(operation, 0)
        return [operation for operation in operations if operation.template.slot == first]

    def _send_on(self, operations: list[Operation], error: str, target: Address | None) -> None:
        is_asking = error.startswith("ASK")
        # Where a call for several slots met a key that is elsewhere, a call of its own learns where.
        at_once = AT_ONCE if target is not None else 1 if error == LATER else 0
        if is_asking and target is not None:
            self._probes.imports(target, hash_tag(operations[0].template.keys))
        for operation in operations:
            if error.startswith(_UNSERVED) and not operation.resend:
                operation.fail(BackendError(error))
            tries = self._count(operation)
            operation.is_asking = is_asking
            if tries > at_once:
                self._send_again(operation, RETRY_WAITS[min(tries, len(RETRY_WAITS)) - 1], target)
            else:
                self._send_again(operation, 0, target)

    def _redirect_probe(self, node: Address, probe: Operation, error: str) -> None:
        """Have another slot probed: a node that knows who serves this one may still take no writes."""
        if error.startswith(_UNSERVED):
            probe.fail(BackendError(error))
        elif self._probes.try_another(node, self._owners) or error.startswith("MOVED"):
            probe.fail(ServerMovedError(error))
        else:
            probe.answer(b"")  # all that it serves is moving away: it is there, and no more can be told

    def _count(self, operation: Operation) -> int:
        """Count another sending of an operation; return the number of them, this one included.

        The first one sets a time limit: an operation that was sent again waits no longer in all than any
        other.
        """
        operation.tries += 1
        if operation.tries == 1 and not operation.resend:
            left = operation.since + self._timeout - self._loop.time()
            error = BackendError(f"the cluster redirected the request for more than {self._timeout:g} s")
            self._loop.call_later(max(left, 0), operation.fail, error)
        return operation.tries

    def _send_again(self, operation: Operation, wait: float, target: Address | None = None) -> None:
        self._paused.pop(operation, None)
        if operation.is_over and not operation.resend:
            return  # nothing of it was done
        if wait:
            self._paused[operation] = self._loop.call_later(wait, self._send_again, operation, 0, target)
        elif target is None:
            operation.is_asking = False
            self.submit(operation)
        else:
            self._batcher(target).submit(operation)

    @property
    def _is_busy(self) -> bool:
        return bool(self._paused) or any(each.is_busy for each in self._batchers.values())


def _find_slot(template: Template) -> None:
    template.tag = hash_tag(template.keys)
    template.slot = hash_slot(template.tag)


def _address(text: str, answering: Address) -> Address:
    """An address in a redirection; without a host it is that of the node that answers."""
    host, _, port = text.rpartition(":")
    return Address(host or answering.host, int(port))


_UNSERVED = "CLUSTERDOWN Hash slot"
"""An error about one slot alone; others of the kind are about the whole cluster."""
