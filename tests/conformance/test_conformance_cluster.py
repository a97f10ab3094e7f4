"""The rules that every backend keeps, on a cluster: the same tests, each partition on a node of its own."""

from collections.abc import AsyncIterator, Callable

import pytest

from tests.conformance import (
    test_conformance_batches,
    test_conformance_code_limits,
    test_conformance_money,
    test_conformance_slots,
    test_conformance_units,
    test_conformance_windows,
    test_oracle_late_limits,
)
from tests.support.conformance import Bench
from tests.support.servers import server_binaries
from tests.support.topologies import Cluster

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
