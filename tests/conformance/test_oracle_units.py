"""Metered units of every backend against the brute-force oracle: settles, ends, lapses, in any order."""

import asyncio
import os
import random

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import Slots, Window
from tests.conformance.test_oracle import STARTS, Comparison, bench
from tests.support.conformance import Bench, instant
from tests.support.oracle import Oracle

__all__ = ["bench"]

AMOUNTS = (0, 1, 3, 3, 9, 40)
QUOTAS = (10, 10, 40, 2_000)
"""Under the last one charges of a thousandth of the window share an entry."""


def limits_of(chance: random.Random) -> list[Counter]:
    """Some limits of one charge, at least one of tokens."""
    caller, quota = chance.choice(["a", "a", "b"]), chance.choice(QUOTAS)
    found = (
        [Counter(caller, "p", Window(chance.choice([3, 40]), 1, "minute"))] if chance.random() < 0.3 else []
    )
    found.append(Counter(caller, "p:tokens", Window(quota, 1, "minute", "tokens")))
    if caller == "b":
        found.append(Counter(caller, "p:tokens", Window(100, 7, "minute", "tokens")))
    if chance.random() < 0.3:
        found.append(Counter(caller, "p:images", Window(10, 1, "minute", "images")))
    if chance.random() < 0.5:
        found.append(Counter(caller, "p", Slots(chance.choice([2, 50]), lease_seconds=30.0)))
    if chance.random() < 0.3:
        found.append(Counter("app", "app:tokens", Window(60, 1, "minute", "tokens"), "everyone"))
    return found


def drive(state: Comparison, chance: random.Random, steps: int) -> None:
    """Do so many things at random with a backend and with the oracle, some with a clock that is set back."""
    steps_back = chance.random() < 0.3
    for _ in range(steps):
        what = chance.random()
        running = [
            reservation
            for reservation in state.reservations
            if reservation.meters and state.oracle.knows_units(reservation.id)
        ]
        if what < 0.35:
            charges = [
                (
                    limits_of(chance),
                    chance.choice([1, 2]),
                    0,
                    {unit: chance.choice(AMOUNTS) for unit in units},
                )
                for units in chance.choices(
                    [("tokens",), ("tokens", "images"), ()], k=chance.choice([1, 1, 3])
                )
            ]
            state.acquire(charges)
        elif what < 0.6 and running:
            reservation = chance.choice(running)
            units = {meter.unit: chance.choice(AMOUNTS) for meter in reservation.meters}
            state.settle_reservation(reservation, units, replace=chance.random() < 0.3)
        elif what < 0.7 and running:
            state.finish_reservation(chance.choice(running), chance.choice(list(EstimateAction)))
        elif what < 0.75 and running:
            state.hold_estimate(chance.choice(running))
        elif what < 0.8 and running:
            state.renew_reservation(chance.choice(running), 30.0)
        elif what < 0.85:
            state.peek(limits_of(chance), 1, 0, {"tokens": chance.choice(AMOUNTS)})
        elif what < 0.88 and steps_back:
            state.step_back(chance.choice([1, 1_000, 5_000_000]))
        elif what < 0.93:
            edges = state.oracle.edges()
            state.set_clock(max(chance.choice(edges[:8]) + chance.choice([-1, 0, 1]), state.oracle.now))
        else:
            state.wait(chance.choice([0, 1, 1_000, 1_000_000, 20_000_000, 61_000_000]))


def compare_units(bench: tuple[Bench, asyncio.Runner], examples: range, steps: int) -> None:
    """Compare a backend and the oracle, with counts of its own in each example."""
    for example in examples:
        state = Comparison(*bench, f"units {example}")
        assert state.oracle == Oracle(0)
        state.set_clock(instant(STARTS[0]))
        try:
            drive(state, random.Random(example), steps)
        except AssertionError as error:
            error.add_note(f"in example {example}")
            raise


def test_metered_units_and_the_oracle_give_the_same_answers(bench: tuple[Bench, asyncio.Runner]) -> None:
    """Settles for less, more and nothing, twice and late, failures and lapses: what is charged is exact."""
    compare_units(bench, range(40), 80)


def test_a_settle_after_a_clock_was_set_back_shortens_no_record(bench: tuple[Bench, asyncio.Runner]) -> None:
    """A settle that changes nothing leaves the record of its charge as long as it would have lived."""
    compare_units(bench, range(284_986_356, 284_986_357), 120)


def test_an_estimate_that_has_left_its_window_is_given_back_to_no_other(
    bench: tuple[Bench, asyncio.Runner],
) -> None:
    """Under another quota a charge a moment later has an entry of its own, in the same granule."""
    compare_units(bench, range(682_398_554, 682_398_555), 120)


@pytest.mark.slow
def test_the_same_of_units_for_much_longer(bench: tuple[Bench, asyncio.Runner]) -> None:
    """With `ORACLE_EXAMPLES` other examples each time."""
    first = random.randrange(10**6, 10**9)
    compare_units(bench, range(first, first + int(os.environ.get("ORACLE_EXAMPLES", "80"))), 120)
