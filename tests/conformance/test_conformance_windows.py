"""Sliding windows: the rules that every backend keeps, on a clock that only the test moves."""

import random

import pytest

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.status import SlotStatus, WindowStatus
from tests.support.conformance import Bench, slots, window

MINUTE = 60 * SECOND


# Seconds, cost, admitted, then used, reset_after and retry_after in seconds: as they are after the charge.
Row = tuple[float, int, bool, int, float, float]
ROWS: dict[str, tuple[int, list[Row]]] = {
    "one at a time": (
        3,
        [
            (0, 1, True, 1, 60, 0),
            (10, 1, True, 2, 50, 0),
            (20, 1, True, 3, 40, 0),
            (30, 1, False, 3, 30, 30),
            (59.999999, 1, False, 3, 0.000001, 0.000001),
            (60, 1, True, 3, 10, 0),
            (60, 1, False, 3, 10, 10),
            (70, 1, True, 3, 10, 0),
            (200, 1, True, 1, 60, 0),
        ],
    ),
    "costs": (
        10,
        [
            (0, 4, True, 4, 60, 0),
            (1, 4, True, 8, 59, 0),
            (2, 4, False, 8, 58, 58),
            (3, 2, True, 10, 57, 0),
            (4, 5, False, 10, 56, 57),
            (4, 8, False, 10, 56, 57),
            (4, 9, False, 10, 56, 59),
            (4, 10, False, 10, 56, 59),
            (60, 4, True, 10, 1, 0),
        ],
    ),
    "the same microsecond": (
        3,
        [
            (0, 1, True, 1, 60, 0),
            (0, 1, True, 2, 60, 0),
            (0, 2, False, 2, 60, 60),
            (0, 1, True, 3, 60, 0),
            (60, 3, True, 3, 60, 0),
        ],
    ),
    "a quota of one": (1, [(0, 1, True, 1, 60, 0), (1, 1, False, 1, 59, 59), (60, 1, True, 1, 60, 0)]),
    "more than the quota": (5, [(0, 6, False, 0, 0, 60), (1, 5, True, 5, 60, 0)]),
}


@pytest.mark.parametrize("name", ROWS)
async def test_a_window_decides_as_its_table_says(bench: Bench, name: str) -> None:
    """A request at t counts in [t, t + W), and the figures say how the window stands after the charge."""
    quota, rows = ROWS[name]
    start = bench.clock.now
    for at, cost, admitted, used, reset_after, retry_after in rows:
        bench.clock.now = start + round(at * SECOND)
        outcome = await bench.acquire(window(quota), cost=cost)
        status = WindowStatus(used, round(reset_after * SECOND), round(retry_after * SECOND))
        assert (at, outcome.admitted, *outcome.statuses) == (at, admitted, status)
        assert outcome.now == bench.clock.now


async def test_a_refused_charge_changes_nothing(bench: Bench) -> None:
    """All or nothing: whichever limit refuses, no other counts, whoever's it is and wherever it stands."""
    full = window(1, of="app", scope="app")
    await bench.acquire(full)
    others = [window(9), window(9, 1, "hour"), window(9, of="address", scope="a"), slots(9)]
    for place in range(len(others) + 1):
        charge = [*others[:place], full, *others[place:]]
        outcome = await bench.acquire(*charge)
        assert not outcome.admitted
        assert [status.refuses for status in outcome.statuses] == [each is full for each in charge]
    assert await bench.used(*others) == [0, 0, 0, 0]
    assert await bench.used(full) == [1]


async def test_windows_of_the_same_length_are_counted_apart(bench: Bench) -> None:
    """A newcomer's several windows are all counted from its first request on."""
    charge = [window(5), window(5, scope="route"), window(5, of="app"), window(5, of="address")]
    for _ in range(3):
        await bench.acquire(*charge)
    assert await bench.used(*charge) == [3, 3, 3, 3]


async def test_a_peek_changes_nothing(bench: Bench) -> None:
    """Peeking answers as a charge would be answered, and charges nothing."""
    assert (await bench.peek(window(2), slots(1))).admitted
    await bench.acquire(window(2), slots(1), cost=2)
    for _ in range(3):
        outcome = await bench.peek(window(2), slots(1))
        assert not outcome.admitted
        assert outcome.statuses == [WindowStatus(2, MINUTE, MINUTE), SlotStatus(1, is_full=True)]


@pytest.mark.parametrize("quota", [7, 40, 1_000, 5_000])
async def test_retry_after_is_true_to_the_microsecond(bench: Bench, quota: int) -> None:
    """At the promised moment the same charge is admitted, and a microsecond earlier it is not."""
    chance = random.Random(quota)
    counter = window(quota)
    while (await bench.acquire(counter, cost=chance.randint(1, quota // 6))).admitted:
        bench.wait(microseconds=chance.choice([0, 1, 50_000, 999_999]))
    for _ in range(8):
        cost = chance.choice([1, 2, quota // 3, quota])
        outcome = await bench.peek(counter, cost=cost)
        if outcome.admitted:
            await bench.acquire(counter, cost=cost)
            continue
        assert 0 < outcome.window(0).retry_after_us <= MINUTE
        bench.wait(microseconds=outcome.window(0).retry_after_us - 1)
        assert not (await bench.acquire(counter, cost=cost)).admitted
        bench.wait(microseconds=1)
        assert (await bench.acquire(counter, cost=cost)).admitted


async def test_a_lowered_quota_holds_at_once_and_a_raised_one_too(bench: Bench) -> None:
    """A changed quota takes effect on the next request; what was counted stays, nothing goes negative."""
    for _ in range(8):
        await bench.acquire(window(10))
        bench.wait(1)
    outcome = await bench.acquire(window(3))
    assert not outcome.admitted
    assert outcome.statuses == [WindowStatus(8, 52 * SECOND, 57 * SECOND)]
    assert (await bench.acquire(window(9))).admitted
    assert not (await bench.acquire(window(9))).admitted
    assert (await bench.acquire(window(2_000), cost=1_000)).used(0) == 1_009
    assert not (await bench.acquire(window(10))).admitted
    bench.wait(60)
    assert (await bench.acquire(window(3), cost=3)).statuses == [WindowStatus(3, MINUTE, 0)]


async def test_a_window_runs_round_its_log_without_losing_count(bench: Bench) -> None:
    """Growing, wrapping and shrinking of the log never show: it decides as a plain list would."""
    chance = random.Random(7)
    admitted: list[tuple[int, int]] = []
    for step in range(700):
        bench.wait(chance.choice([0, 0.001, 0.3, 0.7, 2]) * (9 if step // 100 % 2 else 0.4))
        quota, cost = chance.choice([70, 70, 70, 35, 130]), chance.choice([1, 1, 1, 2, 6])
        now = bench.clock.now
        live = [(at, spent) for at, spent in admitted if at + MINUTE > now]
        used = sum(spent for _, spent in live)
        outcome = await bench.acquire(window(quota), cost=cost)
        assert outcome.admitted == (used + cost <= quota)
        if outcome.admitted:
            admitted.append((now, cost))
            live.append((now, cost))
        assert outcome.used(0) == sum(spent for _, spent in live)
        assert outcome.reset_after(0) == (live[0][0] + MINUTE - now if live else 0)


@pytest.mark.parametrize("stepped", [1e-6, 7, 59, 61, 4000])
async def test_no_wait_exceeds_one_window_after_the_clock_stepped_back(bench: Bench, stepped: float) -> None:
    """Times stored later than now are rewritten to now: nothing is forgotten, and nothing waits longer."""
    counter = window(40)
    for _ in range(55):  # the log has wrapped
        await bench.acquire(counter)
        bench.wait(1.9)
    bench.wait(-stepped)
    outcome = await bench.acquire(counter, cost=40)
    used = outcome.used(0)
    assert used in {31, 32}  # one had left the window, and may be taken for back in it
    assert 0 < outcome.reset_after(0) <= outcome.window(0).retry_after_us <= MINUTE
    assert (await bench.acquire(counter)).used(0) == used + 1
    bench.wait(60)
    assert (await bench.acquire(counter, cost=40)).admitted


@pytest.mark.parametrize("quota", [1_001, 100_000, 1_000_000])
async def test_a_large_quota_is_never_exceeded_and_late_by_a_thousandth_at_most(
    bench: Bench, quota: int
) -> None:
    """Above 1,000, a request is remembered W / 1000 longer than needed at most, and never shorter."""
    chance = random.Random(quota)
    counter, granule = window(quota), MINUTE // 1_000
    admitted: list[tuple[int, int]] = []
    refused = 0
    for _ in range(400):
        bench.wait(microseconds=chance.choice([0, 1, granule // 3, granule, 400_000, 2_000_000]))
        cost, now = chance.randint(1, quota // 20), bench.clock.now
        needed = sum(spent for at, spent in admitted if at + MINUTE > now)
        remembered = sum(spent for at, spent in admitted if at + MINUTE + granule > now)
        outcome = await bench.acquire(counter, cost=cost)
        if outcome.admitted:
            admitted.append((now, cost))
            assert needed + cost <= quota
        else:
            refused += 1
            assert remembered + cost > quota
            assert needed <= outcome.used(0) <= remembered
    assert refused > 20


async def test_requests_in_one_thousandth_of_a_large_window_leave_together(bench: Bench) -> None:
    """Above 1,000, those that share a thousandth of the window share the time of the last of them."""
    counter, granule = window(100_000), MINUTE // 1_000
    bench.clock.now -= bench.clock.now % granule
    outcomes = []
    for _ in range(4):
        outcomes.append(await bench.acquire(counter))
        bench.wait(microseconds=granule // 3)
    assert [outcome.reset_after(0) for outcome in outcomes] == [MINUTE] * 3 + [MINUTE - granule // 3]
    bench.wait(60, microseconds=-2 * (granule // 3) - 1)
    assert await bench.used(counter) == [4]
    bench.wait(microseconds=1)
    assert await bench.used(counter) == [1]


async def test_reset_forgets_what_was_counted(bench: Bench) -> None:
    """After a reset a caller starts anew, and nobody else does."""
    mine, others = [window(2), slots(1)], [window(2, of="other")]
    await bench.acquire(*mine, cost=2)
    await bench.acquire(*others)
    await bench.backend.reset(Charge(mine))
    assert await bench.used(*mine, *others) == [0, 0, 1]
    assert (await bench.acquire(*mine, cost=2)).admitted


@pytest.mark.parametrize("quota", [1, 60, 1_000])
async def test_up_to_a_thousand_each_request_leaves_to_the_microsecond(bench: Bench, quota: int) -> None:
    """Two requests a microsecond apart leave a microsecond apart: none shares the time of another."""
    cost = max(quota // 2, 1)
    for _ in range(quota // cost):
        assert (await bench.acquire(window(quota), cost=cost)).admitted
        bench.wait(microseconds=1)
    bench.wait(60, microseconds=-(quota // cost) - 1)
    assert await bench.used(window(quota)) == [cost * (quota // cost)]
    for left in reversed(range(quota // cost)):
        bench.wait(microseconds=1)
        assert await bench.used(window(quota)) == [cost * left]
