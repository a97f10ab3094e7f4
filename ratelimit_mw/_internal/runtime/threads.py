"""Work beside the event loops, each piece in a thread of its own.

Not the loops' own threads: an app may keep those busy for longer than a change may take. A thread that never
comes back, since it reads from a mount that hangs, keeps neither other work nor the end of the process
waiting; and a process that is forked off lacks none.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(function: Callable[[], T]) -> "Future[T]":
    """Call a function in a new thread. The future has what it returns or raises."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="ratelimit_mw", daemon=True).start()
    return future


async def call(function: Callable[[], T]) -> T:
    """Call a function in a new thread and wait for it."""
    return await asyncio.wrap_future(start(function))
