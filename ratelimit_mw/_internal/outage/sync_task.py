"""The background task that tells the backend what was admitted without it, in one event loop at a time."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable

from ratelimit_mw._internal.runtime.forks import leave_to_parent

logger = logging.getLogger("ratelimit_mw")

LOOK_EVERY = 0.02
"""Seconds between two looks whether the backend is back; while it is away a look costs no round trip."""
PAUSE = 1.0
"""Seconds before it is tried again where telling met what it was not made for."""
LAST_SYNC_TIMEOUT = 1.0
"""Seconds that closing waits for the backend to be told."""


class SyncTask:
    """One task for all event loops of a process. Where its loop ends, another loop goes on with it."""

    def __init__(self, left: Callable[[], int], sync: Callable[[], Awaitable[None]]) -> None:
        """`left` tells how much the backend has to be told of, and `sync` tells what can be told now."""
        self._left = left
        self._sync = sync
        self._task: asyncio.Task[None] | None = None
        self._loops: set[asyncio.AbstractEventLoop] = set()
        """Event loops that have admitted something, any of which may tell of all."""
        self._is_closing = False
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Leave the task to the parent process."""
        self._lock = threading.Lock()
        leave_to_parent(self._task)
        self._task, self._is_closing = None, False

    def start(self) -> None:
        """Begin in the running event loop, unless the task is under way in some loop."""
        self._loops.add(asyncio.get_running_loop())
        self._begin()

    def resume(self) -> None:
        """Go on in the running event loop where the task's own has ended."""
        if self._left():
            self._begin()

    async def leave(self) -> None:
        """Go on no more in the running event loop, which ends; another one takes over."""
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            return
        self._is_closing = True
        try:
            # Not cancelled: the backend would take back what it is being told, under the same lease id.
            await asyncio.wait([task], timeout=LAST_SYNC_TIMEOUT)
        finally:
            self._is_closing = False

    async def finish(self) -> bool:
        """Tell what can be told now, for a bounded time; false where the task goes on in another loop."""
        task = None if self._task is None or self._task.done() else self._task
        if task is not None and task.get_loop() is not asyncio.get_running_loop():
            return False
        self._is_closing = True
        try:
            async with asyncio.timeout(LAST_SYNC_TIMEOUT):
                # Not cancelled: the backend would take back what it is being told, under the same lease id.
                if task is not None:
                    await asyncio.wait([task])
                while self._left():
                    await self._sync()
                    if self._left():  # it is away, and may be back in time
                        await asyncio.sleep(LOOK_EVERY)
        except TimeoutError:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])  # what was under way is owed again: what is left says it
        finally:
            self._is_closing = False
        return True

    def _begin(self) -> None:
        with self._lock:
            if self._task is None or self._task.done() or self._task.get_loop().is_closed():
                loop = asyncio.get_running_loop()
                self._task = loop.create_task(self._keep_syncing(), name="ratelimit_mw hand-back")
                self._task.add_done_callback(self._leave_to_another)

    def _leave_to_another(self, task: "asyncio.Task[None]") -> None:
        """Telling ended with its event loop: where something is left, another loop goes on."""
        self._loops = {loop for loop in list(self._loops) if not loop.is_closed()}
        for loop in list(self._loops) if self._left() and not self._is_closing else ():
            if loop is not task.get_loop() and loop.is_running():
                with contextlib.suppress(RuntimeError):  # it has been closed since
                    loop.call_soon_threadsafe(self._begin)
                    return

    async def _keep_syncing(self) -> None:
        while self._left():
            await asyncio.sleep(LOOK_EVERY)
            if self._is_closing:
                return  # which tells the rest itself
            try:
                await self._sync()
            except Exception:
                logger.exception("counts of an outage could not be sent to the backend; this is tried again")
                await asyncio.sleep(PAUSE)
