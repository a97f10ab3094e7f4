"""A time limit for what is done in several steps, each of which has one of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ratelimit_mw._internal.model.backend import BackendError

GRACE = 0.005
"""Seconds given to answers that have arrived but were not read yet, where the event loop was busy."""


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """End what runs inside with a `BackendError` after so many seconds."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            timer = loop.call_later(max(seconds, 0), lambda: limit.reschedule(loop.time() + GRACE))
            try:
                yield
            finally:
                timer.cancel()
    except TimeoutError as error:
        raise BackendError("some servers gave no answer in time") from error
