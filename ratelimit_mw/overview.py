"""All that is counted of a caller, over every route at once: to look at, and to forget."""

from collections.abc import Iterator, Sequence

from ratelimit_mw.charge import Charge, Counter
from ratelimit_mw.decision import Decision, Standing
from ratelimit_mw.identity import Identity
from ratelimit_mw.limiter import Limiter

MAX_COUNTERS = 100
"""Counters in one question, so that none takes the backend long."""


async def overview(limiter: Limiter, identity: Identity) -> Decision:
    """How everything stands that is counted of a caller: its plan's limits, its address's, each route's own.

    Charges nothing. Raises `BackendError`.
    """
    counters = [counter for counter in limiter.policies.counters_of(identity) if counter.owner != "everyone"]
    return await _peek(limiter, counters)


async def shared_overview(limiter: Limiter) -> Decision:
    """How the limits stand that all callers share. Charges nothing. Raises `BackendError`."""
    anybody = limiter.identify.of_address("unix")
    counters = [counter for counter in limiter.policies.counters_of(anybody) if counter.owner == "everyone"]
    return await _peek(limiter, counters)


async def forget(limiter: Limiter, identity: Identity) -> int:
    """Clear everything that is counted of a caller; returns how many counters. Raises `BackendError`."""
    counters = [counter for counter in limiter.policies.counters_of(identity) if counter.owner != "everyone"]
    for part in _parts(counters):
        await limiter.backend.reset(Charge(part))
    return len(counters)


async def _peek(limiter: Limiter, counters: Sequence[Counter]) -> Decision:
    now, standings = 0, list[Standing]()
    for part in _parts(counters):
        outcome = await limiter.backend.peek(Charge(part))
        now = outcome.now
        standings += map(Standing, part, outcome.figures)
    return Decision(True, now, standings=tuple(standings))


def _parts(counters: Sequence[Counter]) -> Iterator[Sequence[Counter]]:
    for start in range(0, len(counters), MAX_COUNTERS):
        yield counters[start : start + MAX_COUNTERS]
