"""The server's clock is set, back or forward, and so jumps: what that may cost, and what it may not."""

from collections.abc import AsyncIterator

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.status import BudgetStatus, WindowStatus
from tests.support.conformance import (
    KINDS,
    Bench,
    SharedServer,
    daily,
    instant,
    metered,
    monthly,
    opened,
    slots,
    window,
)

pytestmark = pytest.mark.rerun

MINUTE = 60


@pytest.fixture(params=KINDS)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """Each kind of backend in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench


async def test_no_wait_exceeds_a_window_after_a_step_back(bench: Bench) -> None:
    """An entry counted later than the clock shows counts from now on: for one window, and in full."""
    for _ in range(3):
        assert (await bench.acquire(window(3))).admitted
        bench.wait(1)
    bench.wait(-MINUTE)
    refused = await bench.acquire(window(3))
    assert not refused.admitted
    assert refused.window(0).retry_after_us <= MINUTE * SECOND
    bench.wait(microseconds=refused.window(0).retry_after_us)
    assert (await bench.acquire(window(3))).admitted


async def test_what_lay_in_the_future_leaves_a_window_after_the_step(bench: Bench) -> None:
    """A request stored later than the clock shows counts as one of this moment, to the microsecond."""
    assert (await bench.acquire(window(1))).admitted
    bench.wait(-7)
    refused = await bench.acquire(window(1))
    assert refused.statuses == [WindowStatus(1, MINUTE * SECOND, MINUTE * SECOND)]


@pytest.mark.parametrize("seconds", [-MINUTE, -1, 1])
async def test_slots_are_never_exceeded_by_a_step(bench: Bench, seconds: float) -> None:
    """Back, or forward by less than a lease: who holds a slot keeps it, and nobody gets one too many."""
    reservations = [await bench.reserve(slots(2)) for _ in range(2)]
    bench.wait(seconds)
    assert not (await bench.acquire(slots(2))).admitted
    assert [await bench.backend.renew(reservation, 30) for reservation in reservations] == [True, True]
    await bench.backend.finish(reservations[0], EstimateAction.KEEP)
    assert (await bench.acquire(slots(2))).admitted
    assert not (await bench.acquire(slots(2))).admitted


async def test_a_renewal_goes_by_the_clock_as_it_is_after_a_step_back(bench: Bench) -> None:
    """Renewed once, a lease ends as if there was no step; a dead holder's lasts longer by the step."""
    living, _dead = await bench.reserve(slots(2)), await bench.reserve(slots(2))
    bench.wait(-MINUTE)
    assert await bench.backend.renew(living, 30)
    bench.wait(30)
    assert await bench.used(slots(2)) == [1]
    bench.wait(MINUTE - 1)
    assert await bench.used(slots(2)) == [1]
    bench.wait(1)
    assert await bench.used(slots(2)) == [0]


async def test_a_step_beyond_the_lease_is_as_a_holder_that_died(bench: Bench) -> None:
    """Slots are lost, which their holders hear at the next renewal; their late release frees no other's."""
    lost = await bench.reserve(slots(1))
    bench.wait(MINUTE)
    taken = await bench.reserve(slots(1))
    assert not await bench.backend.renew(lost, 30)
    await bench.backend.finish(lost, EstimateAction.KEEP)
    assert await bench.used(slots(1)) == [1]
    assert await bench.backend.renew(taken, 30)


MIDNIGHT = instant("2026-12-01T00:00:00+00:00")


@pytest.mark.parametrize("steps", [(-MINUTE, MINUTE), (MINUTE, -MINUTE)], ids=["back", "forward"])
async def test_budgets_are_never_exceeded_by_steps_over_midnight(
    bench: Bench, steps: tuple[float, float]
) -> None:
    """Of each day and month what it allows is sold, once, whichever of them the clock shows in turn."""
    day, month = daily(100), monthly(100)
    bench.clock.now = MIDNIGHT if steps[0] < 0 else MIDNIGHT - 1
    held = await bench.reserve(day, month, price=60)
    for step in steps:
        bench.wait(step)
        await bench.acquire(day, month, price=60)
        assert not (await bench.acquire(day, month, price=60)).admitted
        statuses = (await bench.peek(day, month)).statuses
        assert statuses == [BudgetStatus(0, 60, is_short=False)] * 2
    bench.wait(steps[0])
    assert await bench.backend.settle(held, 10) is Settlement.SETTLED
    assert await bench.backend.settle(held, 10) is Settlement.REPEATED
    assert (await bench.peek(day, month)).statuses[0][:2] == (0, 60), "it belongs to the day of its admission"
    bench.wait(steps[1])
    assert [each[:2] for each in (await bench.peek(day, month)).statuses] == [(10, 0), (10, 0)]


async def test_a_budget_outlasts_a_step_of_a_day(bench: Bench) -> None:
    """A clock that shows tomorrow for a while sells tomorrow's budget; both days remember what was sold."""
    day = daily(100)
    held = await bench.reserve(day, price=100)
    bench.wait(86_400)
    assert (await bench.acquire(day, price=100)).admitted
    bench.wait(-86_400)
    assert not (await bench.acquire(day, price=1)).admitted
    await bench.backend.finish(held, EstimateAction.GIVE_BACK)
    assert (await bench.acquire(day, price=100)).admitted
    bench.wait(86_400)
    assert not (await bench.acquire(day, price=1)).admitted


@pytest.mark.parametrize("back", [1, 2])
async def test_a_charge_after_a_step_back_is_given_back_whole(bench: Bench, back: int) -> None:
    """It shares an entry with all that was counted later than the clock shows, and none with what was not."""
    tokens = metered(100)
    for amount in (5, 2, 3):
        await bench.reserve(tokens, tokens=amount)
        bench.wait(1)
    bench.wait(-1 - back)
    reservation = await bench.reserve(tokens, tokens=40)
    assert await bench.backend.settle_units(reservation, {"tokens": 0}) is Settlement.SETTLED
    assert await bench.used(tokens) == [10]
