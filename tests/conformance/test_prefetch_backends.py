"""Charges for units that are used later: every backend counts them from when they are taken, for longer."""

import random

import pytest

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.status import WindowStatus
from tests.support.conformance import KINDS, Bench, SharedServer, new_id, opened, window
from tests.support.statuses import Answer, acquired

AHEAD = SECOND
"""Of a window of a minute."""


async def take(bench: Bench, quota: int, cost: int) -> Answer:
    """Take units of a window of a minute ahead."""
    return await acquired(bench.backend, Charge([window(quota)], cost, ahead=AHEAD), new_id())


@pytest.mark.parametrize("quota", [10, 2_000])
async def test_units_taken_ahead_count_from_now_until_a_window_after_their_end(
    bench: Bench, quota: int
) -> None:
    """They leave as if they had been used at the last moment, not a microsecond sooner."""
    outcome = await take(bench, quota, quota)
    assert (outcome.admitted, outcome.now) == (True, bench.clock.now)
    assert outcome.statuses == [WindowStatus(quota, 61 * SECOND, 0)]
    refused = await bench.acquire(window(quota))
    assert refused.statuses[0] == WindowStatus(quota, 61 * SECOND, 61 * SECOND)
    bench.wait(microseconds=61 * SECOND - 1)
    assert (await bench.acquire(window(quota))).statuses[0] == WindowStatus(quota, 1, 1)
    bench.wait(microseconds=1)
    assert (await bench.acquire(window(quota))).admitted


async def test_units_taken_now_and_ahead_share_a_window(bench: Bench) -> None:
    """Units charged while a block lasts leave with the block; units charged before it leave first."""
    assert (await bench.acquire(window(10))).admitted
    bench.wait(1)
    assert (await take(bench, 10, 5)).statuses[0] == WindowStatus(6, 59 * SECOND, 0)
    bench.wait(0.5)
    assert (await bench.acquire(window(10), cost=3)).statuses[0] == WindowStatus(9, 117 * SECOND // 2, 0)
    assert not (await take(bench, 10, 2)).admitted
    bench.wait(58.5)
    assert await bench.used(window(10)) == [8]
    bench.wait(microseconds=2 * SECOND - 1)
    assert await bench.used(window(10)) == [8]
    bench.wait(microseconds=1)
    assert await bench.used(window(10)) == [0]


@pytest.mark.parametrize("seconds", [0.2, 1, 5, 600])
async def test_a_clock_set_back_lets_units_taken_ahead_count_no_shorter(bench: Bench, seconds: float) -> None:
    """However far: they may still be used for what is left of their time, and count a window from then."""
    await take(bench, 10, 4)
    await bench.acquire(window(10), cost=6)
    bench.wait(0.1)
    bench.wait(-seconds)
    refused = await bench.acquire(window(10))
    assert not refused.admitted
    assert 60.9 * SECOND <= refused.window(0).retry_after_us <= 62 * SECOND
    bench.wait(microseconds=refused.window(0).retry_after_us)
    assert (await bench.acquire(window(10))).admitted


async def test_a_clock_set_back_is_seen_though_units_were_taken_ahead_once(bench: Bench) -> None:
    """No wait exceeds a window after a step back of the clock, once the time of units taken ahead is over."""
    await take(bench, 10, 4)
    bench.wait(10)
    await bench.acquire(window(10), cost=6)
    bench.wait(-5)
    assert (await bench.acquire(window(10))).window(0).retry_after_us <= 60 * SECOND


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
@pytest.mark.parametrize("quota", [30, 1_500])
async def test_servers_and_memory_answer_alike(shared_server: SharedServer, kind: str, quota: int) -> None:
    """A server and the memory backend answer alike, whatever is taken now and ahead."""
    chance = random.Random(quota)
    async with opened(kind, shared_server) as bench:
        memory = MemoryBackend(clock=bench.clock)
        for _ in range(600):
            ahead = chance.choice([0, 0, AHEAD, AHEAD // 3])
            charge = Charge([window(quota), window(3 * quota, 5)], chance.randint(1, 9), ahead=ahead)
            mine = await memory.acquire(charge, new_id())
            assert (
                await bench.backend.acquire(Charge(charge.counters, charge.cost, ahead=ahead), new_id())
                == mine
            )
            bench.wait(chance.choice([0, 0.0004, 0.3, 1.1, 7]))
