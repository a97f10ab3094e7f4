"""Operations of a cluster that share a call: all that go to one node, or those of one partition.

A call for several partitions declares the keys of its first operation alone, which not every server takes. So
each node is tried out once it is connected. Until it is known to take such calls, and for slots that are
moving, each partition has a call of its own.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from ratelimit_mw._internal.backends.cluster.nodes import Owners, hash_slot
from ratelimit_mw._internal.backends.connecting.hosts import Address
from ratelimit_mw._internal.backends.redis.operations import Operation, probe_of
from ratelimit_mw._internal.model.backend import BackendError, OperationRefusedError

SETTLED_AFTER = 1.0
"""Seconds after the latest sign that a slot is moving in which its operations share no call with others."""
SOON, SELDOM = 1.0, 60.0
"""Seconds before a node is tried out again: where that came to nothing, and where it has refused twice."""
OWN_SLOTS = 8
"""Slots of its own that a node is tried out with: behind one address there may be several servers."""
MOST_TAGS = 500
"""Hash tags that are looked at to find one for each of these slots."""
REDIRECTIONS = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")

logger = logging.getLogger("ratelimit_mw")


class Grouping:
    """Knows which nodes take calls for several partitions, and which slots are moving.

    Belongs to one event loop.
    """

    def __init__(self, prefix: bytes, submit: Callable[[Address, Operation], None]) -> None:
        """`submit` sends an operation to a node, whether it serves its keys or not."""
        self._prefix = prefix
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._trials: dict[Address, _Trial] = {}
        self._moving: dict[int, float] = {}
        """Slots that are moving, and the time until which each is taken for it."""
        self._has_refused: set[Address] = set()
        self._is_told = False

    def forget(self, node: Address) -> None:
        """Have a node tried out again: another server may answer there now."""
        self._trials.pop(node, None)

    def moves(self, slot: int) -> None:
        """Take in a sign that a slot is moving."""
        self._moving[slot] = self._loop.time() + SETTLED_AFTER

    def group(self, node: Address, owners: Owners, operations: list[Operation]) -> Iterable[list[Operation]]:
        """Group operations for a node that may share a call of the script."""
        trial = self._trials.get(node)
        if trial is not None and trial.is_passed:
            return self._together(operations)
        if trial is None or (not trial.waiting and trial.again_at <= self._loop.time()):
            self._trials[node] = trial = self._begin(node, owners)
        if not trial.waiting:
            return by_partition(operations)
        tried = [operation for operation in operations if operation in trial.waiting]
        others = [operation for operation in operations if operation not in trial.waiting]
        return [tried, *by_partition(others)] if tried else by_partition(others)

    def take_over(self, node: Address, operations: list[Operation], error: str) -> bool:
        """Whether a node's error is about operations that try it out; they are over then."""
        trial = self._trials.get(node)
        if trial is None or operations[0] not in trial.waiting or error.startswith("NOSCRIPT"):
            return False
        for operation in operations:
            operation.fail(OperationRefusedError(error))
        return True

    def _together(self, operations: list[Operation]) -> Iterable[list[Operation]]:
        if self._moving:
            now = self._loop.time()
            self._moving = {slot: until for slot, until in self._moving.items() if until > now}
        together: list[Operation] = []
        apart: list[Operation] = []
        for operation in operations:
            template = operation.template
            is_apart = operation.tries or not template.tag or template.slot in self._moving
            (apart if is_apart else together).append(operation)
        return [together, *by_partition(apart)] if together else by_partition(apart)

    def _begin(self, node: Address, owners: Owners) -> "_Trial":
        """Have a node take one call with keys of several of its slots, and of a slot of another node's."""
        own, foreign = _tags_for(node, owners)
        trial = _Trial(self._loop.time() + SOON)
        if foreign is None or len(own) < 2:
            return trial  # of a node that has everything nothing shows whether it knows what it has
        for tag in (*own, foreign):
            tried = probe_of(b"%b{%b}:probe" % (self._prefix, tag))
            tried.tell(partial(trial.take_in, tried))
            tried.template.tag, tried.template.slot = tag, hash_slot(tag)
            trial.waiting[tried] = tag is foreign
        trial.on_end = partial(self._end, node)
        for operation in list(trial.waiting):
            self._loop.call_soon(self._submit, node, operation)
        return trial

    def _end(self, node: Address, trial: "_Trial") -> None:
        """Take in what came of a trial. Only a second refusal counts: the map of slots may have been old."""
        has_refused = bool(trial.refusal) and node in self._has_refused
        trial.again_at = self._loop.time() + (SELDOM if has_refused else SOON)
        if trial.refusal:
            self._has_refused.add(node)
        if has_refused and not self._is_told:
            self._is_told = True
            logger.warning(
                "each caller needs a call of its own, which costs the cluster more: node %s:%d does not "
                "accept calls for several hash slots (%s)",
                *node,
                trial.refusal,
                extra={"ratelimit": {"event": "cluster_calls"}},
            )


class _Trial:
    """Operations by which a node is tried out, and what came of them."""

    def __init__(self, again_at: float) -> None:
        self.waiting: dict[Operation, bool] = {}
        """Operations that are under way, and whether each is about a key of another node."""
        self.again_at = again_at
        """Time, by the event loop's clock, from which the node is tried out again unless it has passed."""
        self.is_passed = False
        self.refusal = ""
        """Reason why the node is not sent such calls, as far as it has given one."""
        self.on_end: Callable[[_Trial], None] | None = None
        self._is_undecided = False

    def take_in(self, operation: Operation, said: object) -> None:
        """Take in what became of an operation."""
        is_foreign = self.waiting.pop(operation, None)
        if is_foreign is None:
            return
        error = said if isinstance(said, BackendError) else None
        is_elsewhere = error is not None and str(error).startswith(REDIRECTIONS)
        if is_foreign and error is None:
            self.refusal = "it accepts keys of slots that other nodes serve"
        elif error is not None and not (is_foreign and is_elsewhere):
            self._is_undecided = True
            if isinstance(error, OperationRefusedError) and not is_elsewhere:
                self.refusal = str(error)
        if not self.waiting and self.on_end is not None:
            self.is_passed = not (self.refusal or self._is_undecided)
            self.on_end(self)


def by_partition(operations: list[Operation]) -> list[list[Operation]]:
    """Group operations by partition. One that was sent again is a group of its own."""
    groups: dict[object, list[Operation]] = {}
    for operation in operations:
        group = operation if operation.tries else operation.template.tag
        members = groups.get(group)
        if members is None:
            members = groups[group] = []
        members.append(operation)
    return list(groups.values())


def _tags_for(node: Address, owners: Owners) -> tuple[list[bytes], bytes | None]:
    """Find hash tags of several slots of a node, and of one of another node, if there are any."""
    own: dict[int, bytes] = {}
    foreign: bytes | None = None
    for number in range(MOST_TAGS if owners else 0):
        tag = b"probe %d" % number
        slot = hash_slot(tag)
        if owners[slot] == node:
            own.setdefault(slot, tag)
        elif owners[slot] is not None:
            foreign = tag
        if len(own) >= OWN_SLOTS and foreign is not None:
            break
    return list(own.values()), foreign
