"""Questions to the decider, and their answers where some limits in code only report."""

from typing import NamedTuple

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.limiter.decider import Decider
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy


class Question(NamedTuple):
    """A request or job to be decided about: under which policy, for whom, at which estimates."""

    policy: Policy
    identity: Identity
    price: int | None = None
    """Estimate in units of the caller's currency; None: the route's."""
    units: Units | None = None
    """Estimates of metered units; None: the route's."""


async def ask(decider: Decider, question: Question, *, may_wait: bool = False) -> Lease:
    """Decide about one question. Never raises for a backend that is away.

    A refusal that `may_wait` is neither counted nor told before `Decider.tell_of` is called.
    """
    policy, identity, price, units = question
    decided = decider.decide(policy, identity, price, units, may_wait)
    lease = decided if isinstance(decided, Lease) else await decided
    return (
        lease if policy.enforced is None else await enforced(decider, lease, price, units, may_wait=may_wait)
    )


async def enforced(
    decider: Decider,
    lease: Lease,
    price: int | None = None,
    units: Units | None = None,
    *,
    may_wait: bool = False,
) -> Lease:
    """Decide once more, without limits that only report, where one of these has refused.

    They let the request through; all others have to be charged.
    """
    policy = lease.policy
    if policy.enforced is None or policy.shadow or lease.outcome is not None or not lease.allowed:
        return lease
    if lease.decision.refusal is None:  # admitted without the backend
        return lease
    decided = decider.decide(policy.enforced, lease.identity, price, units, may_wait)
    return decided if isinstance(decided, Lease) else await decided
