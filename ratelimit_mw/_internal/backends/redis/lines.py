"""Order among the operations of one lease that move money: a settle takes effect before the end.

Each is sent when the one before it was answered. So none can pass another, whatever the servers say between:
that they take no writes, have lost the script, or that the keys have moved to another node.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ratelimit_mw._internal.backends.redis.operations import ALWAYS, Operation, Template
from ratelimit_mw._internal.model.backend import BackendError

Line = tuple[bytes, str]
"""The id of a lease, and the partition whose money it holds: on a cluster a lease may have several."""
LOOK_EVERY = 0.005
"""Seconds between two looks whether all have been answered."""


class OrderedOperation(Operation):
    """An operation that moves money: sent until it arrives, and after all that its lease has under way."""

    __slots__ = ("behind", "line", "lines")

    def __init__(self, template: Template, own_id: bytes, line: Line) -> None:
        Operation.__init__(self, template, own_id, ALWAYS)
        self.line = line
        self.lines: Lines | None = None
        """Lines that go on when this one is over."""
        self.behind: OrderedOperation | None = None
        """The operation of the same line that waits for this one."""

    def prepare(self) -> bool:
        """Be ready to be sent, now that all before it are over; false where nothing is to be sent."""
        return True

    def answer(self, answer: Any) -> None:
        """Deliver the result, and have the next one of the line sent."""
        Operation.answer(self, answer)
        if self.lines is not None:
            self.lines.go_on(self)

    def fail(self, error: BackendError) -> None:
        """Deliver an error, and have the next one of the line sent."""
        Operation.fail(self, error)
        if self.lines is not None:
            self.lines.go_on(self)


class Lines:
    """A line of operations for each lease that has any under way. Belongs to one event loop."""

    def __init__(self, submit: Callable[[Operation], None]) -> None:
        """`submit` sends an operation until it arrives."""
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._under_way: dict[Line, OrderedOperation] = {}

    @property
    def waiting(self) -> int:
        """Number of operations that wait for the one before them."""
        return sum([len(_all_behind(each)) for each in list(self._under_way.values())])

    def submit(self, operation: OrderedOperation) -> None:
        """Send an operation after all that were submitted in its line before it."""
        operation.lines = self
        last = self._under_way.get(operation.line)
        if last is None:
            self._under_way[operation.line] = operation
            if operation.prepare():
                self._submit(operation)
            return
        while last.behind is not None:
            last = last.behind
        last.behind = operation

    def go_on(self, operation: OrderedOperation) -> None:
        """Take in that the operation under way is over: the next one of its line is sent."""
        behind, operation.behind = operation.behind, None
        operation.lines = None
        if behind is None:
            del self._under_way[operation.line]
        else:
            self._under_way[operation.line] = behind
            if behind.prepare():
                self._submit(behind)

    async def drain(self, timeout: float) -> None:
        """Wait until all have been answered, `timeout` seconds at most."""
        deadline = self._loop.time() + timeout
        while self._under_way and self._loop.time() < deadline:
            await asyncio.sleep(LOOK_EVERY)

    def bequeath(self) -> list[Operation]:
        """Hand out all that wait for one before them, in their order, where the event loop ends."""
        waiting: list[Operation] = []
        for first in self._under_way.values():
            behind = _all_behind(first)
            for each in [first, *behind]:
                each.lines = each.behind = None
            waiting += behind
        self._under_way.clear()
        return waiting

    def close(self) -> None:
        """Submit all that wait, so that the sender counts them among what is lost when it closes."""
        for operation in self.bequeath():
            if isinstance(operation, OrderedOperation) and operation.prepare():
                self._submit(operation)


def _all_behind(operation: OrderedOperation) -> list[OrderedOperation]:
    """The operations that wait for this one, in their order."""
    found: list[OrderedOperation] = []
    behind = operation.behind
    while behind is not None:
        found.append(behind)
        behind = behind.behind
    return found
