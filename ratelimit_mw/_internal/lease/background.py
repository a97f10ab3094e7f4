"""Waits a bounded time for operations that are under way to the backend.

The backend itself sends them again where they are lost (`backends/redis/backlog.py`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.backend import BackendError, UnderWay

logger = logging.getLogger("ratelimit_mw")

A = TypeVar("A")
T = TypeVar("T")
TakeIn = Callable[[Lease, A, T], object]
"""A function that takes in the answer to an operation of a lease, on an amount."""


class Arrival:
    """Operations of one lease that are under way, and the wait for them.

    A request that settles waits here, so this makes no task and, in memory, waits for nothing.
    """

    __slots__ = ("_done", "_lease", "_left", "_what")

    def __init__(self, lease: Lease, what: str) -> None:
        """`what` names them in the log."""
        self._lease = lease
        self._what = what
        self._left = 0
        self._done: asyncio.Future[bool] | None = None

    def add(self, sent: UnderWay[T], take_in: "TakeIn[A, T]", lease: Lease, amount: A) -> None:
        """Have `take_in` called with `lease`, `amount` and the answer, whether anybody waits or not.

        The log tells of an error.
        """
        self._left += 1
        sent.tell(partial(self._answered, take_in, lease, amount))

    def add_task(self, task: asyncio.Future[Any]) -> None:
        """Wait for a task, too."""
        self._left += 1
        task.add_done_callback(self._over)

    async def wait(self, timeout: float) -> None:
        """Wait until all is over, `timeout` seconds at most. What is under way goes on then."""
        if not self._left:
            return
        loop = asyncio.get_running_loop()
        self._done = done = loop.create_future()
        timer = loop.call_later(timeout, self._end, False)
        try:
            if not await done:
                logger.warning("%s of lease %s waits for the backend", self._what, self._lease.id)
        finally:
            timer.cancel()

    def _answered(self, take_in: "TakeIn[A, T]", lease: Lease, amount: A, said: T | BackendError) -> None:
        if isinstance(said, BackendError):
            tell_of_failure(self._what, lease.id, said)
        else:
            take_in(lease, amount, said)
        self._over()

    def _over(self, _: object = None) -> None:
        self._left -= 1
        if not self._left:
            self._end(True)

    def _end(self, is_over: bool) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(is_over)


class BackgroundWork:
    """Work under way to the backend, kept here because nobody may be waiting for it."""

    def __init__(self, timeout: float) -> None:
        """A caller waits at most `timeout` seconds for the backend."""
        self.timeout = timeout
        self.tasks: set[asyncio.Future[Any]] = set()

    def add(self, task: asyncio.Future[Any]) -> None:
        """Keep a task until it is done."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def start(self, work: Awaitable[object], what: str, lease_id: str) -> "asyncio.Task[None]":
        """Begin work of a lease that goes on without its caller. The log tells if it fails."""
        task = asyncio.ensure_future(_log_failure(work, what, lease_id))
        self.add(task)
        return task

    async def arrive(self, sent: UnderWay[object], what: str, lease: Lease) -> None:
        """Wait for the backend as long as a request would. The operation goes on when the wait is over."""
        arrival = Arrival(lease, what)
        arrival.add(sent, _ignore, lease, None)
        await arrival.wait(self.timeout)

    async def finish(self) -> None:
        """Wait for what is under way from the running event loop, for a bounded time."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in list(self.tasks) if task.get_loop() is loop]
        if tasks:  # the backend is closed by now: they end soon, and `_log_failure` tells of each
            await asyncio.wait(tasks, timeout=self.timeout)


def tell_of_failure(what: str, lease_id: str, error: BackendError) -> None:
    """Log that an operation of a lease failed."""
    logger.error("%s of lease %s did not reach the backend: %s", what, lease_id, error)


async def _log_failure(work: Awaitable[object], what: str, lease_id: str) -> None:
    try:
        await work
    except BackendError as error:
        tell_of_failure(what, lease_id, error)


def _ignore(lease: Lease, amount: None, said: object) -> None:
    """Take in that it was done."""
