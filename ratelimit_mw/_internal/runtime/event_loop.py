"""The event loop that everything here needs: asyncio's, or one in its place, such as uvloop's."""

import asyncio
from asyncio import get_running_loop

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
