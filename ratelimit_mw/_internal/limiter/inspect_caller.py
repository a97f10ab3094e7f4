"""All that is counted of a caller, over every route at once: to look at, and to forget."""

import asyncio
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.policy.by import Whose
from ratelimit_mw._internal.policy.code_limits import Limit, rates_of
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus
from ratelimit_mw._internal.policy.identity import Identity

logger = logging.getLogger("ratelimit_mw")

LimitWithRates = tuple[Limit, tuple[Window, ...] | None]
"""A limit in code, and its rates for one caller; None for its own."""
MAX_COUNTERS = 100
"""Counters in one question, so that none takes the backend long."""


async def overview(limiter: Limiter, identity: Identity) -> Decision:
    """Return the status of every limit that counts a caller: its plan's, its address's, each route's own.

    Charges nothing. Raises `BackendError`.
    """
    limits = await with_rates(limits_by_caller(limiter), identity)
    return await look(limiter, charges_of(limiter, identity, limits))


def limits_by_caller(limiter: Limiter) -> tuple[Limit, ...]:
    """Return the limits in code that count by caller: those on routes, and others that were charged so."""
    marked = [limit for limit in limiter.marked if limit.by is Whose.CALLER]
    marked.sort(key=lambda limit: limit.name)
    return tuple(dict.fromkeys([*marked, *limiter.engine.live.rules.code_limits.by_caller]))


async def with_rates(limits: Iterable[Limit], identity: Identity) -> list[LimitWithRates]:
    """Return limits with their rates for this caller, which `rates_for` may have to be awaited for."""
    return [(limit, await _rates(limit, identity)) for limit in limits]


def charges_of(limiter: Limiter, identity: Identity, limits: Sequence[LimitWithRates]) -> tuple[Charge, ...]:
    """Return the charges of an `overview`, the same as long as settings and limits in code are the same."""
    return tuple(map(Charge, _parts(_counters_of(limiter, identity, limits))))


def _counters_of(limiter: Limiter, identity: Identity, limits: Sequence[LimitWithRates]) -> list[Counter]:
    """Return everything that counts a caller, of these limits in code, too."""
    found = [each for each in limiter.engine.policies.counters_of(identity) if each.owner != "everyone"]
    found += limiter.engine.live.rules.code_limits.counters_of(limits, identity.partition)
    return found


async def _rates(limit: Limit, identity: Identity) -> tuple[Window, ...] | None:
    """Return the rates of a limit for this caller; None for its own."""
    if limit.rates_for is None:
        return None
    try:
        rates: object = limit.rates_for(identity)
        if inspect.isawaitable(rates):
            rates = await rates
        return None if rates is None else rates_of(rates, limit.unit, limit.name)
    except Exception:
        logger.exception("rates_for= of limit %s failed; the limit's own rates are shown", limit.name)
        return None


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
    limits = await with_rates(limits_by_caller(limiter), identity)
    counters = _counters_of(limiter, identity, limits)
    for part in _parts(counters):
        await limiter.engine.forget(part)
    return len(counters)


def _parts(counters: Iterable[Counter]) -> Iterator[Sequence[Counter]]:
    """Counters in parts, each for one question. Windows that are charged together stay together."""
    part = list[Counter]()
    for _, together in groupby(counters, lambda counter: (counter.partition, counter.scope)):
        found = list(together)
        if part and len(part) + len(found) > MAX_COUNTERS:
            yield part
            part = []
        part += found
    if part:
        yield part
