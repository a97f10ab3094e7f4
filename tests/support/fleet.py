"""Helpers for tests of the fleet's figures: settings, traffic, and a fresh look."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from ratelimit_mw import Limiter, RateLimited, Settings
from ratelimit_mw._internal.fleet import FleetView, Snapshot


def settings_of(url: str, **tables: Any) -> Settings:
    """Settings with a backend, five requests an hour for each key unless told otherwise."""
    plans = {"default": {"requests": ["5/hour"]}}
    return Settings.model_validate({"backend": {"url": url, "timeout": 5.0}, "plans": plans, **tables})


async def ask(limiter: Limiter, api_key: str, number: int) -> None:
    """Send requests with a key, whatever becomes of them."""
    for _ in range(number):
        with contextlib.suppress(RateLimited):
            async with await limiter.acquire(api_key=api_key):
                pass


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


async def fresh(limiter: Limiter) -> Snapshot:
    """Report everything, and return the snapshot of somebody who looks for the first time."""
    await limiter.engine.reporter.report()
    return await FleetView(limiter).read()


async def has_seen(limiter: Limiter, number: int) -> bool:
    """Whether as many requests as this are seen to be admitted."""
    points = (await fresh(limiter)).series
    return sum(point.outcomes.admitted for point in points) == number
