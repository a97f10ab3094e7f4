"""Hook that closes objects at the end of their event loop, if nobody closed them before.

A loop that ends in good order (`asyncio.run`, pytest's and anyio's runners) closes the asynchronous
generators that were begun in it, and waits for them. A generator that does nothing but wait for its end is
such a hook.
"""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable


class LoopEnd:
    """Calls `close` at the end of the running event loop, unless it is cancelled before."""

    def __init__(self, close: Callable[[], Awaitable[object]]) -> None:
        self._is_due = True
        self._end = self._wait(close)
        with contextlib.suppress(StopIteration):  # once it has come to its `yield`
            self._end.__anext__().send(None)  # which the loop takes note of

    async def cancel(self) -> None:
        """Not call it any more. Nothing happens where it is being called, or was."""
        if self._is_due:
            self._is_due = False
            await self._end.aclose()

    async def _wait(self, close: Callable[[], Awaitable[object]]) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            if self._is_due:
                self._is_due = False
                await close()
