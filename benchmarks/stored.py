"""Callers put into Redis before a measurement: `python -m benchmarks.stored CALLERS`.

Each asks once, as `key-0`, `key-1` and so on. Run it in the environment of the server that is to be measured:
then the same settings hold, and what it leaves in Redis is what that server would have left.
"""

import asyncio
import gc
import os
import sys

from benchmarks.apps import SETTINGS
from benchmarks.load import PATH
from ratelimit_mw import Limiter, Settings

IN_FLIGHT = 256
PATIENCE = 30.0
"""Seconds that the backend may take: here nobody waits."""


async def store(settings: Settings, callers: int) -> None:
    """Let so many callers ask once each. Raises RuntimeError where the backend did not count them all."""
    backend = settings.backend.model_copy(update={"timeout": PATIENCE})
    numbers = iter(range(callers))
    async with Limiter(settings.model_copy(update={"backend": backend})) as limiter:

        async def ask() -> None:
            for number in numbers:
                async with await limiter.acquire(api_key=f"key-{number}", path=PATH):
                    pass  # nobody waits for the release

        await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
        uncounted = sum(limiter.stats().decisions_without_backend.values())
    if uncounted:
        raise RuntimeError(f"the backend did not count {uncounted} of {callers} callers")


if __name__ == "__main__":
    gc.disable()  # a sixth of the time; what was made is freed all the same
    asyncio.run(store(SETTINGS[os.environ["BENCH_VARIANT"]](), int(sys.argv[1])))
