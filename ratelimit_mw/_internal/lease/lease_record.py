"""The part of a lease that every request needs: what was decided, and what is held."""

from typing import TYPE_CHECKING

from ratelimit_mw._internal.model.charge import NO_RESERVATION, Charge, Counter, Outcome, Reservation
from ratelimit_mw._internal.policy.decision import Decision, decision_of
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from ratelimit_mw._internal.cache.refusals import CachedRefusal
    from ratelimit_mw._internal.lease.lease import Lease
    from ratelimit_mw._internal.lease.manager import Leases
    from ratelimit_mw._internal.lease.renewals import Renewals
    from ratelimit_mw._internal.model.charge import Holder


class LimitedRequest:
    """One request to decide about."""

    __slots__ = ("charge", "identity", "policy", "price", "unsatisfiable")

    def __init__(
        self,
        policy: Policy,
        identity: Identity,
        charge: Charge,
        price: int,
        unsatisfiable: Counter | None = None,
    ) -> None:
        self.policy = policy
        self.identity = identity
        """The caller of this very request; others may share its policy."""
        self.charge = charge
        self.price = price
        """Estimate in units of the caller's currency; 0 without one."""
        self.unsatisfiable = unsatisfiable
        """A limit that the request can't ever fit into; None where it may."""


class LeaseRecord:
    """Decision and hold of one request or job. The decision is put into words only where somebody asks."""

    __slots__ = (
        "_decision",
        "_leases",
        "backend",
        "give_up_at",
        "hold",
        "holders",
        "is_acquired",
        "is_detached",
        "is_ended",
        "is_lost",
        "opening",
        "outcome",
        "renew_at",
        "renewals",
        "repeated_at",
        "repeats",
        "request",
        "token",
    )

    def __init__(
        self, leases: "Leases", hold: Reservation, backend: "Holder", decision: Decision | None = None
    ) -> None:
        """`decision` is None where `admit` or `repeat` tells of it."""
        self._leases = leases
        self.hold = hold
        self.backend = backend
        """Keeper of the hold: the limiter's backend, or this process during an outage."""
        self._decision = decision
        self.request: LimitedRequest | None = None
        self.outcome: Outcome | None = None
        """The backend's answer, where that admitted the request."""
        self.renewals: Renewals | None = None
        """Renewals of the slots, from the admission of a request on."""
        self.renew_at = 0.0
        """Time of the next renewal, by `time.monotonic`."""
        self.give_up_at: float | None = None
        """End of the slots' `max_hold`, by `time.monotonic`; None without one."""
        self.repeats: CachedRefusal | None = None
        """The remembered refusal that this one repeats, at `repeated_at` by the refusals' clock."""
        self.repeated_at = 0.0
        self.is_acquired = False
        """Whether the app asked for it itself: then nobody else ends it."""
        self.is_detached = False
        self.is_ended = False
        self.is_lost = False
        """Whether a slot was lost before it could be renewed: the work runs on uncounted."""
        self.token = ""
        self.holders: Sequence[Lease] = ()
        """All leases that go on with the same job in this process; empty for a request."""
        self.opening: asyncio.Task[None] | None = None
        """Task that gives a request without a price an estimate of zero, so that it can be settled."""

    def admit(self, request: LimitedRequest, outcome: Outcome) -> None:
        """Note a backend's admission."""
        self.request, self.outcome = request, outcome

    def repeat(self, request: LimitedRequest, refused: "CachedRefusal", now: float) -> None:
        """Note a refusal that was met before."""
        self.request, self.repeats, self.repeated_at = request, refused, now

    @property
    def decision(self) -> Decision:
        """The decision, and how the limits stood when it was made."""
        if self._decision is None:
            request, outcome = self.request, self.outcome
            if outcome is None and self.repeats is not None:
                outcome = self.repeats.outcome_at(self.repeated_at)
            if request is None or outcome is None:
                raise ValueError("the lease has no decision yet")
            self._decision = decision_of(request.policy, request.charge, outcome, request.price, None)
        return self._decision

    @property
    def allowed(self) -> bool:
        """Whether the request is let through."""
        if self._decision is None and self.request is not None:
            return self.outcome is not None or self.request.policy.shadow
        return self.decision.allowed

    @property
    def is_charged(self) -> bool:
        """Whether anything was charged for it, or is held."""
        return self.outcome is not None or self.hold is not NO_RESERVATION

    @property
    def unpriced(self) -> Charge | None:
        """The charge with the caller's budgets, of a request that was admitted without a price.

        None for any other.
        """
        if self.request is None or self.outcome is None or self.hold.periods:
            return None
        charge = self.request.policy.priced_charge
        return charge if charge.allowances else None
