"""Callers put into Redis before a measurement: `python -m benchmarks.stored CALLERS`.

Each asks once, as `key-0`, `key-1` and so on. Run it in the environment of the server that is to be measured:
the same middleware with the same settings then leaves in Redis what that server would have left.
"""

import asyncio
import gc
import os
import sys

from starlette.types import Message

from benchmarks.apps import SETTINGS, Unframed, answer_of, ask, bare
from ratelimit_mw import Limiter, RateLimitMiddleware, Settings

IN_FLIGHT = 256
PATIENCE = 30.0
"""Seconds that the backend may take: here nobody waits."""


async def store(settings: Settings, callers: int) -> None:
    """Let so many callers ask once each. Raises RuntimeError where the backend did not count them all."""
    backend = settings.backend.model_copy(update={"timeout": PATIENCE})
    numbers = iter(range(callers))

    async def forget(_: Message) -> None:
        """Nobody reads the answers."""

    async with Limiter(settings.model_copy(update={"backend": backend})) as limiter:
        app = RateLimitMiddleware(Unframed(answer_of(bare())), limiter=limiter)

        async def ask_on() -> None:
            for number in numbers:
                await ask(app, number, forget)

        await asyncio.gather(*(ask_on() for _ in range(IN_FLIGHT)))
        uncounted = sum(limiter.stats().decisions_without_backend.values())
    if uncounted:
        raise RuntimeError(f"the backend did not count {uncounted} of {callers} callers")


if __name__ == "__main__":
    gc.disable()  # a sixth of the time; what was made is freed all the same
    asyncio.run(store(SETTINGS[os.environ["BENCH_VARIANT"]](), int(sys.argv[1])))
