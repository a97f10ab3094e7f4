"""Order among the operations of one lease that move money: a settle takes effect before the end.

Each is sent when the one before it was answered. So none can pass another, whatever the servers say between:
that they take no writes, have lost the script, or that the keys have moved to another node.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from functools import partial

from ratelimit_mw._internal.backends.redis.operations import Answer, Operation

Line = tuple[bytes, str]
"""The id of a lease, and the partition whose money it holds: on a cluster a lease may have several."""
LOOK_EVERY = 0.005
"""Seconds between two looks whether all have been answered."""


class Lines:
    """A line of operations for each lease that has any under way. Belongs to one event loop."""

    def __init__(self, submit: Callable[[Operation], None]) -> None:
        """`submit` sends an operation until it arrives."""
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._behind: dict[Line, deque[Operation]] = {}

    @property
    def waiting(self) -> int:
        """How many operations wait for one before them."""
        return sum(map(len, list(self._behind.values())))

    def submit(self, line: Line, operation: Operation) -> Awaitable[Answer]:
        """Send an operation after all that were submitted in this line before it."""
        operation.future = future = self._loop.create_future()
        behind = self._behind.get(line)
        if behind is None:
            self._behind[line] = deque()
            self._send(line, operation)
        else:
            behind.append(operation)
        return _Shared(future)

    async def drain(self, timeout: float) -> None:
        """Wait until all have been answered, `timeout` seconds at most."""
        deadline = self._loop.time() + timeout
        while self._behind and self._loop.time() < deadline:
            await asyncio.sleep(LOOK_EVERY)

    def bequeath(self) -> list[Operation]:
        """Hand out all that wait for one before them, in their order, where the event loop ends."""
        waiting = [operation for behind in self._behind.values() for operation in behind]
        self._behind.clear()
        return waiting

    def close(self) -> None:
        """Submit all that wait: whatever closes after this says what is lost."""
        for behind in self._behind.values():
            while behind:
                self._submit(behind.popleft())

    def _send(self, line: Line, operation: Operation) -> None:
        if operation.future is not None:
            operation.future.add_done_callback(partial(self._next, line))
        self._submit(operation)

    def _next(self, line: Line, answered: "asyncio.Future[Answer]") -> None:
        answered.exception()  # nobody may be waiting for it
        behind = self._behind[line]
        if behind:
            self._send(line, behind.popleft())
        else:
            del self._behind[line]


class _Shared:
    """The answer of an operation for one of those who wait: a wait that is cancelled ends no other."""

    def __init__(self, answer: "asyncio.Future[Answer]") -> None:
        self._answer = answer

    def __await__(self) -> Generator[None, None, Answer]:
        return asyncio.shield(self._answer).__await__()
