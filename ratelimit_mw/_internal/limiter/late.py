"""Limits in code that are charged while a request runs, or for a job: by keys that only the app knows."""

import inspect
from collections.abc import MutableMapping, Sequence
from functools import partial
from typing import Any

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.manager import Leases
from ratelimit_mw._internal.lease.token import LeaseError
from ratelimit_mw._internal.limiter.decider import Decider
from ratelimit_mw._internal.limiter.questions import Question, ask
from ratelimit_mw._internal.limiter.turns import Turns, check_max_wait
from ratelimit_mw._internal.live.state import Live
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.policy.by import Whose
from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit, rates_of
from ratelimit_mw._internal.policy.decision import Decision, without_charge
from ratelimit_mw._internal.policy.extended import AskedLimit, AskedLimits, CodeLimits, everyones_partition
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.policy.rate_limited import RateLimited

Scope = MutableMapping[str, Any]


class LateCharges:
    """Charges limits in code on behalf of requests that were admitted."""

    def __init__(self, decider: Decider, leases: Leases, live: Live, turns: Turns) -> None:
        self._decider = decider
        self._leases = leases
        self._live = live
        self._turns = turns

    async def charge(
        self, lease: Lease, limits: Sequence[KeyedLimit | Limit], max_wait: float | None
    ) -> None:
        """Charge all of these limits in one step or, where one refuses, nothing at all of the request.

        Raises `RateLimited`, TypeError, ValueError and `LeaseError` as `Lease.charge` says.
        """
        seconds = check_max_wait(max_wait)
        question = await self._question(lease, limits)
        if question is None:
            return
        if seconds:
            late = await self._turns.wait(question, partial(self._question, lease, limits), seconds)
        else:
            late = await ask(self._decider, question)
        if late.allowed:
            self._join(lease, late)
            return
        decision = _refused(lease, late.decision)
        self._leases.undo(lease)
        lease.decide(decision)
        raise RateLimited(decision)

    async def _question(self, lease: Lease, limits: Sequence[KeyedLimit | Limit]) -> Question | None:
        """Return what to ask about a request by the rules in force; None where nothing limits it."""
        code_limits = self._live.rules.code_limits
        scope = lease.scope or scope_of_job("GET", "/")
        asked = await asked_late(limits, lease.identity, code_limits, scope)
        if lease.policy.is_decided or not asked:
            return None
        lease.raise_for_refusal()
        if lease.is_ended:
            raise LeaseError("the request is over: nothing more can be charged for it")
        return Question(code_limits.extend(lease.policy, asked, alone=True), lease.identity)

    def _join(self, lease: Lease, late: Lease) -> None:
        """Let a late charge end with its request."""
        if lease.is_ended:  # meanwhile
            self._leases.end(late, failed=False)
        else:
            lease.late = (*lease.late, late)


def _refused(lease: Lease, late: Decision) -> Decision:
    """Return the decision about a request that a late charge refused: with all limits as they stand then."""
    early = lease.decision
    if lease.is_charged and not lease.is_detached:
        early = without_charge(early, lease.initial_charge)
    costs = [early.cost_of(each) for each in early.limits] + [late.cost_of(each) for each in late.limits]
    return late._replace(limits=early.limits + late.limits, costs=tuple(costs))


async def asked_late(
    limits: Sequence[KeyedLimit | Limit], identity: Identity, code_limits: CodeLimits, scope: Scope
) -> AskedLimits:
    """Return limits as they count, by the keys that the app gave. Raises TypeError for one without a key.

    Limits whose `when` says no are left out.
    """
    asked = []
    for each in limits:
        keyed = each if isinstance(each, KeyedLimit) else None
        limit = each.limit if isinstance(each, KeyedLimit) else each
        if not isinstance(limit, Limit):
            raise TypeError(f"expected a limit, limit.on(key) or an Identity, not {type(each).__name__}")
        if limit.when is not None and not await _answer(limit.when(scope, identity)):
            continue
        rates = await _rates(limit, identity)
        asked.append(_own(limit, rates, code_limits) if keyed is None else code_limits.asked_on(keyed, rates))
    return tuple(dict.fromkeys([each for each in asked if each is not None]))


def scope_of_job(method: str, path: str) -> Scope:
    """Return a scope for what has no request: all that is known of a job."""
    return {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}


def _own(limit: Limit, rates: tuple[Window, ...] | None, code_limits: CodeLimits) -> AskedLimit | None:
    """Return a limit that needs no key of the app's. Raises TypeError for any other."""
    chosen = code_limits.choose(limit, rates, 1 if callable(limit.cost) else limit.cost)
    if limit.by not in (Whose.CALLER, Whose.EVERYONE):
        raise TypeError(f"{limit!r} needs a key here: charge it as limit.on(key)")
    if chosen is None:
        return None
    if limit.by is Whose.CALLER:
        code_limits.note_by_caller(limit)
        return AskedLimit(chosen, "caller", "")
    return AskedLimit(chosen, "everyone", everyones_partition(limit.name))


async def _answer(answer: object) -> object:
    """Return what a function of the app answers; it may be async."""
    return await answer if inspect.isawaitable(answer) else answer


async def _rates(limit: Limit, identity: Identity) -> tuple[Window, ...] | None:
    """Return the rates that a limit has for this caller alone; None for its own. Raises ValueError."""
    rates = None if limit.rates_for is None else await _answer(limit.rates_for(identity))
    return None if rates is None else rates_of(rates, limit.unit, limit.name)


def first_partition(limit: KeyedLimit | Limit, code_limits: CodeLimits) -> str:
    """Return the partition of a limit's key: the name of a job for which no caller is given."""
    return code_limits.partition_of(limit.key if isinstance(limit, KeyedLimit) else "")


def policy_with(policy: Policy, asked: AskedLimits, code_limits: CodeLimits, *, alone: bool) -> Policy:
    """Return a policy with limits in code added, or with these limits `alone`.

    An exempt policy is returned as it is. So is a blocked one, unless the limits stand alone: then no plan
    takes part, and none can block.
    """
    if policy.is_exempt or not asked or (policy.is_blocked and not alone):
        return policy
    return code_limits.extend(policy, asked, alone=alone)
