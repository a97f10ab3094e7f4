"""An event loop whose clock jumps to the next timer: what takes minutes is over at once, and exact."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.limits import SECOND
from tests.support.asgi import START, settings_of

T = TypeVar("T")

FOR_THREADS = 0.0005
"""Seconds of real time before each jump, in which threads may finish what the loop waits for."""


class _Jumping(selectors.DefaultSelector):
    """A selector that doesn't wait for a timer, but moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; else it is later."""
        events = super().select(timeout and min(timeout, FOR_THREADS))
        if not events and timeout:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a clock of its own, which begins at 0."""

    def __init__(self) -> None:
        self.clock = _Jumping()
        super().__init__(self.clock)

    def time(self) -> float:
        """Seconds since the start."""
        return self.clock.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for threads to end, however far the clock would jump meanwhile."""
        await super().shutdown_default_executor()


def in_virtual_time(
    text: str,
    run: Callable[[Limiter], Awaitable[T]],
    backend: type[MemoryBackend] = MemoryBackend,
    **options: Any,
) -> T:
    """Run with a limiter of these settings, both on a clock that jumps."""

    async def main() -> T:
        loop = asyncio.get_running_loop()
        counts = backend(clock=lambda: START * SECOND + round(loop.time() * SECOND))
        async with Limiter(settings_of(text), backend=counts, **options) as limiter:
            return await run(limiter)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())
