"""Decides about requests: the one way from a policy to a lease, for every kind of request."""

import logging
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.cache.prefetch import Prefetch
from ratelimit_mw._internal.cache.refusals import CachedRefusal, RefusalCache
from ratelimit_mw._internal.cache.shared_units import PartialCharge
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.manager import EXEMPT, Leases
from ratelimit_mw._internal.live.state import Live
from ratelimit_mw._internal.model.backend import Backend, BackendError, OperationRefusedError, PendingCharge
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, new_lease_id
from ratelimit_mw._internal.observe.budget_warnings import BudgetWarnings
from ratelimit_mw._internal.observe.decision_counts import DecisionCounts, outcome_and_limit
from ratelimit_mw._internal.observe.refusal_log import RefusalLog
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from ratelimit_mw._internal.policy.decision import Decision, blocked, decision_of
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy

if TYPE_CHECKING:
    from ratelimit_mw._internal.limiter.observers import Observers

logger = logging.getLogger("ratelimit_mw")


class Decider:
    """Decides about requests, one after the other, and counts what was decided.

    `decide` answers at once where this process knows enough: nothing limits the request, its units are in
    hand, its refusal is remembered, or counts are kept here. Else it asks the backend.
    """

    def __init__(  # noqa: PLR0913 - its parts, all by name
        self,
        backend: Backend,
        *,
        decision_counts: DecisionCounts,
        leases: Leases,
        prefetch: Prefetch,
        refusals: RefusalCache,
        local: LocalPolicy,
        budget_warnings: BudgetWarnings,
        live: Live,
    ) -> None:
        self._backend = backend
        self._counts = decision_counts
        self._leases = leases
        self._prefetch = prefetch
        self._refusals = refusals
        self._refused = refusals.by_charge
        self.local = local
        """Decides while the backend is away."""
        self._budget_warnings = budget_warnings
        self._live = live
        self.remembers: bool = not isinstance(backend, MemoryBackend)
        """Whether refusals are remembered and units taken ahead; where this process counts, neither helps."""
        self.log_refusal: RefusalLog = RefusalLog()
        """Logs refusals."""
        self.observers: Observers | None = None
        """Observers of every decision; None where nobody observes."""

    def decide(
        self,
        policy: Policy,
        identity: Identity,
        price: int | None = None,
        units: Units | None = None,
        may_wait: bool = False,
    ) -> "Lease | PendingDecision":
        """Decide about one request of this caller: its lease, or what to await for it.

        `price` takes the place of the route's estimate, in units of the caller's currency, and `units` that
        of its estimates of metered units. A refusal that `may_wait` is not counted before `tell_of`. Raises
        nothing for a backend that is away: then the settings say what becomes of the request.
        """
        if policy.is_decided:
            return self._decided(policy, identity)
        if price is None:
            if policy.prefetch_state is not None:
                in_hand = self._prefetch.spend(policy.prefetch_state)
                if in_hand is not None:
                    lease = Lease(self._leases, self._backend, policy, identity, policy.charge)
                    self._admit(lease, in_hand)
                    return lease
            price = policy.price
        charge = policy.charge if price is None and units is None else _charge_of(policy, price, units)
        amount = 0 if price is None else price
        too_small = policy.too_small if charge.base is None else charge.too_small
        unsatisfiable = too_small or (_too_small_budget(charge, amount) if amount else None)
        lease = Lease(self._leases, self._backend, policy, identity, charge, amount, unsatisfiable)
        lease.may_wait = may_wait
        if unsatisfiable is not None:
            return PendingDecision(self, lease, self._backend.peek(charge, amount), 0.0)
        if self._refused:
            known = self._known_refusal(charge)
            if known is not None:
                self._repeat(lease, known)
                return lease
        sent = self._refusals.now() if self.remembers else 0.0
        lease_id = new_lease_id() if charge.is_held else NO_LEASE_ID
        try:
            answer = self._ask(policy, charge, lease_id, amount)
        except BackendError as error:
            return self.without_backend(lease, error)
        if isinstance(answer, Outcome):
            return self.answered(lease, answer, sent)
        return PendingDecision(self, lease, answer, sent)

    def _ask(self, policy: Policy, charge: Charge, lease_id: bytes, price: int) -> Outcome | PendingCharge:
        """Ask the backend, for what is not in hand: the outcome, or what to await for it."""
        if policy.ahead is None or not self.remembers:
            return self._backend.ask(charge, lease_id, price)
        return PartialCharge(self._prefetch, policy.ahead, charge).ask(self._backend, lease_id, price)

    def _decided(self, policy: Policy, identity: Identity) -> Lease:
        """Exempt a request, or refuse one of a blocked caller."""
        lease = Lease(self._leases, self._backend, policy, identity, policy.charge)
        if policy.is_blocked:
            self._refuse(lease, blocked(shadow=policy.shadow))
        else:
            lease.decide(EXEMPT)
        return lease

    def answered(self, lease: Lease, outcome: Outcome, sent: float) -> Lease:
        """Have a lease say what the backend answered to a request that was sent at that time."""
        policy, charge = lease.policy, lease.initial_charge
        if lease.unsatisfiable is not None:
            self._refuse(lease, _decision_of(lease, outcome))
            return lease
        charge.last = outcome
        if charge.base is not None:
            charge.base.last = outcome
        if outcome.admitted:
            if self._refused:
                self._refusals.admitted(charge, outcome)
            self._admit(lease, outcome)
            if (
                policy.prefetch_state is not None
                and self.remembers
                and policy.prefetch_state.charge is charge
            ):
                self._prefetch.refill(policy.prefetch_state)
        else:
            decision = _decision_of(lease, outcome)
            if self.remembers:
                self._refusals.add(charge, outcome, sent, outcome_and_limit(policy, decision))
            self._refuse(lease, decision)
        if charge.allowances:
            self.local.note_budgets(charge)
            if charge.warn_amounts and charge.nears_budget(outcome):
                self._budget_warnings.look(lease.identity, lease.decision)
        if outcome.reservation.is_leased:
            self._leases.start_renewing(lease, charge)
        return lease

    def refuse(self, policy: Policy, identity: Identity, decision: Decision) -> Lease:
        """Refuse a call that others wait before, without asking anybody."""
        lease = Lease(self._leases, self._backend, policy, identity, policy.charge)
        self._refuse(lease, decision)
        return lease

    def tell_of(self, lease: Lease) -> None:
        """Count and tell of a refusal that was kept back, since its call waits no more."""
        if lease.may_wait and not lease.allowed:
            lease.may_wait = False
            self._count(lease)

    def without_backend(self, lease: Lease, error: BackendError) -> Lease:
        """Decide as the settings say about a request that the backend didn't decide about."""
        rules, policy, charge, price = self._live.rules, lease.policy, lease.initial_charge, lease.price
        share = rules.settings.backend.local_share
        self.local.recall(rules.policies, policy.identity.partition)
        if lease.unsatisfiable is not None:
            # Nobody has to be asked whether it fits, whatever the settings say of outages.
            self._refuse(lease, self.local.look(policy, charge, price, lease.unsatisfiable, share=share))
            return lease
        was_asked = isinstance(error, OperationRefusedError)
        decision, reservation = self.local.answer(policy, charge, price, share=share, was_asked=was_asked)
        lease.backend, lease.reservation = self.local.reconciler, reservation
        lease.decide(decision)
        self._count(lease)
        if reservation.is_leased:
            self._leases.start_renewing(lease, charge)
        return lease

    def _known_refusal(self, charge: Charge) -> CachedRefusal | None:
        """Find a remembered refusal. While the backend is away there is none: the settings decide."""
        known = self._refusals.find(charge)
        if known is not None and self._backend.is_away:
            self._refusals.clear()
            return None
        return known

    def _admit(self, lease: Lease, outcome: Outcome) -> None:
        policy = lease.policy
        policy.admitted += 1
        if policy.admitted == 1:
            self._counts.touch(policy)
        lease.outcome, lease.reservation = outcome, outcome.reservation
        if self.observers is not None:
            self.observers(lease)

    def _repeat(self, lease: Lease, known: CachedRefusal) -> None:
        lease.repeat(known, self._refusals.now())
        if lease.may_wait and not lease.allowed:
            return
        self._counts.refuse(lease.policy, known.kind)
        self._tell_of_refusal(lease)

    def _refuse(self, lease: Lease, decision: Decision) -> None:
        lease.decide(decision)
        self._count(lease)

    def _count(self, lease: Lease) -> None:
        policy, decision = lease.policy, lease.decision
        if decision.refusal is not None:
            if lease.may_wait and not decision.allowed:
                return
            self._counts.refuse(policy, outcome_and_limit(policy, decision))
            self._tell_of_refusal(lease)
            return
        self._counts.admit(policy)
        if self.observers is not None:
            self.observers(lease)

    def _tell_of_refusal(self, lease: Lease) -> None:
        if lease.allowed or logger.isEnabledFor(logging.DEBUG):
            refusal = lease.decision.refusal
            if refusal is not None:
                self.log_refusal(lease.policy, refusal, shadow=lease.allowed)
        if self.observers is not None:
            self.observers(lease)


class PendingDecision:
    """A decision that waits for the backend. Awaiting it gives the lease, whatever becomes of the backend."""

    __slots__ = ("_decider", "_lease", "_pending", "_sent")

    def __init__(
        self,
        decider: Decider,
        lease: Lease,
        pending: PendingCharge | Coroutine[Any, Any, Outcome],
        sent: float,
    ) -> None:
        self._decider = decider
        self._lease = lease
        self._pending = pending
        self._sent = sent

    def __await__(self) -> Generator[Any, None, Lease]:
        try:
            outcome = yield from self._pending.__await__()
        except BackendError as error:
            return self._decider.without_backend(self._lease, error)
        except BaseException:  # cancelled, or ended by hand
            if not isinstance(self._pending, Coroutine):  # that one only looked
                self._pending.give_up()
            raise
        return self._decider.answered(self._lease, outcome, self._sent)


def _decision_of(lease: Lease, outcome: Outcome) -> Decision:
    return decision_of(lease.policy, lease.initial_charge, outcome, lease.price, lease.unsatisfiable)


def _charge_of(policy: Policy, price: int | None, units: Units | None) -> Charge:
    """The limits of a request with this price, and with these estimates in place of the route's."""
    charge = policy.charge if price is None else policy.priced_charge
    return charge.with_estimates(units) if units is not None and charge.meters else charge


def _too_small_budget(charge: Charge, price: int) -> Counter | None:
    """Find a budget that this price never fits into, whatever was spent."""
    for counter in charge.allowances:
        if isinstance(counter.limit, Allowance) and price > counter.limit.amount:
            return counter
    return None
