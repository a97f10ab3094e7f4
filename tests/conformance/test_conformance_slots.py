"""Concurrency slots: the rules that every backend keeps, on a clock that only the test moves."""

import asyncio

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import SlotStatus
from tests.support.conformance import Bench, new_id, slots, window


async def test_never_more_live_slots_than_the_limit(bench: Bench) -> None:
    """A set of slots admits one lease for each slot, and refuses the next one."""
    admitted = [(await bench.acquire(slots(3))).admitted for _ in range(5)]
    assert admitted == [True, True, True, False, False]
    assert (await bench.acquire(slots(3))).statuses == [SlotStatus(3, is_full=True)]


async def test_a_finished_lease_frees_its_slot_once(bench: Bench) -> None:
    """Releasing is idempotent, from whichever backend object it comes, and frees no other's slot."""
    first = await bench.reserve(slots(2))
    await bench.reserve(slots(2))
    for backend in (bench.backend, bench.another(), bench.backend):
        await backend.finish(first, EstimateAction.KEEP)
    assert await bench.used(slots(2)) == [1]
    assert (await bench.acquire(slots(2))).admitted
    assert not (await bench.acquire(slots(2))).admitted


async def test_a_lease_frees_itself_when_it_is_not_renewed(bench: Bench) -> None:
    """A slot is held in [t, t + lease), to the microsecond."""
    await bench.reserve(slots(1, lease=30))
    bench.wait(30, microseconds=-1)
    assert await bench.used(slots(1)) == [1]
    assert not (await bench.acquire(slots(1))).admitted
    bench.wait(microseconds=1)
    assert await bench.used(slots(1)) == [0]
    assert (await bench.acquire(slots(1))).admitted


async def test_a_renewed_lease_lasts_from_its_renewal(bench: Bench) -> None:
    """Renewing counts from now, also from another backend object, and may shorten a lease."""
    reservation = await bench.reserve(slots(1))
    bench.wait(29)
    assert await bench.another().renew(reservation, 600)
    bench.wait(599)
    assert await bench.used(slots(1)) == [1]
    assert await bench.backend.renew(reservation, 5)
    bench.wait(5, microseconds=-1)
    assert not (await bench.acquire(slots(1))).admitted
    bench.wait(microseconds=1)
    assert (await bench.acquire(slots(1))).admitted


async def test_a_renewal_may_shorten_a_lease(bench: Bench) -> None:
    """The slot is free when the new lease ends, however long the first one was."""
    reservation = await bench.reserve(slots(1, lease=600))
    assert await bench.backend.renew(reservation, 5)
    bench.wait(5, microseconds=-1)
    assert not (await bench.acquire(slots(1))).admitted
    bench.wait(microseconds=1)
    assert (await bench.acquire(slots(1))).admitted


@pytest.mark.parametrize("late", [0, 1, 10**9])
async def test_a_late_renewal_never_revives_a_lost_slot(bench: Bench, late: int) -> None:
    """A lease that has expired, or was released, is not renewed, though its slot may still be free."""
    lost, released = await bench.reserve(slots(5)), await bench.reserve(slots(5))
    await bench.backend.finish(released, EstimateAction.KEEP)
    assert not await bench.backend.renew(released, 30)
    bench.wait(30, microseconds=late)
    assert not await bench.backend.renew(lost, 30)
    assert not await bench.backend.renew(lost, 30)
    assert await bench.used(slots(5)) == [0]


async def test_many_holds_are_renewed_together_and_each_is_answered(bench: Bench) -> None:
    """Holds of several slot sets, each for its own time: what was lost of them is told of each alone."""
    apart = [await bench.reserve(slots(50), slots(5, of=f"o{number}")) for number in range(20)]
    shared = [await bench.reserve(slots(30, of="shared")) for _ in range(20)]
    await bench.backend.finish(apart[3], EstimateAction.KEEP)
    await bench.backend.finish(
        apart[7].with_keys(apart[7].slots[1:], apart[7].periods, (), ()), EstimateAction.KEEP
    )
    renewals = [
        (reservation, 40.0 + place) for place, reservation in enumerate([*apart, *shared, NO_RESERVATION])
    ]
    bench.wait(20)
    kept = await bench.another().renew_all(renewals)
    assert [place for place, each in enumerate(kept) if each is not True] == [3, 7]
    assert not any(kept[place] for place in (3, 7))
    bench.wait(39)
    assert await bench.used(slots(30, of="shared")) == [20]
    bench.wait(21 + 10)
    assert await bench.used(slots(30, of="shared")) == [9]
    assert await bench.backend.renew_all([]) == []


async def test_renewing_touches_no_other_lease(bench: Bench) -> None:
    """Renewing one lease leaves the leases of others to expire."""
    renewed, _ = await bench.reserve(slots(5)), await bench.reserve(slots(5))
    bench.wait(20)
    assert await bench.backend.renew(renewed, 30)
    bench.wait(10)
    assert await bench.used(slots(5)) == [1]


async def test_a_lease_in_several_slot_sets_is_lost_with_one_of_them(bench: Bench) -> None:
    """Renewing a lease that has lost one of its slots says so, and keeps the others."""
    own, shared = slots(5), slots(5, of="app", scope="app")
    reservation = await bench.reserve(own, shared)
    await bench.backend.reset(Charge([shared]))
    bench.wait(20)
    assert not await bench.backend.renew(reservation, 30)
    bench.wait(20)
    assert await bench.used(own, shared) == [1, 0]
    await bench.backend.finish(reservation, EstimateAction.KEEP)
    assert await bench.used(own, shared) == [0, 0]


async def test_a_slot_refused_costs_no_rate_and_a_rate_refused_takes_no_slot(bench: Bench) -> None:
    """Slots and windows are decided in one step."""
    assert (await bench.acquire(window(2), slots(1))).admitted
    assert not (await bench.acquire(window(2), slots(1))).admitted
    assert (await bench.acquire(window(2), slots(9))).admitted
    assert not (await bench.acquire(window(2), slots(9))).admitted
    assert await bench.used(window(2), slots(9)) == [2, 2]


async def test_a_changed_limit_of_slots_holds_at_once(bench: Bench) -> None:
    """Lowering refuses until enough are free, raising admits at once; nobody loses a slot."""
    reservations = [await bench.reserve(slots(4)) for _ in range(4)]
    assert (await bench.acquire(slots(2))).statuses == [SlotStatus(4, is_full=True)]
    assert (await bench.acquire(slots(5))).admitted
    for reservation in reservations[:3]:
        await bench.backend.finish(reservation, EstimateAction.KEEP)
    assert not (await bench.acquire(slots(2))).admitted
    await bench.backend.finish(reservations[3], EstimateAction.KEEP)
    assert (await bench.acquire(slots(2))).admitted


async def test_an_expired_lease_makes_room_in_the_same_step(bench: Bench) -> None:
    """A full set is rid of expired leases before it refuses."""
    for lease in (10, 20, 30):
        await bench.reserve(slots(3, lease=lease))
    bench.wait(20)
    outcomes = [await bench.acquire(slots(3)) for _ in range(3)]
    assert [outcome.admitted for outcome in outcomes] == [True, True, False]


async def test_a_fraction_of_a_second_is_a_lease(bench: Bench) -> None:
    """Leases that no number of microseconds equals exactly end at the same moment on every backend."""
    for lease in (0.1, 0.7, 2.3, 30.1, 1.000001):
        await bench.reserve(slots(1, lease=lease))
        bench.wait(microseconds=int(lease * 1_000_000) - 1)
        assert await bench.used(slots(1)) == [1]
        bench.wait(microseconds=1)
        assert await bench.used(slots(1)) == [0]


async def test_a_charge_without_slots_holds_nothing(bench: Bench) -> None:
    """Renewing, finishing and settling a reservation of nothing do nothing, and do not fail."""
    outcome = await bench.acquire(window(5))
    assert outcome.reservation is NO_RESERVATION
    await bench.backend.finish(NO_RESERVATION, EstimateAction.GIVE_BACK)
    assert await bench.backend.renew(NO_RESERVATION, 30)
    assert (await bench.backend.settle(NO_RESERVATION, 5)).name == "UNKNOWN"


async def test_many_at_once_get_as_many_slots_as_there_are(bench: Bench) -> None:
    """Of 200 at once for 5 slots exactly 5 are admitted, round after round."""
    charge = Charge([slots(5), window(100_000)])
    for _ in range(10):
        outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(200)])
        reservations = [outcome.reservation for outcome in outcomes if outcome.admitted]
        assert len(reservations) == 5
        await asyncio.gather(
            *[bench.backend.finish(reservation, EstimateAction.KEEP) for reservation in reservations]
        )
    assert await bench.used(slots(5), window(100_000)) == [0, 50]


async def test_a_refused_charge_is_told_the_live_slots(bench: Bench) -> None:
    """Whichever limit refuses, and however many slots are free, those that have expired don't count."""
    limits = [slots(9), window(3, 1, "hour"), slots(5, of="app")]
    for _ in range(3):
        await bench.acquire(*limits)
    bench.wait(29)
    await bench.backend.renew((await bench.acquire(slots(9))).reservation, 30)
    bench.wait(1)
    both = await asyncio.gather(bench.acquire(*limits), bench.acquire(*limits, cost=2))
    for outcome in both:
        assert not outcome.admitted
        assert outcome.counted == [1, 3, 0]


async def test_a_step_of_the_clock_frees_no_slot_early(bench: Bench) -> None:
    """Leases of several lengths, renewed to and fro: each lasts to the microsecond, whatever came before."""
    short, long = await bench.reserve(slots(9, lease=10)), await bench.reserve(slots(9, lease=60))
    await bench.backend.finish(await bench.reserve(slots(9, lease=5)), EstimateAction.KEEP)
    bench.wait(5)
    assert await bench.backend.renew(long, 20)
    assert await bench.backend.renew(short, 30)
    assert await bench.used(slots(9)) == [2]
    bench.wait(20, microseconds=-1)
    assert await bench.used(slots(9)) == [2]
    bench.wait(microseconds=1)
    assert await bench.used(slots(9)) == [1]
    bench.wait(10)
    assert await bench.used(slots(9)) == [0]
