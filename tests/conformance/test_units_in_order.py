"""Operations on the units of one lease, sent without waiting: each takes effect after those before it."""

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from tests.support.conformance import Bench, metered

TOKENS, OUTPUT = metered(10_000), metered(10_000, counts="output")
KEEP, GIVE_BACK = EstimateAction.KEEP, EstimateAction.GIVE_BACK
SETTLED, REPEATED, DIFFERENT = Settlement.SETTLED, Settlement.REPEATED, Settlement.DIFFERENT


class Settle(NamedTuple):
    """A settle, and what it meets."""

    units: dict[str, int]
    met: Settlement = SETTLED
    replace: bool = False


HOLD = "hold"
Step = Settle | EstimateAction | str

CASES: dict[str, tuple[dict[str, int], list[Step], list[int]]] = {
    "for more, kept": ({"tokens": 100}, [Settle({"tokens": 150}), KEEP], [150, 0]),
    "for more, given back": ({"tokens": 100}, [Settle({"tokens": 150}), GIVE_BACK], [150, 0]),
    "for less, kept": ({"tokens": 100}, [Settle({"tokens": 40}), KEEP], [40, 0]),
    "for less, given back": ({"tokens": 100}, [Settle({"tokens": 40}), GIVE_BACK], [40, 0]),
    "one unit of two, kept": ({"tokens": 100, "output": 50}, [Settle({"tokens": 40}), KEEP], [40, 50]),
    "one unit of two, given back": ({"tokens": 9, "output": 5}, [Settle({"tokens": 4}), GIVE_BACK], [4, 0]),
    "one without an estimate": ({"tokens": 100}, [Settle({"tokens": 40, "output": 20}), KEEP], [40, 20]),
    "one after the other": ({"tokens": 100}, [Settle({"tokens": 40}), Settle({"output": 70})], [40, 70]),
    "again": ({"tokens": 100}, [Settle({"tokens": 40}), Settle({"tokens": 40}, REPEATED)], [40, 0]),
    "less after more": (
        {"tokens": 100},
        [Settle({"tokens": 170}), Settle({"tokens": 40}, DIFFERENT)],
        [170, 0],
    ),
    "more after less": (
        {"tokens": 100},
        [Settle({"tokens": 40}), Settle({"tokens": 170}, DIFFERENT)],
        [40, 0],
    ),
    "replaced": ({"tokens": 100}, [Settle({"tokens": 40}), Settle({"tokens": 70}, replace=True)], [70, 0]),
    "replaced first": (
        {"tokens": 100},
        [Settle({"tokens": 70}, replace=True), Settle({"tokens": 40}, DIFFERENT)],
        [70, 0],
    ),
    "held": ({"tokens": 100}, [HOLD, Settle({"tokens": 40}), Settle({"tokens": 40}, REPEATED)], [40, 0]),
}


async def run(bench: Bench, estimates: dict[str, int], steps: list[Step], *, lapsed: bool) -> list[int]:
    """Send the steps one after the other, and wait for all of them; what both units count then."""
    held = await bench.reserve(TOKENS, OUTPUT, **estimates)
    if lapsed:
        bench.wait(31)
        assert await bench.used(TOKENS, OUTPUT) == [0, 0]
    sent: list[Awaitable[object]] = []
    for step in steps:
        if isinstance(step, Settle):
            sent.append(bench.backend.settle_units(held, step.units, replace=step.replace))
        elif isinstance(step, EstimateAction):
            sent.append(bench.backend.finish(held, step))
        else:
            sent.append(bench.backend.hold_estimate(held))
    answers = await asyncio.gather(*[_answer_of(each) for each in sent])
    for step, answer in zip(steps, answers, strict=True):
        assert not isinstance(step, Settle) or answer is step.met
    return await bench.used(TOKENS, OUTPUT)


async def _answer_of(sent: Awaitable[object]) -> object:
    return await sent


@pytest.mark.parametrize("name", CASES)
async def test_what_is_sent_later_takes_effect_later(bench: Bench, name: str) -> None:
    """Nothing passes what its lease has under way, by whichever way each of them goes."""
    estimates, steps, counted = CASES[name]
    assert await run(bench, estimates, steps, lapsed=False) == counted


@pytest.mark.parametrize("name", [name for name, (_, _, left) in CASES.items() if left[1] != 50])
async def test_the_same_of_estimates_that_have_lapsed(bench: Bench, name: str) -> None:
    """All that is settled counts from now on; what is not stays given back."""
    estimates, steps, counted = CASES[name]
    assert await run(bench, estimates, steps, lapsed=True) == counted


async def test_two_units_that_have_lapsed_are_settled_together(bench: Bench) -> None:
    """Each of them counts in full."""
    settle = Settle({"tokens": 40, "output": 20})
    assert await run(bench, {"tokens": 100, "output": 100}, [settle], lapsed=True) == [40, 20]
