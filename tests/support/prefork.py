"""A server that makes its limiter before it forks its workers, as gunicorn does with `--preload`.

Prints how many requests its workers admitted together: of three workers that ask eight times each.
"""

import asyncio
import contextlib
import multiprocessing
import sys
from typing import TYPE_CHECKING

from ratelimit_mw import Limiter, RateLimited, Settings

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

WORKERS, REQUESTS = 3, 8


def main() -> None:
    """Fork workers around a limiter on the server of the first argument."""
    plan = {"requests": ["10/minute"], "concurrent": 2}
    settings = {
        "backend": {"url": sys.argv[1], "timeout": 2},
        "identity": {"hash_secret": "a secret of this test alone"},
        "plans": {"default": plan},
    }
    limiter = Limiter(Settings.model_validate(settings))
    context = multiprocessing.get_context("fork")
    admitted: SimpleQueue[int] = context.SimpleQueue()
    workers = [context.Process(target=_work, args=(limiter, admitted)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.stdout.write(f"{sum(admitted.get() for _ in workers)}\n")


def _work(limiter: Limiter, admitted: "SimpleQueue[int]") -> None:
    admitted.put(asyncio.run(_ask(limiter)))


async def _ask(limiter: Limiter) -> int:
    number = 0
    async with limiter:
        for _ in range(REQUESTS):
            with contextlib.suppress(RateLimited):
                async with await limiter.acquire(api_key="a") as lease:
                    number += lease.allowed and lease.decision.policy == "shared"
            await asyncio.sleep(0.01)
    return number


if __name__ == "__main__":
    main()
