"""Metered units: the rules that every backend keeps, on a clock that only the test moves."""

import asyncio

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction, OperationRefusedError, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation
from tests.support.conformance import (
    Bench,
    daily,
    metered,
    new_id,
    slots,
    window,
)
from tests.support.statuses import acquired

UNKNOWN, SETTLED = Settlement.UNKNOWN, Settlement.SETTLED
REPEATED, DIFFERENT = Settlement.REPEATED, Settlement.DIFFERENT
MINUTE = 60 * SECOND
TOKENS = metered(1_000)


async def renew(bench: Bench, reservation: Reservation, seconds: float) -> None:
    """Let time pass in which a reservation is renewed as a running request's is."""
    for _ in range(int(seconds // 10)):
        bench.wait(10)
        await bench.backend.renew(reservation, reservation.lease_seconds)


async def test_estimates_cannot_exceed_a_limit_together(bench: Bench) -> None:
    """Of ten requests at once that estimate 150 of 1,000 tokens each, six are let in."""
    charge = Charge([TOKENS], estimates={"tokens": 150})
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(10)])
    assert sum(outcome.admitted for outcome in outcomes) == 6
    assert await bench.used(TOKENS) == [900]


async def test_an_estimate_that_has_left_its_window_takes_nothing_off_others(bench: Bench) -> None:
    """It lapses under a raised quota, by which charges of one thousandth of the window share an entry."""
    small, large = metered(40), metered(2_000)
    await bench.reserve(small, tokens=3)
    bench.wait(microseconds=1)
    settled = await bench.reserve(small, tokens=5)
    assert await bench.backend.settle_units(settled, {"tokens": 5}) is SETTLED
    bench.wait(60, microseconds=-1)
    assert await bench.used(large) == [5]


async def test_what_was_not_used_is_given_back_to_the_moment_of_admission(bench: Bench) -> None:
    """A settle for less leaves at the old moment what was used, and makes room for the rest at once."""
    reservation = await bench.reserve(TOKENS, tokens=900)
    bench.wait(10)
    assert not (await bench.acquire(TOKENS, tokens=200)).admitted
    assert await bench.backend.settle_units(reservation, {"tokens": 100}) is SETTLED
    await bench.backend.hold_estimate(await bench.reserve(TOKENS, tokens=900))
    refused = await bench.acquire(TOKENS, tokens=100)
    assert refused.window() == (1_000, 50 * SECOND, 50 * SECOND)
    bench.wait(50)
    assert await bench.used(TOKENS) == [900]


async def test_what_was_used_above_the_estimate_counts_from_the_settle_on(bench: Bench) -> None:
    """It may pass the limit; later requests are refused until there is room, as they are told."""
    reservation = await bench.reserve(TOKENS, tokens=300)
    bench.wait(20)
    assert await bench.backend.settle_units(reservation, {"tokens": 1_300}) is SETTLED
    refused = await bench.acquire(TOKENS, tokens=100)
    assert refused.window() == (1_300, 40 * SECOND, 60 * SECOND)
    bench.wait(60, microseconds=-1)
    assert not (await bench.acquire(TOKENS, tokens=100)).admitted
    bench.wait(microseconds=1)
    assert (await bench.acquire(TOKENS, tokens=100)).admitted
    assert await bench.used(TOKENS) == [100]


async def test_a_request_without_an_estimate_needs_a_unit_and_charges_none(bench: Bench) -> None:
    """It is let in while anything is left, and charged what it settles."""
    reservations = [await bench.reserve(TOKENS) for _ in range(3)]
    assert await bench.used(TOKENS) == [0]
    await bench.backend.settle_units(reservations[0], {"tokens": 999})
    assert (await bench.acquire(TOKENS)).admitted
    await bench.backend.settle_units(reservations[1], {"tokens": 1})
    assert (await bench.acquire(TOKENS)).window() == (1_000, MINUTE, MINUTE)
    await bench.backend.settle_units(reservations[2], {"tokens": 5})
    assert await bench.used(TOKENS) == [1_005]


async def test_a_settle_counts_once(bench: Bench) -> None:
    """Another amount is ignored, unless it is to replace the first; also from another process."""
    reservation = await bench.reserve(TOKENS, tokens=100)
    other = bench.another()
    assert await bench.backend.settle_units(reservation, {"tokens": 40}) is SETTLED
    assert await other.settle_units(reservation, {"tokens": 40}) is REPEATED
    assert await other.settle_units(reservation, {"tokens": 41}) is DIFFERENT
    assert await bench.used(TOKENS) == [40]
    for amount in (41, 500, 300, 700, 0, 12):
        assert await bench.backend.settle_units(reservation, {"tokens": amount}, replace=True) is SETTLED
        assert await bench.used(TOKENS) == [amount]


async def test_units_are_settled_one_by_one(bench: Bench) -> None:
    """A unit that is not named keeps its estimate, and can be settled later."""
    images = metered(10, counts="images")
    reservation = await bench.reserve(TOKENS, images, tokens=100, images=4)
    assert await bench.backend.settle_units(reservation, {"images": 1}) is SETTLED
    assert await bench.used(TOKENS, images) == [100, 1]
    assert await bench.backend.settle_units(reservation, {"images": 2, "tokens": 7}) is DIFFERENT
    assert await bench.used(TOKENS, images) == [7, 1]
    assert await bench.backend.settle_units(reservation, {"seconds": 3}) is UNKNOWN


async def test_all_windows_of_a_unit_are_settled_alike(bench: Bench) -> None:
    """A settle corrects the caller's own windows of a unit and the windows that all callers share."""
    found = [metered(1_000), metered(5_000, 60), metered(2_000, of="app", scope="app")]
    reservation = await bench.reserve(*found, tokens=800)
    assert await bench.used(*found) == [800] * 3
    await bench.backend.settle_units(reservation, {"tokens": 300})
    assert await bench.used(*found) == [300] * 3
    await bench.backend.settle_units(reservation, {"tokens": 1_300}, replace=True)
    assert await bench.used(*found) == [1_300] * 3


async def test_a_refused_charge_estimates_nothing(bench: Bench) -> None:
    """Whichever limit refuses, units included: nothing stays charged, and nothing lapses later."""
    found = [window(5), TOKENS, metered(100, counts="images"), slots(1), daily(100)]
    found.append(metered(900, of="app", scope="app"))
    fitting = {"cost": 1, "price": 100, "tokens": 900, "images": 100}
    refused = [("cost", 6), ("tokens", 901), ("images", 101), ("price", 101)]
    for name, amount in refused:
        assert not (await bench.acquire(*found, **{**fitting, name: amount})).admitted
        assert await bench.used(*found) == [0] * 6
    first = await bench.acquire(*found, **fitting)
    assert first.admitted
    assert not (await bench.acquire(*found, price=0)).admitted
    assert (await bench.peek(*found, price=0)).counted == [1, 900, 100, 1, 0, 900]
    await bench.backend.finish(first.reservation, EstimateAction.GIVE_BACK)
    assert (await bench.peek(*found, price=0)).counted == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("action", "left"), [(EstimateAction.KEEP, 250), (EstimateAction.GIVE_BACK, 0)])
async def test_an_end_decides_about_what_is_not_settled(
    bench: Bench, action: EstimateAction, left: int
) -> None:
    """An estimate is kept where the request went well, and given back where it failed; a settle stands."""
    unsettled, settled = await bench.reserve(TOKENS, tokens=250), await bench.reserve(TOKENS, tokens=300)
    await bench.backend.settle_units(settled, {"tokens": 20})
    for _ in range(2):
        await bench.backend.finish(unsettled, action)
        await bench.backend.finish(settled, action)
    assert await bench.used(TOKENS) == [left + 20]
    assert await bench.backend.settle_units(unsettled, {"tokens": 5}) is UNKNOWN
    assert await bench.used(TOKENS) == [left + 20]


async def test_an_estimate_that_nobody_renews_is_given_back(bench: Bench) -> None:
    """With its lease, also for a charge that needs the room; a day's window doesn't keep it for a day."""
    day = metered(1_000, 1_440)
    await bench.reserve(TOKENS, day, tokens=900)
    bench.wait(30, microseconds=-1)
    assert not (await bench.acquire(TOKENS, day, tokens=200)).admitted
    bench.wait(microseconds=1)
    assert (await bench.acquire(TOKENS, day, tokens=200)).admitted
    assert await bench.used(TOKENS, day) == [200, 200]


async def test_an_estimate_that_is_renewed_stays(bench: Bench) -> None:
    """A request that runs for minutes has its estimate counted for as long as the window has it."""
    day = metered(1_000, 1_440)
    reservation = await bench.reserve(TOKENS, day, tokens=900)
    await renew(bench, reservation, 300)
    assert await bench.used(TOKENS, day) == [0, 900]
    await bench.backend.settle_units(reservation, {"tokens": 100})
    assert await bench.used(TOKENS, day) == [0, 100]
    bench.wait(600)
    assert await bench.used(day) == [100]


async def test_a_lapsed_estimate_is_never_revived(bench: Bench) -> None:
    """A renewal that comes too late changes nothing; a settle charges in full what was used."""
    day = metered(1_000, 1_440)
    reservation = await bench.reserve(day, tokens=900)
    bench.wait(30)
    await bench.backend.renew(reservation, 30.0)
    assert await bench.used(day) == [0]
    assert (await bench.acquire(day, tokens=500)).admitted
    assert await bench.backend.settle_units(reservation, {"tokens": 600}) is SETTLED
    assert await bench.backend.settle_units(reservation, {"tokens": 600}) is REPEATED
    assert await bench.used(day) == [1_100]
    await bench.backend.finish(reservation, EstimateAction.GIVE_BACK)
    assert await bench.used(day) == [1_100]


async def test_a_lapsed_estimate_that_ends_takes_nothing_from_others(bench: Bench) -> None:
    """An estimate that was given back once is not given back again."""
    reservation, other = await bench.reserve(TOKENS, tokens=100), await bench.reserve(TOKENS, tokens=300)
    await bench.backend.hold_estimate(other)
    bench.wait(30)
    assert await bench.used(TOKENS) == [300]
    await bench.backend.finish(reservation, EstimateAction.GIVE_BACK)
    assert await bench.used(TOKENS) == [300]


async def test_a_kept_estimate_waits_for_its_settle(bench: Bench) -> None:
    """A job that was detached keeps its estimate, unrenewed, until a late settle corrects it."""
    day = metered(1_000, 1_440)
    reservation = await bench.reserve(day, tokens=900)
    await bench.backend.hold_estimate(reservation)
    await bench.backend.hold_estimate(reservation)
    bench.wait(3_600)
    assert await bench.used(day) == [900]
    assert await bench.backend.settle_units(reservation, {"tokens": 100}) is SETTLED
    assert await bench.used(day) == [100]


async def test_a_settle_after_the_window_charges_what_the_estimate_left_out(bench: Bench) -> None:
    """A settle after the window charges only the amount used above the estimate, from now on."""
    less, more = await bench.reserve(TOKENS, tokens=100), await bench.reserve(TOKENS, tokens=100)
    for reservation in (less, more):
        await bench.backend.hold_estimate(reservation)
    bench.wait(3_600)
    assert await bench.backend.settle_units(less, {"tokens": 40}) is SETTLED
    assert await bench.used(TOKENS) == [0]
    assert await bench.backend.settle_units(more, {"tokens": 150}) is SETTLED
    assert await bench.used(TOKENS) == [50]


async def test_a_unit_may_be_settled_long_after_another(bench: Bench) -> None:
    """A charge waits for its last unit to be settled, however short its windows are."""
    images = metered(50, counts="images")
    reservation = await bench.reserve(TOKENS, images, tokens=10, images=1)
    await bench.backend.hold_estimate(reservation)
    assert await bench.backend.settle_units(reservation, {"tokens": 20}) is SETTLED
    bench.wait(3_600)
    assert await bench.backend.settle_units(reservation, {"images": 3}) is SETTLED
    assert await bench.used(TOKENS, images) == [0, 2]


async def test_a_request_that_runs_for_days_is_settled(bench: Bench) -> None:
    """Whatever is renewed can be settled, by a day and more after its windows are over."""
    reservation = await bench.reserve(TOKENS, tokens=10)
    for _ in range(4):
        bench.wait(80_000)
        await bench.backend.renew(reservation, reservation.lease_seconds)
    assert await bench.backend.settle_units(reservation, {"tokens": 20}) is SETTLED
    assert await bench.backend.settle_units(reservation, {"tokens": 20}) is REPEATED


async def test_many_who_use_more_than_there_is_take_bounded_room(bench: Bench) -> None:
    """A thousand requests without estimates settle one by one far beyond a limit of three: all is counted."""
    images = metered(3, counts="images")
    reservations = [(await bench.acquire(images)).reservation for _ in range(1_500)]
    for reservation in reservations:
        bench.wait(microseconds=7)
        await bench.backend.settle_units(reservation, {"images": 1})
    assert await bench.used(images) == [1_500]
    bench.wait(59)
    assert await bench.used(images) == [1_500]
    bench.wait(1.1)
    assert await bench.used(images) == [0]


@pytest.mark.parametrize("amount", [-1, 1.5, 10**9 + 1, 10**400, float("nan"), True, None, "7"])
async def test_only_whole_numbers_are_settled(bench: Bench, amount: int) -> None:
    """Anything else is refused, and charges nothing."""
    reservation = await bench.reserve(TOKENS, tokens=10)
    with pytest.raises(OperationRefusedError):
        await bench.backend.settle_units(reservation, {"tokens": amount})
    assert await bench.used(TOKENS) == [10]


@pytest.mark.parametrize("estimate", [-1, float("nan")])
async def test_an_estimate_that_is_none_is_refused(bench: Bench, estimate: int) -> None:
    """The backend does not count what can be no number of units."""
    with pytest.raises(OperationRefusedError):
        await bench.acquire(TOKENS, tokens=estimate)
    assert await bench.used(TOKENS) == [0]


async def test_an_estimate_beyond_all_limits_is_refused(bench: Bench) -> None:
    """However large it is, it is compared and not counted."""
    for estimate in (1_001, 2**32, 2**70):
        assert not (await bench.acquire(TOKENS, tokens=estimate)).admitted
    assert await bench.used(TOKENS) == [0]


async def test_what_was_counted_stays_when_a_limit_changes(bench: Bench) -> None:
    """Under another quota of the same length the same units are counted, and settled."""
    reservation = await bench.reserve(metered(100_000), tokens=900)
    assert await bench.used(metered(500)) == [900]
    assert not (await bench.acquire(metered(500))).admitted
    await bench.backend.settle_units(reservation, {"tokens": 100})
    assert (await bench.acquire(metered(500), tokens=400)).admitted


async def test_a_window_that_is_added_meanwhile_loses_nothing(bench: Bench) -> None:
    """A lapsed estimate is given back to the windows that were charged with it, and to no other."""
    await bench.reserve(TOKENS, tokens=900)
    day = metered(1_000_000, 1_440)
    others = await bench.reserve(TOKENS, day, tokens=100)
    await bench.backend.hold_estimate(others)
    bench.wait(30)
    await bench.acquire(TOKENS, tokens=950)
    await bench.acquire(TOKENS, day, tokens=1_000)
    assert await bench.used(day) == [100]


async def test_a_reset_forgets_what_is_open(bench: Bench) -> None:
    """A reset forgets estimates: a later settle charges the full use; a later lapse takes nothing away."""
    reservation = await bench.reserve(TOKENS, tokens=900)
    await bench.reserve(TOKENS, tokens=50)
    await bench.backend.reset(Charge([TOKENS]))
    assert await bench.used(TOKENS) == [0]
    await bench.backend.settle_units(reservation, {"tokens": 200})
    bench.wait(30)
    assert await bench.used(TOKENS) == [200]


async def test_a_charge_that_is_restored_is_charged_once(bench: Bench) -> None:
    """A charge that was admitted elsewhere is charged once under its id, however often it is restored."""
    if bench.kind == "memory":
        pytest.skip("a process asks itself once")
    charge, lease_id = Charge([TOKENS, slots(5)], estimates={"tokens": 300}), new_id()
    first = await bench.backend.restore(charge, lease_id, 0)
    await bench.backend.restore(charge, lease_id, 0)
    assert await bench.used(TOKENS, slots(5)) == [300, 1]
    await bench.backend.settle_units(first.reservation, {"tokens": 100})
    await bench.backend.restore(charge, lease_id, 0)
    assert await bench.used(TOKENS) == [100]


async def test_nothing_is_held_where_nothing_is_metered(bench: Bench) -> None:
    """A charge of windows alone leaves no record, and units can't be settled for it."""
    outcome = await acquired(bench.backend, Charge([window(5)], estimates={"tokens": 5}), new_id())
    assert outcome.reservation is NO_RESERVATION or outcome.reservation == NO_RESERVATION
    assert await bench.backend.settle_units(outcome.reservation, {"tokens": 5}) is UNKNOWN


@pytest.mark.parametrize("estimates", [{}, {"tokens": 50}, {"tokens": 50, "images": 10}])
async def test_units_of_several_places_settle_one_after_the_other(
    bench: Bench, estimates: dict[str, int]
) -> None:
    """One that is settled later counts as the first does, estimated or not; and each of them once."""
    limits = [metered(1_000), metered(500, counts="images", of="app", scope="app")]
    held = await bench.reserve(*limits, **estimates)
    for units in ({"tokens": 30}, {"images": 4}):
        assert await bench.backend.settle_units(held, units) is SETTLED
        assert await bench.backend.settle_units(held, units) is REPEATED
    assert await bench.used(*limits) == [30, 4]
    await bench.backend.finish(held, EstimateAction.GIVE_BACK)
    assert await bench.used(*limits) == [30, 4]


async def test_a_job_without_an_estimate_settles_elsewhere(bench: Bench) -> None:
    """Its token says no more than what was estimated: the amount that it has used counts, and once."""
    held = await bench.reserve(TOKENS, slots(2))
    await bench.backend.hold_estimate(held)
    of_token = Reservation(held.id, held.slots, (), 30.0, 0, "USD", held.meters, held.estimates)
    for met in (SETTLED, REPEATED):
        assert await bench.another().settle_units(of_token, {"tokens": 30}) is met
    assert await bench.used(TOKENS) == [30]


async def test_what_has_left_its_window_is_taken_off_no_other_charge(bench: Bench) -> None:
    """A larger quota shares entries of a moment; a charge under a smaller one has one of its own in it."""
    large, small = metered(2_000), metered(40)
    held = await bench.reserve(large, tokens=6)
    await bench.backend.hold_estimate(held)
    bench.wait(microseconds=1_000)
    other = await bench.reserve(small, tokens=3)
    assert await bench.backend.settle_units(other, {"tokens": 3}) is Settlement.SETTLED
    bench.wait(60, microseconds=-500)
    assert await bench.used(small) == [3]
    assert await bench.backend.settle_units(held, {"tokens": 0}) is Settlement.SETTLED
    assert await bench.used(small) == [3]
