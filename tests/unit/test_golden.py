"""Fixed traffic is answered as it was when its answers were recorded, message for message."""

import pytest

from tests.golden.record import recorded
from tests.golden.scenarios import SCENARIOS, Scenario
from tests.golden.world import answers
from tests.support.conformance import SharedServer

PLAYED = [pytest.param(each, kind, id=f"{each}-{kind}") for each in SCENARIOS for kind in each.backends]


@pytest.mark.parametrize(("scenario", "kind"), PLAYED)
async def test_answers_are_those_recorded(scenario: Scenario, kind: str, shared_server: SharedServer) -> None:
    """Each request meets the hooks, the app, the messages with their headers and bodies, and the error that
    were recorded, in that order.
    """
    given = await answers(scenario, None if kind == "memory" else shared_server("redis").url)
    expected = recorded(scenario)
    assert len(given) == len(expected)
    for number, (now, then) in enumerate(zip(given, expected, strict=True)):
        assert now == then, f"request {number} of {scenario}"
