"""One limiter in the event loops of several threads."""

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ratelimit_mw import Limiter, policy
from tests.asgi import settings_of

THREADS, KEYS, QUOTA = 4, 80, 20
EACH = 1_600
"""Requests of each thread: 80 of each key in all."""


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_threads_share_one_count_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread a request comes by, no quota is exceeded, no request lost, and none fails."""
    monkeypatch.setattr(policy, "MAX_POLICIES", KEYS // 2)
    plan = f'plans.default = {{requests = ["{QUOTA}/hour"], concurrent = 50}}'
    limiter = Limiter(settings_of(plan))

    async def ask(thread: int) -> int:
        admitted = 0
        for number in range(EACH):
            key = f"key {(number * 7 + thread) % KEYS}"
            async with await limiter.acquire(api_key=key, address="192.0.2.1") as lease:
                admitted += lease.allowed
        await limiter.close()
        return admitted

    with ThreadPoolExecutor(THREADS) as threads:
        admitted = sum(threads.map(lambda thread: asyncio.run(ask(thread)), range(THREADS)))
    assert admitted == KEYS * QUOTA
    assert sum(limiter.tally.totals().values()) == THREADS * EACH
