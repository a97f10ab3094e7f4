"""Waits a bounded time for operations that are under way to the backend.

The backend itself sends them again where they are lost (`backends/redis/backlog.py`).
"""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from ratelimit_mw._internal.model.backend import BackendError

logger = logging.getLogger("ratelimit_mw")


class BackgroundWork:
    """Work under way to the backend, kept here because nobody may be waiting for it."""

    def __init__(self, timeout: float) -> None:
        """A caller waits at most `timeout` seconds for the backend."""
        self._timeout = timeout
        self.tasks: set[asyncio.Future[Any]] = set()

    def add(self, task: asyncio.Future[Any]) -> None:
        """Keep a task until it is done."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def start(self, sent: Awaitable[object], what: str, lease_id: str) -> "asyncio.Task[None]":
        """Begin work of a lease that goes on without its caller. The log tells if it fails."""
        task = asyncio.ensure_future(_log_failure(sent, what, lease_id))
        self.add(task)
        return task

    async def arrive(self, sent: Awaitable[object], what: str, lease_id: str) -> None:
        """Wait for the backend as long as a request would. The work goes on when the wait is over."""
        task = self.start(sent, what, lease_id)
        done, _ = await asyncio.wait([task], timeout=self._timeout)
        if not done:
            logger.warning("%s of lease %s waits for the backend", what, lease_id)

    async def finish(self) -> None:
        """Wait for what is under way from the running event loop, for a bounded time."""
        loop = asyncio.get_running_loop()
        tasks = [task for task in list(self.tasks) if task.get_loop() is loop]
        if tasks:  # the backend is closed by now: they end soon, and `_log_failure` tells of each
            await asyncio.wait(tasks, timeout=self._timeout)


async def _log_failure(sent: Awaitable[object], what: str, lease_id: str) -> None:
    try:
        await sent
    except BackendError as error:
        logger.error(  # noqa: TRY400 - the reason says it all, a trace would not
            "%s of lease %s did not reach the backend: %s", what, lease_id, error
        )
