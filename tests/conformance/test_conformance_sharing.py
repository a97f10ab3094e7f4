"""Batches with keys that one charge needs, written with it, and keys that several share, written last."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ratelimit_mw._internal.model.backend import OperationRefusedError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.outcome import Outcome
from tests.support.conformance import STORES, Bench, SharedServer, daily, new_id, opened, slots, window
from tests.support.oracle import Oracle
from tests.support.servers import StoreServer

NO_COST: Any = 1.5
"""A cost that the script refuses."""


@pytest.fixture(params=STORES)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """A backend on each kind of server in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench


def own_limits(name: str) -> list[Counter]:
    """Return the limits that a caller has alone."""
    return [window(12, of=name), window(30, 1, "hour", of=name), slots(9, of=name)]


def everyones() -> list[Counter]:
    """Return the limits that all callers share: a window of each kind, and slots."""
    return [window(60, of="app"), window(1_500, 1, "hour", of="app"), slots(40, lease=20, of="app")]


async def at_once(bench: Bench, *charges: Charge) -> list[Outcome | BaseException]:
    """Make charges in one turn of the event loop, which leave in one batch."""
    await bench.backend.open()  # whose probe is a call, too
    before = bench.backend.load.batches
    outcomes = await asyncio.gather(
        *[bench.backend.acquire(charge, new_id()) for charge in charges], return_exceptions=True
    )
    assert bench.backend.load.batches == before + 1
    return outcomes


async def test_what_callers_share_and_what_they_do_not_agrees_with_the_oracle(bench: Bench) -> None:
    """Callers that come together are decided as if one by one, whatever limits they have in common."""
    chance, oracle = random.Random(7), Oracle(bench.clock.now)
    own = {name: own_limits(name) for name in "abcdefgh"}
    for _ in range(150):
        bench.wait(microseconds=chance.choice([0, 7, SECOND, 9 * SECOND, 21 * SECOND, 61 * SECOND]))
        oracle.now = bench.clock.now
        names = chance.sample(sorted(own), chance.randint(1, 6))
        charges = []
        for name in names:
            counters = chance.sample(own[name], 2) + chance.choice([[], everyones()[:2], everyones()])
            charges.append(Charge(chance.sample(counters, len(counters)), cost=chance.choice([1, 1, 3])))
        ids = [new_id() for _ in charges]
        outcomes = await asyncio.gather(*map(bench.backend.acquire, charges, ids))
        for charge, lease_id, outcome in zip(charges, ids, outcomes, strict=True):
            oracle.check(list(charge.counters), charge.cost, 0, lease_id, outcome)


async def test_one_that_fails_among_others_with_their_own_keys_fails_alone(bench: Bench) -> None:
    """A cost that the script refuses fails its own charge, of which nothing is counted."""
    charges = [Charge(own_limits(name), NO_COST if name == "b" else 1) for name in ("a", "b", "c")]
    results = await at_once(bench, *charges)
    assert [type(result) for result in results] == [Outcome, OperationRefusedError, Outcome]
    for name, used in (("a", 1), ("b", 0), ("c", 1)):
        assert await bench.used(*own_limits(name)) == [used] * 3


async def test_one_that_fails_charges_nothing_that_others_share(bench: Bench) -> None:
    """A charge that fails leaves what is shared as it would be without it."""
    shared = everyones()
    charges = [
        Charge([*shared, window(9, of=name)], NO_COST if name == "b" else 1) for name in ("a", "b", "c")
    ]
    results = await at_once(bench, *charges)
    assert [type(result) for result in results] == [Outcome, OperationRefusedError, Outcome]
    assert await bench.used(*shared) == [2, 2, 2]


async def test_without_memory_nothing_is_charged(bench: Bench) -> None:
    """Neither what a charge has alone nor what it shares, in any order of its limits; nor later."""
    assert isinstance(bench.server, StoreServer)
    shared = everyones()
    charges = [
        Charge([window(9, of="a"), *shared]),
        Charge([*shared, slots(9, of="b")]),
        Charge([*shared]),
        Charge([window(9, of="c"), slots(9, of="c")]),
    ]
    with bench.server.client() as client:
        client.config_set("maxmemory", "1")
        try:
            results = await at_once(bench, *charges)
        finally:
            client.config_set("maxmemory", "0")
    assert [str(result)[:3] for result in results] == ["OOM"] * 4
    assert await bench.used(*shared, window(9, of="a"), slots(9, of="b"), slots(9, of="c")) == [0] * 6


async def test_who_fails_without_memory_is_not_charged_where_another_makes_room(bench: Bench) -> None:
    """Expired leases of the second caller free memory: it is admitted, and what is shared counts it alone."""
    assert isinstance(bench.server, StoreServer)
    shared = window(60, of="app")
    await bench.reserve(slots(1, lease=1, of="b"))
    bench.wait(2)
    with bench.server.client() as client:
        client.config_set("maxmemory", "1")
        try:
            results = await at_once(
                bench, Charge([shared, window(9, of="a")]), Charge([slots(1, lease=1, of="b"), shared])
            )
        finally:
            client.config_set("maxmemory", "0")
    assert [type(result) for result in results] == [OperationRefusedError, Outcome]
    assert await bench.used(shared, window(9, of="a"), slots(1, lease=1, of="b")) == [1, 0, 1]


async def test_a_budget_that_several_charges_share_is_written_once(bench: Bench) -> None:
    """Charges of one budget in one batch see each other's estimates; what one needs alone is kept, too."""
    own, shared = daily(100, of="a"), daily(100, of="app")
    charges = [Charge([own, shared]), Charge([shared]), Charge([window(9, of="b"), shared])]
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id(), 40) for charge in charges])
    assert [outcome.admitted for outcome in outcomes] == [True, True, False]
    assert [figures[1] for figures in (await bench.peek(own, shared)).statuses] == [40, 80]
    assert await bench.used(window(9, of="b")) == [0]
