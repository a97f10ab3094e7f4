"""Budgets: the rules that every backend keeps, on a clock that only the test moves."""

import asyncio
import itertools

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus
from tests.support.conformance import (
    Bench,
    daily,
    instant,
    monthly,
    new_id,
    slots,
    window,
)

UNKNOWN, SETTLED = Settlement.UNKNOWN, Settlement.SETTLED
REPEATED, DIFFERENT = Settlement.REPEATED, Settlement.DIFFERENT
LARGEST = 10**15
START = instant("2026-11-21T12:00:00+00:00")


async def books(bench: Bench, counter: Counter) -> tuple[int, int]:
    """Return the amounts that a budget has spent and holds."""
    answer = await bench.peek(counter)
    return answer.used(0), answer.held(0)


async def test_estimates_fit_to_the_last_unit(bench: Bench) -> None:
    """Three times 0.10 fits 0.30 exactly, and not a micro-unit more."""
    for _ in range(3):
        assert (await bench.acquire(daily(300_000), price=100_000)).admitted
    assert (await bench.peek(daily(300_000), price=0)).admitted
    outcome = await bench.acquire(daily(300_000), price=1)
    assert not outcome.admitted
    assert outcome.statuses == [BudgetStatus(0, 300_000, is_short=True)]


async def test_sixty_at_once_spend_no_more_than_there_is(bench: Bench) -> None:
    """Estimates can't overspend together."""
    charge = Charge([daily(1_000_000), monthly(5_000_000)])
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id(), 100_000) for _ in range(60)])
    assert sum(outcome.admitted for outcome in outcomes) == 10
    assert await books(bench, monthly(5_000_000)) == (0, 1_000_000)


async def test_all_or_nothing_with_budgets(bench: Bench) -> None:
    """A budget that refuses leaves windows and other budgets as they were, and the other way round."""
    day, month, rate = daily(100), monthly(50), window(1)
    assert not (await bench.acquire(rate, day, month, price=60)).admitted
    assert (await bench.acquire(rate, day, month, price=50)).admitted
    assert not (await bench.acquire(rate, day, price=1)).admitted
    assert await books(bench, day) == (0, 50)
    assert await books(bench, month) == (0, 50)
    assert await bench.used(rate) == [1]


async def test_a_budget_with_just_enough_left_does_not_refuse(bench: Bench) -> None:
    """A budget reports a refusal only if it has too little for the price, even if another limit refuses."""
    day, month, full = daily(100), monthly(99), window(1)
    await bench.acquire(full)
    await bench.reserve(day, month, price=40)
    refused = await bench.acquire(full, day, month, price=60)
    assert [status.refuses for status in refused.statuses] == [True, False, True]


async def test_a_price_without_a_budget_is_held_nowhere(bench: Bench) -> None:
    """A charge of a slot alone has no estimate, whatever price was named."""
    reservation = await bench.reserve(slots(5), price=100)
    assert (reservation.price, reservation.periods, reservation.has_estimate) == (0, (), False)


async def test_a_settle_puts_the_price_in_place_of_the_estimate(bench: Bench) -> None:
    """Settling is counted once; another amount is ignored unless it is to replace the first."""
    day = daily(1_000)
    reservation = await bench.reserve(day, price=100)
    other = bench.another()
    assert await bench.backend.settle(reservation, 40) is SETTLED
    assert await books(bench, day) == (40, 0)
    assert await other.settle(reservation, 40) is REPEATED
    assert await bench.backend.settle(reservation, 41) is DIFFERENT
    assert await books(bench, day) == (40, 0)
    assert await other.settle(reservation, 900, replace=True) is SETTLED
    assert await bench.backend.settle(reservation, 900, replace=True) is REPEATED
    assert await books(bench, day) == (900, 0)
    assert await bench.backend.settle(reservation, 0, replace=True) is SETTLED
    assert await books(bench, day) == (0, 0)


async def test_a_price_above_the_estimate_may_pass_the_budget(bench: Bench) -> None:
    """Work that was done is charged in full, and the next request is refused, free or not."""
    reservation = await bench.reserve(daily(100), price=100)
    assert await bench.backend.settle(reservation, 250) is SETTLED
    outcome = await bench.acquire(daily(100), price=0)
    assert not outcome.admitted
    assert outcome.statuses == [BudgetStatus(250, 0, is_short=True)]


ENDS = ["settle 30", "settle 30", "keep", "give back", "untouched"]


@pytest.mark.parametrize("order", sorted(set(itertools.permutations(ENDS, 3))))
async def test_settling_and_finishing_count_once_in_any_order(bench: Bench, order: tuple[str, ...]) -> None:
    """The first step decides about the money, from whichever process, and nothing counts twice."""
    day, month = daily(1_000), monthly(5_000)
    reservation = await bench.reserve(day, month, price=100)
    backends = itertools.cycle([bench.backend, bench.another()])
    expected = None
    for step in order + order:
        backend = next(backends)
        if step == "settle 30":
            met = await backend.settle(reservation, 30)
            assert met is (SETTLED if expected is None else met)
        else:
            action = {
                "keep": EstimateAction.KEEP,
                "give back": EstimateAction.GIVE_BACK,
                "untouched": EstimateAction.UNTOUCHED,
            }[step]
            await backend.finish(reservation, action)
        if expected is None:
            expected = {"settle 30": (30, 0), "keep": (100, 0), "give back": (0, 0)}.get(step)
        assert await books(bench, day) == await books(bench, month) == (expected or (0, 100))


LATE = 31
"""Seconds after which an estimate that was not renewed has lapsed: its lease, and a part of it at most."""


async def test_an_estimate_lapses_with_its_lease(bench: Bench) -> None:
    """A holder that died, or never heard of its admission, holds nothing of a budget a lease later."""
    day, month = daily(1_000), monthly(5_000)
    await bench.reserve(day, month, slots(5), price=1_000)
    bench.wait(30, microseconds=-1)
    assert await books(bench, day) == await books(bench, month) == (0, 1_000)
    assert not (await bench.acquire(day, price=1)).admitted
    bench.wait(LATE - 30)
    assert await books(bench, day) == await books(bench, month) == (0, 0)
    assert (await bench.acquire(day, month, price=1_000)).admitted
    assert await books(bench, day) == await books(bench, month) == (0, 1_000)


async def test_an_estimate_lapses_at_the_end_of_a_part_of_its_lease(bench: Bench) -> None:
    """A lease has 32 parts, counted from 1970: an estimate is held in [t, end), to the microsecond."""
    day = daily(1_000)
    assert START % 1_000_000 == 0
    for late in (0, 1):
        bench.clock.now = START + late * 60_000_000 + late
        await bench.backend.acquire(Charge([day], lease_seconds=32.0), new_id(), 10)
        bench.clock.now = START + late * 60_000_000 + (32 + late) * 1_000_000 - 1
        assert await books(bench, day) == (0, 10)
        bench.wait(microseconds=1)
        assert await books(bench, day) == (0, 0)


@pytest.mark.parametrize("has_slot", [True, False])
async def test_a_renewed_estimate_lasts_from_its_renewal(bench: Bench, has_slot: bool) -> None:
    """With a slot and without one; what was not renewed lapses at its own time."""
    counters = [daily(1_000), monthly(5_000), *([slots(9), slots(9, of="app")] if has_slot else [])]
    renewed, left = await bench.reserve(*counters, price=100), await bench.reserve(*counters, price=10)
    for _ in range(5):
        bench.wait(20)
        assert await bench.another().renew(renewed, 30)
    assert await books(bench, daily(1_000)) == (0, 100)
    assert await bench.another().renew(left, 30) is not has_slot
    assert await books(bench, daily(1_000)) == (0, 100), "what has lapsed is not held again"
    bench.wait(LATE)
    assert await books(bench, monthly(5_000)) == (0, 0)


@pytest.mark.parametrize("reset", [True, False])
async def test_a_late_renewal_never_revives_an_estimate(bench: Bench, reset: bool) -> None:
    """Though nobody looked since it lapsed, and though one of its periods was reset meanwhile."""
    day, month = daily(1_000), monthly(5_000)
    reservation = await bench.reserve(day, month, price=100)
    if reset:
        await bench.backend.reset(Charge([day]))
    bench.wait(LATE)
    await bench.another().renew(reservation, 30)
    assert await books(bench, day) == await books(bench, month) == (0, 0)


ENDINGS = {
    "settled": (SETTLED, (70, 0)),
    "ended": (EstimateAction.KEEP, (100, 0)),
    "failed": (EstimateAction.GIVE_BACK, (0, 0)),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("seen", [True, False])
async def test_what_ends_after_its_estimate_lapsed_is_charged_once(
    bench: Bench, ending: str, seen: bool
) -> None:
    """A process that was only cut off charges what its work has cost, and frees nothing of others."""
    day, month = daily(1_000), monthly(5_000)
    late = await bench.reserve(day, month, price=100)
    bench.wait(LATE)
    if seen:
        assert await books(bench, day) == (0, 0)
    other = await bench.reserve(day, month, price=7)
    met, (spent, held) = ENDINGS[ending]
    for backend in (bench.backend, bench.another()):
        if isinstance(met, EstimateAction):
            await backend.finish(late, met)
        else:
            assert await backend.settle(late, 70) in (SETTLED, REPEATED)
        assert await books(bench, day) == await books(bench, month) == (spent, held + 7)
    await bench.backend.finish(other, EstimateAction.KEEP)
    assert await books(bench, day) == await books(bench, month) == (spent + 7, held)


@pytest.mark.parametrize("late", [True, False])
async def test_a_kept_estimate_needs_no_renewal(bench: Bench, late: bool) -> None:
    """It is held until it is settled, also one that had lapsed before; keeping it twice is once."""
    day, month = daily(1_000), monthly(5_000)
    reservation, other = await bench.reserve(day, month, price=100), await bench.reserve(day, month, price=10)
    if late:
        bench.wait(LATE)
        assert await books(bench, day) == (0, 0)
    for backend in (bench.backend, bench.another()):
        await backend.hold_estimate(reservation)
    assert await books(bench, day) == (0, 100 if late else 110)
    bench.wait(3_600)
    assert await bench.backend.renew(reservation, 30)
    assert await books(bench, day) == await books(bench, month) == (0, 100)
    bench.wait(3_600)
    assert await books(bench, day) == (0, 100)
    assert await bench.backend.settle(reservation, 30) is SETTLED
    for each in (reservation, other):
        await bench.backend.hold_estimate(each)
    await bench.backend.finish(other, EstimateAction.GIVE_BACK)
    assert await books(bench, day) == await books(bench, month) == (30, 0)


async def test_what_was_settled_or_ended_is_not_kept(bench: Bench) -> None:
    """To keep an estimate that there is no more changes nothing."""
    day = daily(1_000)
    settled, ended = await bench.reserve(day, price=100), await bench.reserve(day, price=10)
    await bench.backend.settle(settled, 3)
    await bench.backend.finish(ended, EstimateAction.GIVE_BACK)
    for reservation in (settled, ended):
        await bench.backend.hold_estimate(reservation)
        await bench.backend.renew(reservation, 30)
    assert await books(bench, day) == (3, 0)


async def test_estimates_of_different_leases_lapse_each_in_its_turn(bench: Bench) -> None:
    """A book tells them apart in whatever order they come, and stays small however many there are."""
    day = daily(10**9)
    leases = [30.0, 7.0, 300.0, 1.0, 61.0]
    for turn in range(40):
        for place, lease in enumerate(leases):
            await bench.backend.acquire(Charge([day], lease_seconds=lease), new_id(), 10**place)
        if turn % 8 == 7:
            bench.wait(microseconds=100_003)
    for lease, held in ((1.0, 10111), (7.0, 10101), (30.0, 10100), (61.0, 100), (300.0, 0)):
        bench.clock.now = START + round(lease * 33 / 32 * 1_000_000) + 600_000
        assert await books(bench, day) == (0, 40 * held), lease


async def test_a_hold_that_is_restored_twice_is_held_once(bench: Bench) -> None:
    """A reservation of a process's own that is told again after a lost answer is held once."""
    day, month, own = daily(1_000), monthly(5_000), slots(5, of="app")
    charge, lease_id = Charge([own, day, month]), new_id()
    first = await bench.backend.restore(charge, lease_id, 100)
    if bench.kind != "memory":  # which is asked for nothing twice: its answers are not lost
        again = await bench.another().restore(charge, lease_id, 100)
        assert (again.admitted, again.reservation) == (True, first.reservation)
    assert (await bench.peek(own, day)).statuses == [
        SlotStatus(1, is_full=False),
        BudgetStatus(0, 100, is_short=False),
    ]
    await bench.backend.finish(first.reservation, EstimateAction.KEEP)
    assert (await bench.peek(own, month)).statuses == [
        SlotStatus(0, is_full=False),
        BudgetStatus(100, 0, is_short=False),
    ]


async def test_an_estimate_lives_on_where_the_clock_stepped_back(bench: Bench) -> None:
    """An estimate that lapsed before the clock was set back is not given back twice; new ones count."""
    day = daily(1_000)
    lapsed = await bench.reserve(day, price=100)
    bench.wait(LATE)
    await bench.reserve(day, price=5)
    bench.wait(-60)
    new = await bench.reserve(day, price=40)
    assert await books(bench, day) == (0, 45)
    await bench.backend.finish(lapsed, EstimateAction.GIVE_BACK)
    assert await books(bench, day) == (0, 45)
    await bench.backend.finish(new, EstimateAction.KEEP)
    assert await books(bench, day) == (40, 5)


async def test_a_settled_amount_can_be_replaced_for_a_day(bench: Bench) -> None:
    """Records go a day after they are settled, so that jobs of a whole month leave few; none counts twice."""
    month = monthly(5_000)
    reservation = await bench.reserve(month, price=100)
    await bench.backend.hold_estimate(reservation)
    bench.wait(3 * 86_400)
    assert await bench.backend.settle(reservation, 30) is SETTLED
    bench.wait(86_400 - 1)
    assert await bench.backend.settle(reservation, 40, replace=True) is SETTLED
    if bench.kind == "memory":  # a server forgets by its own clock
        bench.wait(1)
        assert await bench.backend.settle(reservation, 50, replace=True) is UNKNOWN
    assert await books(bench, month) == (40, 0)


async def test_a_settle_after_the_end_finds_no_record(bench: Bench) -> None:
    """Once a request ended undetached its estimate is final."""
    reservation = await bench.reserve(daily(1_000), price=100)
    await bench.backend.finish(reservation, EstimateAction.KEEP)
    assert await bench.backend.settle(reservation, 1, replace=True) is UNKNOWN
    assert await books(bench, daily(1_000)) == (100, 0)


async def test_a_kept_estimate_is_held_until_a_late_settle(bench: Bench) -> None:
    """A settle belongs to the day and month of its admission, up to two days after they have ended."""
    bench.clock.now = instant("2026-11-29T23:59:59.999999+00:00")
    day, month = daily(1_000), monthly(5_000)
    early, late, lost = [await bench.reserve(day, month, price=100) for _ in range(3)]
    for reservation in (early, late, lost):
        await bench.backend.hold_estimate(reservation)
    bench.wait(microseconds=1)
    assert await books(bench, day) == (0, 0)
    assert await books(bench, month) == (0, 300)
    await bench.backend.hold_estimate(await bench.reserve(day, month, price=1_000))
    assert await bench.backend.settle(early, 70) is SETTLED
    assert await books(bench, day) == (0, 1_000)
    assert await books(bench, month) == (70, 1_200)
    bench.clock.now = instant("2026-11-29T23:59:59.999999+00:00")
    assert await books(bench, day) == (70, 200)
    bench.clock.now = instant("2026-12-02T12:00:00+00:00")
    assert await books(bench, month) == (0, 0)
    assert await bench.backend.settle(late, 80) is SETTLED
    if bench.kind == "memory":  # a server forgets by its own clock
        bench.clock.now = instant("2026-12-03T00:00:00+00:00")
        assert await bench.backend.settle(lost, 90) is UNKNOWN
    bench.clock.now = instant("2026-11-30T12:00:00+00:00")
    assert await books(bench, month) == (150, 1_100)


# A zone, the first instant of a period, its last microsecond, and how many hours it has.
DAYS = [
    ("UTC", "2026-11-21T00:00:00+00:00", 24),
    ("Europe/Berlin", "2026-03-29T00:00:00+01:00", 23),
    ("Europe/Berlin", "2026-10-25T00:00:00+02:00", 25),
    ("America/New_York", "2026-03-08T00:00:00-05:00", 23),
    ("Australia/Lord_Howe", "2026-04-05T00:00:00+11:00", 24.5),
    ("Asia/Kathmandu", "2026-06-01T00:00:00+05:45", 24),
    ("America/Sao_Paulo", "2018-11-04T01:00:00-02:00", 23),  # midnight did not exist
    ("America/Sao_Paulo", "2018-02-17T00:00:00-02:00", 25),  # 23:00 to 24:00 came twice
    ("Africa/Cairo", "2026-04-24T01:00:00+03:00", 23),
    ("America/Havana", "2025-11-02T00:00:00-04:00", 25),  # midnight came twice
    ("America/St_Johns", "2010-11-07T00:00:00-02:30", 25),  # a minute of it came before the hour again
    ("Pacific/Apia", "2011-12-29T00:00:00-10:00", 24),  # the next day did not exist
]
MONTHS = [
    ("UTC", "2028-02-01T00:00:00+00:00", 29 * 24),
    ("UTC", "2027-02-01T00:00:00+00:00", 28 * 24),
    ("UTC", "2026-12-01T00:00:00+00:00", 31 * 24),
    ("Europe/Berlin", "2026-03-01T00:00:00+01:00", 31 * 24 - 1),
    ("Europe/Berlin", "2026-10-01T00:00:00+02:00", 31 * 24 + 1),
    ("Pacific/Apia", "2011-12-01T00:00:00-10:00", 30 * 24),
]


@pytest.mark.parametrize(
    ("kind", "timezone", "start", "hours"),
    [("daily", *day) for day in DAYS] + [("monthly", *month) for month in MONTHS],
)
async def test_a_period_lasts_as_long_as_the_calendar_says(
    bench: Bench, kind: str, timezone: str, start: str, hours: float
) -> None:
    """Days of 23 and 25 hours, leap years, zones that skip or repeat midnight: to the microsecond."""
    counter = (daily if kind == "daily" else monthly)(100, timezone=timezone)
    first = instant(start)
    end = first + round(hours * 3_600_000_000)
    admitted: list[bool] = []
    ends: list[int] = []
    for now in (first - 1, first, first + (end - first) // 2, end - 1, end):
        bench.clock.now = now
        outcome = await bench.acquire(counter, price=100)
        await bench.backend.hold_estimate(outcome.reservation)
        admitted.append(outcome.admitted)
        ends += [held.ends for held in outcome.reservation.periods]
    assert admitted == [True, True, False, False, True]
    assert ends[:2] == [first, end]


async def test_a_changed_time_zone_keeps_what_the_day_has_spent(bench: Bench) -> None:
    """A day goes by its date: in another zone its end moves and its amount stays."""
    assert (await bench.acquire(daily(100), price=60)).admitted
    moved = await bench.acquire(daily(100, timezone="Pacific/Auckland"), price=60)
    assert moved.admitted  # there it is the next day
    outcome = await bench.acquire(daily(100, timezone="Europe/Berlin"), price=60)
    assert not outcome.admitted
    assert outcome.statuses == [BudgetStatus(0, 60, is_short=True)]


async def test_currencies_are_counted_apart(bench: Bench) -> None:
    """A changed currency starts a budget of its own."""
    await bench.reserve(daily(100), price=100)
    assert (await bench.acquire(daily(100, currency="token"), price=100)).admitted


async def test_a_reset_leaves_no_negative_books(bench: Bench) -> None:
    """A settle or a give-back after a reset never makes room that was not there."""
    day = daily(100)
    settled, given_back, kept = [await bench.reserve(day, price=30) for _ in range(3)]
    await bench.backend.settle(settled, 40)
    await bench.backend.hold_estimate(kept)
    await bench.backend.reset(Charge([day]))
    assert await bench.backend.settle(settled, 10, replace=True) is SETTLED
    await bench.backend.finish(given_back, EstimateAction.GIVE_BACK)
    await bench.backend.finish(kept, EstimateAction.GIVE_BACK)
    assert await books(bench, day) == (0, 0)


async def test_the_largest_amounts_are_exact(bench: Bench) -> None:
    """A thousand million is counted to the micro-unit."""
    month = monthly(4 * LARGEST)
    for _ in range(3):
        reservation = await bench.reserve(month, price=LARGEST)
        assert await bench.backend.settle(reservation, LARGEST - 1) is SETTLED
    assert await books(bench, month) == (3 * LARGEST - 3, 0)
    assert not (await bench.acquire(month, price=LARGEST + 4)).admitted
    assert (await bench.acquire(month, price=LARGEST + 3)).admitted


async def test_a_charge_that_is_made_again_counts_in_the_period_of_its_time(bench: Bench) -> None:
    """A period ends before its end: what a backend has kept of a charge holds until then, and no longer."""
    midnight = instant("2026-11-22T00:00:00+00:00")
    charge = Charge([daily(100)])
    bench.clock.now = midnight - 1
    assert (await bench.backend.acquire(charge, new_id(), 100)).admitted
    assert not (await bench.backend.acquire(charge, new_id(), 100)).admitted
    bench.clock.now = midnight
    outcome = await bench.backend.acquire(charge, new_id(), 100)
    assert outcome.admitted
    assert [held.scope for held in outcome.reservation.periods] == ["USD:2026-11-22"]
    assert await books(bench, daily(100)) == (0, 100)
    bench.clock.now = midnight - 1  # the clock went back
    assert not (await bench.backend.acquire(charge, new_id(), 1)).admitted
    bench.clock.now = midnight - 86_400 * 1_000_000
    assert not (await bench.backend.acquire(charge, new_id(), 1)).admitted
    bench.clock.now -= 1
    assert (await bench.backend.acquire(charge, new_id(), 1)).reservation.periods[0].scope == "USD:2026-11-20"


async def test_what_has_no_lease_is_neither_settled_nor_ended(bench: Bench) -> None:
    """A reservation without an id, as in a token that anybody wrote, changes nothing; other calls go on."""
    day = daily(1_000)
    reservation = (await bench.acquire(day, slots(9), price=300)).reservation
    nobody = Reservation(
        b"",
        reservation.slots,
        reservation.periods,
        reservation.lease_seconds,
        reservation.price,
        reservation.currency,
    )
    assert await bench.backend.settle(nobody, 200) is UNKNOWN
    await bench.backend.hold_estimate(nobody)
    await bench.backend.finish(nobody, EstimateAction.GIVE_BACK)
    assert await books(bench, day) == (0, 300)
    assert await bench.backend.settle(reservation, 200) is SETTLED
    assert await books(bench, day) == (200, 0)
