"""Operations in doubt: their connection ended before the answer, and a server may still execute them."""

import asyncio
from collections.abc import Sequence

from ratelimit_mw._internal.backends.redis.operations import Operation


class Doubtful:
    """Undoes operations once no server executes them any more. Belongs to one event loop.

    What holds bytes between a process and a server (a proxy, a kernel) may deliver them after the process
    has another connection: a give-back that is sent at once could be there before its charge.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: dict[asyncio.TimerHandle, Sequence[Operation]] = {}

    def __len__(self) -> int:
        return sum([len(operations) for operations in list(self._timers.values())])

    def add(self, operations: Sequence[Operation], seconds: float) -> None:
        """Undo operations in so many seconds."""
        if not operations:
            return

        def undo() -> None:
            for operation in self._timers.pop(timer):
                operation.orphaned(None)

        timer = self._loop.call_later(seconds, undo)
        self._timers[timer] = operations

    def take(self) -> list[Operation]:
        """Take out all of them, for whoever undoes them now."""
        taken = [operation for operations in self._timers.values() for operation in operations]
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        return taken
