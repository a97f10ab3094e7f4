"""Memory that Redis keeps: bytes for each remembered request, and for each caller."""

import asyncio
from typing import Any

from ratelimit_mw import Limiter, Settings

QUOTA = 1_000
STEPS = 10


async def measure_memory(url: str, client: Any) -> dict[str, float]:
    """Fills one window of 1,000 and reads its size as it grows; and the keys of callers seen once."""
    plan = {"requests": [f"{QUOTA}/hour"], "concurrent": {"limit": 1000}}
    settings = Settings.model_validate({"backend": {"url": url, "timeout": 5.0}, "plans": {"default": plan}})
    client.flushall()
    async with Limiter(settings) as limiter:
        await _request(limiter, "seen once")
        per_caller = _size(client)
        client.flushall()
        sizes = []
        for _ in range(STEPS):
            for _ in range(QUOTA // STEPS):
                await _request(limiter, "busy")
            sizes.append(_size(client))
    return {
        # Over a window that fills: as many bytes as were kept, for as many requests as were remembered.
        "bytes_per_request": sum(sizes) / (QUOTA * (STEPS + 1) / 2),
        "bytes_per_request_full": sizes[-1] / QUOTA,
        "bytes_per_caller": per_caller,
    }


async def _request(limiter: Limiter, api_key: str) -> None:
    lease = await limiter.acquire(api_key=api_key)
    await lease.release()


def _size(client: Any) -> float:
    return sum(client.memory_usage(key, samples=0) or 0 for key in client.keys("*:w:*"))


def memory(url: str, client: Any) -> dict[str, float]:
    """Return the answer of `measure_memory`, from code that is not async."""
    return asyncio.run(measure_memory(url, client))
