"""Estimates of metered units in Redis: how few of them leave a record, and what becomes of many at once."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.conformance import STORES, Bench, SharedServer, metered, new_id, opened, slots, window
from tests.support.servers import StoreServer

SETTLED, REPEATED, DIFFERENT = Settlement.SETTLED, Settlement.REPEATED, Settlement.DIFFERENT
MANY = 12


@pytest.fixture(params=STORES)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """Each kind of server in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench


def records(bench: Bench) -> int:
    """Count the records of charges with metered units."""
    assert isinstance(bench.server, StoreServer)
    with bench.server.client() as client:
        return len(client.keys("*:u:*"))


def lives(bench: Bench, keys: str) -> int:
    """Milliseconds that the one key with such a name lives."""
    assert isinstance(bench.server, StoreServer)
    with bench.server.client() as client:
        (found,) = client.keys(keys)
        left: int = client.pttl(found)
        return left


async def test_a_request_leaves_a_record_only_where_it_needs_one(bench: Bench) -> None:
    """A settle for no more than the estimate and the end of a request need none; a settle for more does."""
    for used in (0, 40, 100):
        held = await bench.reserve(metered(1_000), tokens=100)
        assert await bench.backend.settle_units(held, {"tokens": used}) is SETTLED
    for action in (EstimateAction.KEEP, EstimateAction.GIVE_BACK):
        await bench.backend.finish(await bench.reserve(metered(1_000), tokens=100), action)
    assert records(bench) == 0
    assert await bench.used(metered(1_000)) == [240]
    held = await bench.reserve(metered(1_000), tokens=100)
    assert await bench.backend.settle_units(held, {"tokens": 130}) is SETTLED
    assert records(bench) == 1
    assert await bench.used(metered(1_000)) == [370]


@pytest.mark.parametrize("first", [40, 100, 130])
async def test_an_amount_that_was_settled_is_known_to_its_lease(bench: Bench, first: int) -> None:
    """Whether that left a record or not: once more is no change, another amount is refused or replaces it."""
    held = await bench.reserve(metered(1_000), metered(9_000, 60), slots(3), tokens=100)
    assert await bench.backend.settle_units(held, {"tokens": first}) is SETTLED
    assert await bench.backend.settle_units(held, {"tokens": first}) is REPEATED
    assert await bench.backend.settle_units(held, {"tokens": 7}) is DIFFERENT
    assert await bench.used(metered(1_000), metered(9_000, 60)) == [first, first]
    for amount in (70, 250, 10):
        assert await bench.backend.settle_units(held, {"tokens": amount}, replace=True) is SETTLED
        assert await bench.used(metered(1_000), metered(9_000, 60)) == [amount, amount]
    await bench.backend.finish(held, EstimateAction.GIVE_BACK)
    assert await bench.used(metered(1_000), metered(9_000, 60)) == [10, 10]


async def test_settles_of_many_callers_at_once_share_a_call(bench: Bench) -> None:
    """They leave together, each for its own caller, beside whatever else leaves then."""
    counters = [metered(1_000, of=f"caller {index}") for index in range(MANY)]
    held = [await bench.reserve(counter, tokens=100) for counter in counters]
    assert isinstance(bench.backend, RedisBackend)
    before = bench.backend.load
    met = await asyncio.gather(
        *[_settled(bench, each, index) for index, each in enumerate(held)], bench.peek(window(1))
    )
    assert met[:-1] == [SETTLED] * MANY
    assert bench.backend.load.batches - before.batches == 2
    assert bench.backend.load.operations - before.operations == MANY + 1
    assert [await bench.used(counter) for counter in counters] == [[index] for index in range(MANY)]


async def _settled(bench: Bench, held: Reservation, used: int) -> Settlement:
    return await bench.backend.settle_units(held, {"tokens": used})


async def test_estimates_of_one_caller_at_once_are_one_operation(bench: Bench) -> None:
    """Each is admitted or not as if it were alone, and closed by its own lease."""
    tokens, others = metered(1_000), [window(500), slots(50)]
    charge = Charge([*others, tokens], estimates={"tokens": 90})
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(MANY)])
    assert [outcome.admitted for outcome in outcomes] == [True] * 11 + [False]
    assert [outcome.used(2) for outcome in outcomes[:11]] == [90 * number for number in range(1, 12)]
    for index, outcome in enumerate(outcomes[:11]):
        assert await bench.backend.settle_units(outcome.reservation, {"tokens": index}) is SETTLED
    assert await bench.used(*others, tokens) == [11, 11, sum(range(11))]
    assert records(bench) == 0


async def test_lapsed_estimates_refuse_none_of_several_at_once(bench: Bench) -> None:
    """Estimates that have lapsed are given back before any of them is asked."""
    await bench.reserve(metered(1_000), tokens=800)
    bench.wait(31)
    charge = Charge([metered(1_000)], estimates={"tokens": 150})
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(MANY)])
    assert sum(outcome.admitted for outcome in outcomes) == 6
    assert await bench.used(metered(1_000)) == [900]


async def test_requests_without_an_estimate_are_all_let_in_while_a_unit_is_left(bench: Bench) -> None:
    """Several at once charge nothing, so none of them takes the last unit from the others."""
    await bench.backend.finish(await bench.reserve(metered(100), tokens=99), EstimateAction.KEEP)
    charge = Charge([metered(100)])
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(MANY)])
    assert all(outcome.admitted for outcome in outcomes)
    await bench.backend.finish(await bench.reserve(metered(100), tokens=1), EstimateAction.KEEP)
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(MANY)])
    assert not any(outcome.admitted for outcome in outcomes)


@pytest.mark.parametrize("quota", [900, 50_000], ids=["exact", "by a thousandth"])
@pytest.mark.parametrize("later", [1, 4, 7, 40])
async def test_an_estimate_is_closed_wherever_its_entry_is_by_then(
    bench: Bench, quota: int, later: int
) -> None:
    """In the header of its window, on the stage or in the ring: what was not used is taken off that one."""
    tokens = Counter("caller", "p:tokens", Window(quota, 1, "minute", "tokens"))
    first = await bench.reserve(tokens, tokens=200)
    for _ in range(later):
        bench.wait(1)
        await bench.backend.finish(await bench.reserve(tokens, tokens=3), EstimateAction.KEEP)
    assert await bench.backend.settle_units(first, {"tokens": 50}) is SETTLED
    assert await bench.used(tokens) == [50 + 3 * later]
    bench.wait(60 - later + (0.06 if quota > 1_000 else 0))
    assert await bench.used(tokens) == [3 * later]


async def test_open_estimates_live_as_long_as_their_leases(bench: Bench) -> None:
    """A lease may be longer than the windows; each renewal lets the set live as long again."""
    second = Counter("caller", "p:tokens", Window(10_000, 1, "second", "tokens"))
    held = await bench.reserve(second, slots(3, lease=90), tokens=100)
    assert 90_000 < lives(bench, "*:e:*") <= 102_250
    assert isinstance(bench.server, StoreServer)
    with bench.server.client() as client:
        (found,) = client.keys("*:e:*")
        client.pexpire(found, 60_000)
    assert await bench.backend.renew(held, 90)
    assert 90_000 < lives(bench, "*:e:*") <= 102_250


async def test_what_has_lapsed_is_noted_for_a_settle_that_comes_late(bench: Bench) -> None:
    """It was given back, so that all that was used counts from the settle on, and once."""
    held = await bench.reserve(metered(1_000), tokens=300)
    bench.wait(31)
    assert await bench.used(metered(1_000)) == [0]
    assert records(bench) == 1
    assert 86_000_000 < lives(bench, "*:u:*") <= 86_400_000
    assert await bench.backend.settle_units(held, {"tokens": 120}) is SETTLED
    assert await bench.backend.settle_units(held, {"tokens": 120}) is REPEATED
    bench.wait(59)
    assert await bench.used(metered(1_000)) == [120]


async def test_a_charge_that_is_restored_twice_is_renewed_and_settled(bench: Bench) -> None:
    """The answer to the first try may be lost: the second does not know when the first was."""
    charge, lease_id = Charge([metered(1_000)], estimates={"tokens": 100}), new_id()
    await bench.backend.restore(charge, lease_id, 0)
    bench.wait(1)
    held = (await bench.backend.restore(charge, lease_id, 0)).reservation
    for _ in range(2):
        bench.wait(20)
        assert await bench.backend.renew(held, 30)
    bench.wait(18)
    assert await bench.used(metered(1_000)) == [100]
    assert await bench.backend.settle_units(held, {"tokens": 40}) is SETTLED
    assert await bench.used(metered(1_000)) == [40]


async def test_one_of_many_that_is_not_open_is_told_from_the_others(bench: Bench) -> None:
    """Settles of one caller share a call: who has to ask again is the one whose estimate has gone."""
    tokens, output = metered(10_000), metered(10_000, counts="output")
    held = [await bench.reserve(tokens, output, tokens=100, output=10) for _ in range(5)]
    assert isinstance(bench.server, StoreServer)
    with bench.server.client() as client:
        (key,) = client.keys("*:e:*tokens*")
        (gone,) = [each for each in client.zrange(key, 0, -1) if each.startswith(held[2].id)]
        client.zrem(key, gone)

    async def settle(place: int) -> Settlement:
        return await bench.backend.settle_units(held[place], {"tokens": 10 * place, "output": place})

    assert await asyncio.gather(*map(settle, range(5))) == [SETTLED] * 5
    # What was estimated of the one that has gone stays, since nobody gave it back.
    assert await bench.used(tokens, output) == [10 * (0 + 1 + 2 + 3 + 4) + 100, 0 + 1 + 2 + 3 + 4]
    assert records(bench) == 1
    assert await asyncio.gather(*map(settle, range(5))) == [REPEATED] * 5
