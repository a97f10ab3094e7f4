"""Limits with costs and keys of their own: the rules that every backend keeps."""

import asyncio

from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Window
from tests.support.conformance import (
    Bench,
    daily,
    metered,
    new_id,
    slots,
    window,
)

PLAN = window(100)
LOGIN = Counter("l:0123", "c:login", Window(5, 1, "minute"), "key")
SEARCH = Counter("caller", "c:search", Window(30, 1, "minute"))
TOKENS = metered(1_000)


async def admitted(bench: Bench, *charges: Charge) -> list[bool]:
    """Return which of these charges, sent at the same time, are admitted."""
    asked = [bench.backend.acquire(charge, new_id()) for charge in charges]
    return [outcome.admitted for outcome in await asyncio.gather(*asked)]


async def test_each_limit_is_charged_its_own_cost(bench: Bench) -> None:
    """A limit in code has its own cost beside the route's and the estimates, and refuses by it."""
    charge = Charge([PLAN, TOKENS, SEARCH, LOGIN], 4, estimates={"tokens": 300, "c:search": 10, "c:login": 1})
    assert await admitted(bench, charge) == [True]
    assert await bench.used(PLAN, TOKENS, SEARCH, LOGIN) == [4, 300, 10, 1]
    assert await admitted(bench, charge, charge) == [True, True]
    assert await admitted(bench, charge) == [False], "of the tokens, and of the search"
    assert await bench.used(PLAN, TOKENS, SEARCH, LOGIN) == [12, 900, 30, 3]
    bench.wait(60)
    assert await admitted(bench, charge) == [True]


async def test_equal_charges_at_once_each_have_their_own_costs(bench: Bench) -> None:
    """Of twenty equal charges at once as many are admitted as fit, each at the limit's own cost."""
    charge = Charge([PLAN, SEARCH], 2, estimates={"c:search": 7})
    assert sum(await admitted(bench, *[charge] * 20)) == 4
    assert await bench.used(PLAN, SEARCH) == [8, 28]


async def test_a_refusal_by_any_limit_charges_none(bench: Bench) -> None:
    """Plan, slots and limits by other keys are charged together or not at all."""
    one = slots(1)
    full = {
        "plan": window(1, of="b"),
        "key": Counter("l:9", "c:x", Window(1, 1, "minute"), "key"),
        "slot": one,
    }
    for counter in full.values():
        assert (await bench.acquire(counter)).admitted
        charge = Charge([PLAN, SEARCH, LOGIN, counter], estimates={"c:search": 3})
        assert await admitted(bench, charge) == [False]
        assert await bench.used(PLAN, SEARCH, LOGIN) == [0, 0, 0]


async def test_a_charge_is_made_for_each_key(bench: Bench) -> None:
    """Charges that are made from one model differ in their keys, and each key has its own count."""
    model = Charge(
        [Counter("caller", "p", Window(100, 1, "minute")), Counter("key:0", "c:login", LOGIN.limit, "key")],
        estimates={"c:login": 2},
    )
    model.caller, model.keys = "caller", ("key:0",)
    for caller in ("k:a", "k:b"):
        for key in ("l:1", "l:2"):
            assert await admitted(bench, model.for_caller(caller, "", (key,))) == [True]
    for key in ("l:1", "l:2"):
        assert await admitted(bench, model.for_caller("k:a", "", (key,))) == [False]
    made = model.for_caller("k:a", "", ("l:1",))
    assert [counter.partition for counter in made.counters] == ["k:a", "l:1"]
    assert await bench.used(*made.counters) == [2, 4]


async def test_a_charge_is_given_back(bench: Bench) -> None:
    """An admitted charge can be undone: windows at each cost, units, money and slots, and nobody else's."""
    slot, money = slots(5), daily(1_000)
    counters = [PLAN, slot, money, TOKENS, SEARCH, LOGIN]
    charge = Charge(counters, 4, estimates={"tokens": 300, "c:search": 10, "c:login": 1})
    kept = await bench.backend.acquire(charge, new_id(), 100)
    bench.wait(microseconds=7)
    undone = await bench.backend.acquire(charge, new_id(), 100)
    assert kept.admitted
    assert undone.admitted
    assert await bench.used(*counters) == [8, 2, 0, 600, 20, 2]
    bench.backend.give_back(charge, undone.reservation, undone.times or (undone.now,))
    await until(bench, [4, 1, 0, 300, 10, 1], *counters)
    assert not (await bench.acquire(money, price=901)).admitted
    assert (await bench.acquire(money, price=900)).admitted
    await bench.backend.finish(kept.reservation, EstimateAction.KEEP)


async def test_given_back_twice_at_once(bench: Bench) -> None:
    """Equal charges that are given back at the same time are each given back once."""
    charge = Charge([PLAN, SEARCH, LOGIN], 2, estimates={"c:search": 3, "c:login": 1})
    outcomes = await asyncio.gather(*[bench.backend.acquire(charge, new_id()) for _ in range(5)])
    for outcome in outcomes[:3]:
        bench.backend.give_back(charge, outcome.reservation, outcome.times or (outcome.now,))
    await until(bench, [4, 6, 2], PLAN, SEARCH, LOGIN)


async def until(bench: Bench, expected: list[int], *counters: Counter) -> None:
    """Wait until so much is counted: what is given back is on its way."""
    async with asyncio.timeout(20):
        while await bench.used(*counters) != expected:
            await asyncio.sleep(0.01)
