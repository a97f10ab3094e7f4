"""All that is counted of a caller, over every route at once: to look at, and to forget."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus
from ratelimit_mw._internal.policy.identity import Identity

MAX_COUNTERS = 100
"""Counters in one question, so that none takes the backend long."""


async def overview(limiter: Limiter, identity: Identity) -> Decision:
    """Return the status of every limit that counts a caller: its plan's, its address's, each route's own.

    Charges nothing. Raises `BackendError`.
    """
    return await look(limiter, charges_of(limiter, identity))


def charges_of(limiter: Limiter, identity: Identity) -> tuple[Charge, ...]:
    """Return the charges of an `overview`, which are the same as long as the settings are the same."""
    counters = [
        counter for counter in limiter.engine.policies.counters_of(identity) if counter.owner != "everyone"
    ]
    return tuple(map(Charge, _parts(counters)))


async def look(limiter: Limiter, charges: Iterable[Charge]) -> Decision:
    """Return the status of every limit that these charges count in.

    Charges nothing. Raises `BackendError`.
    """
    now, limit_statuses = 0, list[LimitStatus]()
    for charge in charges:
        outcome = await limiter.engine.backend.peek(charge)
        await asyncio.sleep(0)  # on the memory backend nothing else pauses
        now = outcome.now
        limit_statuses += map(LimitStatus, charge.counters, charge.statuses(outcome))
    return Decision(True, now, limits=tuple(limit_statuses))


async def shared_overview(limiter: Limiter) -> Decision:
    """Return the status of the limits that all callers share. Charges nothing. Raises `BackendError`."""
    return await look(limiter, map(Charge, _parts(limiter.engine.policies.shared_counters())))


async def forget(limiter: Limiter, identity: Identity) -> int:
    """Clear everything that is counted of a caller; returns how many counters. Raises `BackendError`."""
    counters = [
        counter for counter in limiter.engine.policies.counters_of(identity) if counter.owner != "everyone"
    ]
    for part in _parts(counters):
        await limiter.engine.forget(part)
    return len(counters)


def _parts(counters: Sequence[Counter]) -> Iterator[Sequence[Counter]]:
    for start in range(0, len(counters), MAX_COUNTERS):
        yield counters[start : start + MAX_COUNTERS]
