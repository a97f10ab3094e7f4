"""The rules that every backend keeps, on a cluster: the same tests, each partition on a node of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from ratelimit_mw._internal.model.backend import Settlement
from ratelimit_mw._internal.model.reservation import Reservation
from tests.conformance import (
    test_conformance_batches,
    test_conformance_code_limits,
    test_conformance_money,
    test_conformance_slots,
    test_conformance_units,
    test_conformance_windows,
    test_oracle_late_limits,
    test_settles_together,
    test_units_in_order,
)
from tests.support.conformance import Bench, metered
from tests.support.servers import server_binaries
from tests.support.topologies import Cluster, slot_of

BY_ITS_CLOCK = {"test_a_kept_estimate_is_held_until_a_late_settle"}
"""Tests that need a server which forgets by the test's clock, or is quicker than its own."""
KINDS = [
    pytest.param(kind, marks=[pytest.mark.slow] if kind != "redis" else [])
    for kind in sorted(server_binaries())
]

for suite in (
    test_conformance_windows,
    test_conformance_slots,
    test_conformance_money,
    test_conformance_units,
    test_conformance_batches,
    test_conformance_code_limits,
    test_oracle_late_limits,
    test_settles_together,
    test_units_in_order,
):
    rules = {name: test for name, test in vars(suite).items() if name.startswith("test_")}
    globals().update({name: test for name, test in rules.items() if name not in BY_ITS_CLOCK})


@pytest.fixture(params=KINDS)
async def bench(
    request: pytest.FixtureRequest, shared_cluster: Callable[[str], Cluster]
) -> AsyncIterator[Bench]:
    """A cluster of each kind in turn, without any counts."""
    bench = Bench(f"{request.param} cluster", shared_cluster(request.param))
    yield bench
    await bench.close()


async def test_units_of_two_nodes_are_settled_apart(bench: Bench) -> None:
    """One has a record by then, and the other has lapsed: what is settled late counts in full."""
    tokens, output = metered(1_000, of="caller a"), metered(1_000, of="caller b", counts="output")
    held = await bench.reserve(tokens, output, tokens=100, output=100)
    assert await bench.backend.settle_units(held, {"tokens": 150}) is Settlement.SETTLED
    bench.wait(31)
    assert await bench.used(tokens, output) == [150, 0]
    assert await bench.backend.settle_units(held, {"output": 30}) is Settlement.SETTLED
    assert await bench.used(tokens, output) == [150, 30]


async def test_late_settles_of_many_callers_at_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The main script finds out about each on its own node and in its own slot."""
    counters = [metered(1_000, of=f"caller {index}") for index in range(20)]
    held = [await bench.reserve(counter, tokens=100) for counter in counters]
    bench.wait(31)
    assert [await bench.used(counter) for counter in counters] == [[0]] * 20
    await asyncio.gather(*[_settle(bench, each) for each in held])
    assert [await bench.used(counter) for counter in counters] == [[40]] * 20
    assert "away" not in caplog.text


async def _settle(bench: Bench, held: Reservation) -> None:
    assert await bench.backend.settle_units(held, {"tokens": 40}) is Settlement.SETTLED


async def test_an_estimate_that_lapses_while_its_slot_moves_is_given_back(bench: Bench) -> None:
    """It can't be noted on a node that gives the slot away, and is given back all the same."""
    assert isinstance(bench.server, Cluster)
    tokens = metered(1_000, of="mover")
    await bench.reserve(tokens, tokens=100)
    bench.wait(31)
    slot = slot_of("mover")
    source = bench.server.owner_of(slot)
    target = next(node for node in bench.server.nodes if node is not source)
    bench.server.open_migration(slot, target)
    assert await bench.used(tokens) == [0]
    bench.server.move_keys(slot, source, target)
    bench.server.close_migration(slot, target)
    assert await bench.used(tokens) == [0]
