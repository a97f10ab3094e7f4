"""A lease: what was decided about one request, and what it holds until it ends."""

from typing import TYPE_CHECKING, Protocol

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation
from ratelimit_mw._internal.policy.decision import Decision, decision_of, without_charge
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.policy.rate_limited import RateLimited

if TYPE_CHECKING:
    import asyncio
    from collections.abc import MutableMapping, Sequence
    from decimal import Decimal
    from types import TracebackType
    from typing import Self

    from ratelimit_mw._internal.cache.refusals import CachedRefusal
    from ratelimit_mw._internal.model.backend import ReservationStore
    from ratelimit_mw._internal.model.metered import Units
    from ratelimit_mw._internal.model.outcome import Outcome
    from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit


class LeaseKeeper(Protocol):
    """Keeper of all leases of a limiter: what a lease asks for the app that has it."""

    async def detach(self, lease: "Lease", ttl: float) -> str:
        """See `Lease.detach`."""

    async def settle(
        self,
        lease: "Lease",
        amount: "str | int | Decimal | None",
        *,
        units: "Units | None" = None,
        replace: bool = False,
    ) -> None:
        """See `Lease.settle`."""

    async def charge(
        self, lease: "Lease", limits: "Sequence[KeyedLimit | Limit]", max_wait: "float | None"
    ) -> None:
        """See `Lease.charge`."""

    async def release(self, lease: "Lease") -> None:
        """See `Lease.release`."""

    def end(self, lease: "Lease", failed: bool) -> None:
        """End a lease: `failed` gives its estimate back."""

    def undo(self, lease: "Lease") -> None:
        """Give back all that a lease was charged."""


class LeaseRenewals(Protocol):
    """Renewals of the leases of one event loop."""

    def add(self, lease: "Lease") -> None:
        """Renew a lease from now on."""

    def remove(self, lease: "Lease") -> bool:
        """Renew a lease no more; whether it was still renewed."""


class Lease:
    """One request's or job's slots, estimates and decision. `request.state.ratelimit` is one.

    `async with lease:` runs its body only if the lease was admitted, and releases it at the end.

    Where nothing was charged, its methods do nothing. It is released when the app has returned from the
    request; a detached one by `Limiter.resume` or `Limiter.release`.
    """

    __slots__ = (
        "__weakref__",
        "_decision",
        "_leases",
        "backend",
        "give_up_at",
        "identity",
        "initial_charge",
        "is_acquired",
        "is_detached",
        "is_ended",
        "is_lost",
        "is_metered_out",
        "late",
        "local_estimate",
        "may_wait",
        "opening",
        "outcome",
        "policy",
        "price",
        "renew_at",
        "renewals",
        "repeated_at",
        "repeats",
        "reservation",
        "same_job",
        "scope",
        "token",
        "unsatisfiable",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - made for every request: names would cost it
        self,
        leases: LeaseKeeper,
        backend: "ReservationStore",
        policy: Policy,
        identity: Identity,
        charge: Charge,
        price: int = 0,
        unsatisfiable: Counter | None = None,
    ) -> None:
        """A request to be decided about: by an `outcome` and its reservation, by `repeat` or by `decide`."""
        self._leases = leases
        self.backend: ReservationStore = backend
        """Store of the reservation: the limiter's backend, or this process during an outage."""
        self.policy: Policy = policy
        self.identity: Identity = identity
        """The caller of this very request; others may share its policy."""
        self.initial_charge: Charge = charge
        """Limits that decide about it, and their costs."""
        self.price: int = price
        """Estimate in units of the caller's currency; 0 without one."""
        self.unsatisfiable: Counter | None = unsatisfiable
        """A limit that the request can't ever fit into; None where it may."""
        self.reservation: Reservation = NO_RESERVATION
        self._decision: Decision | None = None
        """The decision in words, once somebody has asked for it."""
        self.outcome: Outcome | None = None
        """The backend's answer, where that admitted the request."""
        self.repeats: CachedRefusal | None = None
        """The remembered refusal that this one repeats, at `repeated_at` by the refusals' clock."""
        self.repeated_at: float = 0.0
        self.renewals: LeaseRenewals | None = None
        """Renewals of the slots, from the admission of a request on."""
        self.renew_at: float = 0.0
        """Time of the next renewal, by `time.monotonic`."""
        self.give_up_at: float | None = None
        """End of the slots' `max_hold`, by `time.monotonic`; None without one."""
        self.is_acquired: bool = False
        """Whether the app asked for it itself: then nobody else ends it."""
        self.is_detached: bool = False
        self.is_ended: bool = False
        self.is_lost: bool = False
        """Whether a slot was lost before it could be renewed: the work runs on uncounted."""
        self.is_metered_out: bool = False
        """Whether all its metered units are settled, so that its end has to say nothing of them."""
        self.may_wait: bool = False
        """Whether its call may ask again where this refuses, so that it is not counted yet."""
        self.late: tuple[Lease, ...] = ()
        """Leases of what the handler has charged by `charge`: they end with this one."""
        self.local_estimate: Reservation | None = None
        """The estimate of zero by which a request without a price is settled while the backend is away."""
        self.scope: MutableMapping[str, object] | None = None
        """Scope of the request while it runs, for limits in code that ask for it."""
        self.token: str = ""
        self.same_job: Sequence[Lease] = ()
        """All leases that go on with the same job in this process; empty for a request."""
        self.opening: asyncio.Task[None] | None = None
        """Task that gives a request without a price an estimate of zero, so that it can be settled."""

    def repeat(self, refused: "CachedRefusal", now: float) -> None:
        """Note a refusal that was met before."""
        self.repeats, self.repeated_at = refused, now

    def decide(self, decision: Decision) -> None:
        """Note a decision that is in words already."""
        self._decision = decision

    def stop_renewing(self) -> None:
        """Renew the slots and the estimate no more."""
        if self.renewals is not None:
            self.renewals.remove(self)

    def give_back(self) -> None:
        """Give back all that the request was charged, since it is refused after all.

        For this package alone.
        """
        decision, self.scope = self.decision, None
        self._leases.undo(self)
        if not self.is_detached:
            self.decide(without_charge(decision, self.initial_charge))

    @property
    def id(self) -> str:
        """The lease's random id, as hexadecimal digits; empty where nothing is held."""
        return self.reservation.id.hex()

    @property
    def decision(self) -> Decision:
        """The decision, and how the limits stood when it was made."""
        if self._decision is None:
            outcome = self.outcome
            if outcome is None and self.repeats is not None:
                outcome = self.repeats.outcome_at(self.repeated_at)
            if outcome is None:
                raise ValueError("the lease has no decision yet")
            self._decision = decision_of(self.policy, self.initial_charge, outcome, self.price, None)
        return self._decision

    @property
    def allowed(self) -> bool:
        """Whether the request is let through."""
        if self._decision is None and not self.policy.shadowed:
            return self.outcome is not None or self.policy.shadow
        return self.decision.allowed

    @property
    def is_charged(self) -> bool:
        """Whether anything was charged for it, or is held."""
        return self.outcome is not None or self.reservation is not NO_RESERVATION

    @property
    def is_local(self) -> bool:
        """Whether this process admitted it alone, as the backend was away."""
        made = self._decision
        return made is not None and made.policy == "local" and made.refusal is None

    @property
    def unpriced(self) -> Charge | None:
        """The charge with the caller's budgets, of a request that was admitted without a price.

        None for any other.
        """
        if self.reservation.periods or (self.outcome is None and not self.is_local):
            return None
        charge = self.policy.priced_charge
        return charge if charge.allowances else None

    def raise_for_refusal(self) -> None:
        """Raise `RateLimited` unless the request is let through."""
        if not self.allowed:
            raise RateLimited(self.decision)

    async def charge(self, *limits: "KeyedLimit | Limit", max_wait: float | None = None) -> None:
        """Charge limits in code that only the handler can name, all of them in one step or none.

            await request.state.ratelimit.charge(login_email.on(form.email))

        With `max_wait` it waits for them as `Limiter.acquire` does; the request keeps its slot meanwhile.
        Raises `RateLimited` where one refuses; then all that the request was charged is given back. Slots and
        estimates of these limits end with the request. Raises TypeError for a limit that needs a key,
        ValueError for a `max_wait` that is none, and `LeaseError` where the request is over.
        """
        await self._leases.charge(self, limits, max_wait)

    async def detach(self, *, ttl: float) -> str:
        """Keep slot and price beyond the response; returns the token by which any process goes on.

        `ttl` is how many seconds the slot waits for a worker to resume it. A second call returns the same
        token. Raises `LeaseError` for a ttl that is not a positive number of at most 30 days.
        """
        return await self._leases.detach(self, ttl)

    async def settle(
        self,
        amount: "str | int | Decimal | None" = None,
        *,
        units: "Units | None" = None,
        replace: bool = False,
    ) -> None:
        """Put what was really used in place of the estimates, once; of several amounts the first counts.

        `amount` is the price: a decimal string in the plan's currency, rounded up to the micro-unit. `units`
        are whole numbers by unit, such as `{"tokens": 812}`; a unit that is not named keeps its estimate.
        Raises `LeaseError` for what is malformed or negative.
        """
        await self._leases.settle(self, amount, units=units, replace=replace)

    async def release(self) -> None:
        """Free the slots now instead of at the end. Idempotent.

        The estimate is kept until it is settled or the request ends.
        """
        await self._leases.release(self)

    async def __aenter__(self) -> "Self":
        """Begin the work. Raises `RateLimited` where the lease was refused, so that the body doesn't run."""
        self.raise_for_refusal()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._leases.end(self, failed=error is not None)
