"""Settles that share a call: of one caller and of several, of charges at one time and at many."""

import asyncio
import random
from typing import NamedTuple

import pytest

from ratelimit_mw._internal.model.backend import Settlement
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.conformance import Bench, metered

CALLERS = ["one", "two"]
PLACES = range(6)
STEP = 4
"""Seconds between charges that do not come at once; no estimate lapses before all are settled."""


class Charged(NamedTuple):
    """A charge, and what it settles: what that is more than its estimate counts from the settle on."""

    reservation: Reservation
    caller: str
    at: int
    used: dict[str, int]
    more: int
    settled_at: int


async def settle(bench: Bench, held: Charged) -> Settlement:
    """Settle what a charge has used."""
    tokens = held.used["tokens"] + held.more
    return await bench.backend.settle_units(held.reservation, {**held.used, "tokens": tokens})


@pytest.mark.parametrize("seed", range(12))
async def test_settles_at_once_count_as_if_they_came_one_by_one(bench: Bench, seed: int) -> None:
    """Each window counts what was used, at the time of its charge; an estimate is given back once."""
    chance = random.Random(seed)
    limits = {
        caller: [
            metered(900, of=caller),
            metered(9_000, 60, of=caller),
            metered(900, counts="output", of=caller),
        ]
        for caller in CALLERS
    }
    charged: list[Charged] = []
    for place in PLACES:
        for caller in chance.choices(CALLERS, k=chance.randint(1, 6)):
            estimates = {"tokens": chance.randint(1, 40), "output": chance.randint(1, 20)}
            reservation = await bench.reserve(*limits[caller], **estimates)
            used = {unit: chance.choice([0, amount, amount // 2]) for unit, amount in estimates.items()}
            more, at, settled_at = 0, place * STEP, len(PLACES) * STEP
            if chance.random() < 0.2:
                used["tokens"], more = estimates["tokens"], 50
            held = Charged(reservation, caller, at, used, more, settled_at)
            if chance.random() < 0.2:
                assert await settle(bench, held) is Settlement.SETTLED
                held = held._replace(settled_at=at)
            charged.append(held)
        bench.wait(STEP)
    chance.shuffle(charged)
    for each, met in zip(
        charged, await asyncio.gather(*[settle(bench, each) for each in charged]), strict=True
    ):
        assert met is (Settlement.SETTLED if each.settled_at > each.at else Settlement.REPEATED)
    # Step by step the minute leaves behind what the hour still counts.
    bench.wait(60 - len(PLACES) * STEP)
    for now in range(60, 60 + len(PLACES) * STEP, STEP):
        for caller, counters in limits.items():
            found = [each for each in charged if each.caller == caller]
            minute = [each for each in found if each.at > now - 60]
            assert await bench.used(*counters) == [
                sum(each.used["tokens"] for each in minute)
                + sum(each.more for each in found if each.settled_at > now - 60),
                sum(each.used["tokens"] + each.more for each in found),
                sum(each.used["output"] for each in minute),
            ]
        bench.wait(STEP)
