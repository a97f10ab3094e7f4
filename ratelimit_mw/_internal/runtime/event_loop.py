"""Event loops: the one that everything here needs, asyncio's or uvloop's, and those that have ended."""

import asyncio
from asyncio import get_running_loop
from typing import TypeVar

T = TypeVar("T")

NEEDS_ASYNCIO = (
    "ratelimit_mw needs an event loop of asyncio: run it with a server or a worker class for asyncio"
)


def asyncio_is_running() -> bool:
    """Whether there is one."""
    try:
        get_running_loop()
    except RuntimeError:
        return False
    return True


def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop. Raises RuntimeError, which says so, where it is none of asyncio's."""
    try:
        return get_running_loop()
    except RuntimeError:
        raise RuntimeError(NEEDS_ASYNCIO) from None


def take_ended(by_loop: dict[asyncio.AbstractEventLoop, T]) -> list[T]:
    """Take out what belongs to event loops that have ended. Threads may do so at once: each gets its part."""
    ended = [by_loop.pop(loop, None) for loop in list(by_loop) if loop.is_closed()]
    return [each for each in ended if each is not None]
