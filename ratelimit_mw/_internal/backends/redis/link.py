"""The connection to one server: opened, tried again at growing intervals while the server is away."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from ratelimit_mw._internal.backends.connecting.client import CONNECT_TIMEOUT
from ratelimit_mw._internal.backends.connecting.connection import Connection
from ratelimit_mw._internal.backends.connecting.errors import ServerMovedError
from ratelimit_mw._internal.model.backend import BackendError

PROBE_WAITS = (0.05, 0.1, 0.2, 0.4, 0.5)
"""Seconds between attempts to reach a server that is away; the last one repeats. Spread by a half."""
STEADY = 1.0
"""Seconds after which a connection was a good one, whether or not anything was asked over it."""


class Link:
    """The connection of one event loop to one server, and the attempts to open it."""

    def __init__(
        self,
        connect: Callable[[Callable[[BackendError], None]], Awaitable[Connection]],
        probe: Callable[[], Awaitable[object]],
        *,
        timeout: float,
        on_ready: Callable[[], None],
        on_lost: Callable[[BackendError], None],
        on_failed: Callable[[BackendError], None],
    ) -> None:
        """Open connections by `connect`, which is handed `on_lost`, and try each by `probe`.

        `timeout` is how many seconds a probe may take at least. `on_failed` learns why an attempt failed,
        `on_ready` that one succeeded.
        """
        self._connect = connect
        self._probe = probe
        self._timeout = timeout
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._connected_at = 0.0
        self.connection: Connection | None = None
        self.attempt = 0
        """Number of attempts since the server was last known to serve requests."""
        self.silent_until = 0.0
        """Time, by `time.monotonic`, before which no attempt is made."""

    @property
    def is_ready(self) -> bool:
        """Whether there is a connection, and its server has answered."""
        return self.connection is not None and self._task is None

    @property
    def is_connecting(self) -> bool:
        """Whether an attempt is under way, or waits for its turn."""
        return self._task is not None

    def start(self) -> None:
        """Connect, unless there is a connection or an attempt."""
        if self.connection is None and self._task is None:
            self._task = self._loop.create_task(self._keep_connecting(), name="ratelimit_mw connect")

    async def wait(self) -> None:
        """Wait for the attempt under way, as long as an operation would."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._timeout)

    def drop(self, *, discard: bool) -> None:
        """Close the connection. Unless `discard`, what was written to it is still sent."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close(discard=discard)
            if self._loop.time() >= self._connected_at + STEADY:
                self.attempt = 0

    def stop(self) -> None:
        """End the attempts."""
        if self._task is not None:
            self._task.cancel()

    def leave_to_parent(self) -> None:
        """Give up the connection in a process that was forked off."""
        if self.connection is not None:
            self.connection.leave_to_parent()

    async def _keep_connecting(self) -> None:
        """Try until the server answers: at first on behalf of a request, then in its absence."""
        while True:
            await asyncio.sleep(self.silent_until - time.monotonic())
            if self.attempt:
                wait = PROBE_WAITS[min(self.attempt, len(PROBE_WAITS)) - 1]
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the workers
            self.attempt += 1
            try:
                self.connection = await self._connect(self._on_lost)
                self._connected_at = self._loop.time()
                async with asyncio.timeout(max(self._timeout, CONNECT_TIMEOUT)):
                    await self._probe()
                if self.connection is not None:  # it may have been lost since the answer
                    break
            except ServerMovedError as error:
                self._on_lost(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody can be asked: an outage
                known = isinstance(error, (BackendError, TimeoutError))
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                self._on_failed(BackendError(reason or "no answer to the first command"))
        self._task = None
        self._on_ready()
