"""Fixtures of the tests that ask the same of every backend."""

from collections.abc import AsyncIterator

import pytest

from tests.support.conformance import KINDS, Bench, SharedServer, opened


@pytest.fixture(params=KINDS)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """Each kind of backend in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench
