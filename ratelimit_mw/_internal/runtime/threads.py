"""Work beside the event loops, each piece in a thread of its own.

Not the loops' own threads: an app may keep those busy for longer than a change may take. A thread that never
comes back, since it reads from a mount that hangs, keeps neither other work nor the end of the process
waiting; and a process that is forked off lacks none.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

PIECE = 64
"""Items that are worked on between two pauses."""
PAUSE_SECONDS = 0.000_2
"""Seconds of a pause: in a shorter one no other thread would wake up and take over the interpreter."""
_here = threading.local()


def start(function: Callable[[], T], *, pauses: bool = True) -> "Future[T]":
    """Call a function in a new thread, with the pauses of `in_pieces` or without.

    The future has what it returns or raises.
    """
    future: Future[T] = Future()

    def run() -> None:
        _here.is_beside = pauses
        future.set_running_or_notify_cancel()
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="ratelimit_mw", daemon=True).start()
    return future


async def call(function: Callable[[], T], *, pauses: bool = True) -> T:
    """Call a function in a new thread and wait for it; `pauses` are those of `in_pieces`."""
    return await asyncio.wrap_future(start(function, pauses=pauses))


def in_pieces(items: Iterable[T], size: int = PIECE) -> Iterator[T]:
    """Yield items, and pause after every few of them where this is done beside the event loops.

    An event loop that has something to do has to wait for no more than a piece: without a pause, Python would
    let it wait for 5 ms, again and again.
    """
    is_beside = getattr(_here, "is_beside", False)
    for number, item in enumerate(items, 1):
        yield item
        if is_beside and not number % size:
            time.sleep(PAUSE_SECONDS)
