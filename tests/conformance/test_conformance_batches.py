"""Charges made in the same moment: every backend decides them one after the other."""

import asyncio
import random

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.status import BudgetStatus, WindowStatus
from tests.support.conformance import Bench, daily, new_id, slots, window
from tests.support.statuses import Answer, acquired

MINUTE = 60 * SECOND


async def at_once(bench: Bench, *charges: tuple[int, list[Counter]], price: int = 0) -> list[Answer]:
    """Make charges of a cost and counters each, in one turn of the event loop."""
    return await asyncio.gather(
        *[acquired(bench.backend, Charge(counters, cost), new_id(), price) for cost, counters in charges]
    )


async def test_charges_at_once_are_decided_in_their_order(bench: Bench) -> None:
    """A later one sees what an earlier one took, and is admitted beside one that was refused."""
    outcomes = await at_once(bench, *[(cost, [window(10)]) for cost in (4, 7, 6, 1)])
    assert [outcome.admitted for outcome in outcomes] == [True, False, True, False]
    assert [outcome.statuses[0] for outcome in outcomes] == [
        WindowStatus(4, MINUTE, 0),
        WindowStatus(4, MINUTE, MINUTE),
        WindowStatus(10, MINUTE, 0),
        WindowStatus(10, MINUTE, MINUTE),
    ]


@pytest.mark.parametrize("number", [64, 65, 300])
async def test_any_number_at_once_gets_what_there_is(bench: Bench, number: int) -> None:
    """Exactly as many are admitted as fit, also over several windows and callers."""
    shared = window(40, of="app")
    charges = [(1, [window(10, of=f"caller {i % 7}"), shared]) for i in range(number)]
    outcomes = await at_once(bench, *charges)
    assert sum(outcome.admitted for outcome in outcomes) == 40
    assert await bench.used(shared) == [40]
    assert sum([(await bench.used(window(10, of=f"caller {i}")))[0] for i in range(7)]) == 40


async def test_a_promise_counts_in_who_came_in_the_same_moment(bench: Bench) -> None:
    """A charge that joins the newest entry in the same moment makes a wait for that a whole window."""
    counter = window(2_000)
    await bench.acquire(counter, cost=1_998)
    bench.wait(microseconds=7)
    outcomes = await at_once(bench, (3, [counter]), (1, [counter]), (2, [counter]))
    assert [outcome.statuses for outcome in outcomes] == [
        [WindowStatus(1_998, MINUTE - 7, MINUTE - 7)],
        [WindowStatus(1_999, MINUTE, 0)],
        [WindowStatus(1_999, MINUTE, MINUTE)],
    ]


async def test_two_quotas_of_one_window_at_once(bench: Bench) -> None:
    """Callers that share a window under quotas of their own are each held to their own."""
    outcomes = await at_once(
        bench, (3, [window(5)]), (3, [window(5)]), (3, [window(2_000)]), (1, [window(5)]), (9, [window(15)])
    )
    assert [outcome.admitted for outcome in outcomes] == [True, False, True, False, True]
    assert await bench.used(window(5)) == [15]


async def test_two_limits_of_one_slot_set_at_once(bench: Bench) -> None:
    """Expired leases make room once, whichever limit looks first."""
    for _ in range(3):
        await bench.reserve(slots(9, lease=1))
    await bench.reserve(slots(9, lease=60))
    bench.wait(1)
    limits = [6, 2, 2, 3, 3, 9]
    outcomes = await at_once(bench, *[(1, [slots(limit)]) for limit in limits])
    assert [outcome.admitted for outcome in outcomes] == [True, False, False, True, False, True]
    assert await bench.used(slots(9)) == [4]


async def test_a_slot_freed_in_the_same_moment_is_free(bench: Bench) -> None:
    """Releases run before charges."""
    reservation = await bench.reserve(slots(1), daily(100), price=100)
    release = bench.backend.finish(reservation, EstimateAction.GIVE_BACK)
    (outcome,) = await at_once(bench, (1, [slots(1), daily(100)]), price=100)
    await release
    assert outcome.admitted


async def test_a_reset_in_the_same_moment_forgets_first(bench: Bench) -> None:
    """A charge after a reset finds nothing, and is itself counted."""
    counters = [window(2), slots(1), daily(100)]
    reservation = await bench.reserve(*counters, price=70)
    charge = Charge(counters)
    settling = bench.backend.settle(reservation, 90)
    reset = bench.backend.reset(charge)
    _, _, outcome = await asyncio.gather(settling, reset, acquired(bench.backend, charge, new_id(), 60))
    assert outcome.admitted
    assert outcome.counted == [1, 1, 0]
    assert outcome.statuses[2] == BudgetStatus(0, 60, is_short=False)
    assert await bench.used(*counters) == [1, 1, 0]


async def test_random_moments_agree_with_a_plain_list(bench: Bench) -> None:
    """Charges of one moment are decided as if they had come one by one."""
    chance = random.Random(3)
    admitted: list[tuple[int, int]] = []
    for _ in range(120):
        bench.wait(chance.choice([0, 0.01, 1, 5, 20]))
        now, quota = bench.clock.now, chance.choice([30, 30, 12])
        costs = [chance.choice([1, 1, 2, 5]) for _ in range(chance.randint(1, 9))]
        outcomes = await at_once(bench, *[(cost, [window(quota)]) for cost in costs])
        for cost, outcome in zip(costs, outcomes, strict=True):
            used = sum(spent for at, spent in admitted if at + MINUTE > now)
            assert outcome.admitted == (used + cost <= quota)
            if outcome.admitted:
                admitted.append((now, cost))
                used += cost
            assert outcome.used(0) == used
