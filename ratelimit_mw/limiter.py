"""The limiter: decides about charges, keeps their leases, and knows what to do without its backend."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any, Literal, Self, TypeVar

from ratelimit_mw.address import canonical_address
from ratelimit_mw.api_keys import hash_api_key
from ratelimit_mw.backends import open_backend
from ratelimit_mw.backends.memory import MemoryBackend, wall_clock
from ratelimit_mw.budget_warnings import BudgetWarnings
from ratelimit_mw.charge import (
    LEASE_ID_SIZE,
    NOTHING_HELD,
    Backend,
    BackendError,
    Charge,
    Counter,
    Figures,
    Hold,
    Money,
    Outcome,
    Settlement,
)
from ratelimit_mw.decision import Decision, Refusal, Standing, refusal_of
from ratelimit_mw.events import Notifier, OnEvent, SettleIgnored
from ratelimit_mw.identity import Identifier, Identity
from ratelimit_mw.lease import Lease, LeaseError, Ticket, check_ttl, read_token, write_token
from ratelimit_mw.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw.money import format_amount, parse_amount
from ratelimit_mw.policy import Policies, Policy, share_of
from ratelimit_mw.renewals import SLOT_LOST, Renewals
from ratelimit_mw.settings import Settings

logger = logging.getLogger("ratelimit_mw")

RETRY_UNAVAILABLE = SECOND
"""When to try again while the backend is away and the settings say to refuse, in microseconds."""

T = TypeVar("T")
_NO_LEASE = bytes(LEASE_ID_SIZE)


class Limiter:
    """Decides about requests and jobs. One serves a whole process, all its event loops included."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        backend: Backend | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        """`backend` takes the place of the one that the settings name; `on_event` is told what happens."""
        self.settings = settings or Settings()
        self.backend = backend or open_backend(self.settings.backend)
        self.identify = Identifier(self.settings)
        self.policies = Policies(self.settings)
        self._local = MemoryBackend()
        self._secret = self.settings.identity.hash_secret
        self._notify = Notifier(on_event)
        self._budget_warnings = BudgetWarnings(self.backend, self._notify)
        self._owed: set[asyncio.Future[Any]] = set()
        self._renewals: dict[asyncio.AbstractEventLoop, Renewals] = {}

    @classmethod
    def from_settings(
        cls, settings: Settings | str | os.PathLike[str] | None = None, *, on_event: OnEvent | None = None
    ) -> Self:
        """A limiter by a settings file, or by the one that `RATELIMIT_SETTINGS` names.

        Raises `SettingsError`.
        """
        loaded = settings if isinstance(settings, Settings) else Settings.load(settings)
        return cls(loaded, on_event=on_event)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect ahead of the first request. A backend that is away is no error."""
        await self.backend.open()

    async def close(self) -> None:
        """Send what is still owed to the backend, for a bounded time, and close."""
        renewals = self._renewals.pop(asyncio.get_running_loop(), None)
        if renewals is not None:
            renewals.close()
        await self.backend.close()

    # deciding -----------------------------------------------------------------------------------

    async def acquire(  # noqa: PLR0913 - who, on what, at what cost: all by name
        self,
        identity: Identity | None = None,
        *,
        api_key: str | bytes | None = None,
        address: str | None = None,
        method: str = "GET",
        path: str = "/",
        cost: int | None = None,
        price: str | int | Decimal | None = None,
    ) -> Lease:
        """Decide as about a request: for an identity, an API key or an address, on a method and path.

        `cost` and `price` take the place of the route's. The lease says whether it was admitted; leave it
        with `async with` or `await lease.release()`. Raises ValueError for a cost below 1, a price that is
        malformed, or when nobody is named.
        """
        policy = self.policies.match(
            self.identity_of(identity, api_key, address), method, path, _check_cost(cost)
        )
        units = None
        if price is not None and policy.currency is not None:
            units = parse_amount(price, policy.currency)
        return await self.charge(policy, units)

    def identity_of(
        self, identity: Identity | None = None, api_key: str | bytes | None = None, address: str | None = None
    ) -> Identity:
        """Who is meant by an API key, with the address where that matters, or by an address alone."""
        if identity is not None:
            return identity
        if api_key is not None:
            data = api_key if isinstance(api_key, bytes) else api_key.encode("utf-8", "surrogatepass")
            hashed = hash_api_key(data.strip(b" \t"), self._secret)
            return self.identify.of_key(hashed) or self.identify.of_unknown(
                hashed, canonical_address(address or "unknown")
            )
        if address is None:
            raise ValueError("acquire needs an identity, an api_key or an address")
        return self.identify.of_address(canonical_address(address))

    async def charge(self, policy: Policy, price: int | None = None) -> Lease:
        """Decide about one request under a policy. Never raises for a backend that is away.

        `price` takes the place of the route's estimate, in units of the caller's currency.
        """
        if policy.is_exempt:
            return Lease(self, _EXEMPT, NOTHING_HELD, self.backend)
        if price is None:
            price = policy.price
        charge = policy.charge if price is None else policy.priced_charge
        never = policy.too_small or (_too_small_budget(charge, price) if price else None)
        try:
            if never is None:
                lease_id = os.urandom(LEASE_ID_SIZE) if charge.slots or charge.allowances else _NO_LEASE
                outcome = await self.backend.acquire(charge, lease_id, price or 0)
            else:
                outcome = await self.backend.peek(charge, price or 0)
        except BackendError:
            return self._without_backend(policy, charge, price or 0, never)
        decision = _decision(policy, charge, outcome, price or 0, never)
        if charge.allowances:
            self._budget_warnings.look(policy.identity, decision)
        return self._lease(decision, outcome.hold, self.backend, policy)

    async def peek(self, policy: Policy, price: int | None = None) -> Decision:
        """How a caller's limits stand, its budgets included; charges nothing. Raises `BackendError`."""
        charge = policy.priced_charge
        outcome = await self.backend.peek(charge, price or 0)
        return _decision(policy, charge, outcome, price or 0, None)

    async def reset(self, policy: Policy) -> None:
        """Forget what was counted of the caller's own limits. Raises `BackendError`."""
        counters = [c for c in policy.priced_charge.counters if c.owner != "everyone"]
        await self.backend.reset(Charge(counters))

    def _without_backend(self, policy: Policy, charge: Charge, price: int, never: Counter | None) -> Lease:
        """What the settings say about a request while the backend is away."""
        on_failure = policy.on_failure_priced if charge.allowances else policy.on_failure
        now = wall_clock()
        if on_failure == "allow":
            return Lease(
                self, Decision(True, now, charge.cost, price, policy="allow"), NOTHING_HELD, self._local
            )
        if on_failure == "deny":
            refusal = Refusal("unavailable", None, RETRY_UNAVAILABLE)
            denied = Decision(False, now, charge.cost, price, (), refusal, policy="deny")
            return Lease(self, denied, NOTHING_HELD, self._local)
        share = share_of(charge, self.settings.backend.local_share)
        lease_id = os.urandom(LEASE_ID_SIZE) if never is None else None
        outcome = self._local.decide(share, lease_id, price)
        figures = [
            _as_shared(*each) for each in zip(charge.counters, share.counters, outcome.figures, strict=True)
        ]
        decision = _decision(policy, charge, outcome._replace(figures=figures), price, never, by="local")
        return self._lease(decision, outcome.hold, self._local, policy)

    def _lease(self, decision: Decision, hold: Hold, backend: Backend, policy: Policy) -> Lease:
        lease = Lease(self, decision, hold, backend, policy.slots.max_hold if policy.slots else None)
        if hold.slots:
            self._renewing().add(lease)
        return lease

    # ending -------------------------------------------------------------------------------------

    def end(self, lease: Lease, *, failed: bool) -> None:
        """The request is over: free its slots; give its estimate back where it failed. Waits for nothing.

        A detached lease is left to whoever has its token. Only the first end counts.
        """
        hold = lease.hold
        if lease.is_detached or lease.is_ended or not (hold.slots or hold.periods):
            return
        lease.is_ended = True
        self._renewing().remove(lease)
        lease.backend.finish(hold, Money.GIVE_BACK if failed else Money.KEEP)

    async def release(self, lease: Lease | str) -> None:
        """Free the slots of a lease or a token. Idempotent. Raises `LeaseError` for what is no token."""
        if isinstance(lease, str):
            lease = self._of_token(lease)
        if lease.hold.slots:
            self._renewing().remove(lease)
            await self._arrive(lease.backend.finish(lease.hold, Money.UNTOUCHED), "a release", lease)
            lease.hold = replace(lease.hold, slots=())

    # jobs ---------------------------------------------------------------------------------------

    async def detach(self, lease: Lease, ttl: float) -> str:
        """See `Lease.detach`."""
        seconds = check_ttl(ttl)
        if lease.is_detached:
            return lease.token
        self._renewing().remove(lease)
        lease.is_detached = True
        # A hold of this process alone means nothing to another.
        hold = lease.hold if lease.backend is self.backend else NOTHING_HELD
        lease.token = write_token(Ticket(hold, lease.max_hold, lease.admitted), self._secret)
        if hold.slots:
            await self._renew(lease, seconds)
        return lease.token

    @asynccontextmanager
    async def resume(self, token: str) -> AsyncIterator[Lease]:
        """Go on with a detached job: its slot is renewed meanwhile and freed at the end, however it ends.

        Raises `LeaseError` for a token that is damaged or forged. Where the slot was lost before, the work
        runs on uncounted, and `is_lost` says so.
        """
        lease = self._of_token(token)
        if lease.hold.slots and await self._renew(lease, lease.hold.lease):
            self._renewing().add(lease)
        try:
            yield lease
        finally:
            self._renewing().remove(lease)
            if lease.hold.slots:
                lease.backend.finish(lease.hold, Money.UNTOUCHED)

    async def renew(self, token: str) -> bool:
        """Let a detached job's slot last for its lease from now; false where it was lost before."""
        lease = self._of_token(token)
        return not lease.hold.slots or await self._renew(lease, lease.hold.lease)

    async def settle(self, lease: Lease | str, amount: str | int | Decimal, *, replace: bool = False) -> None:
        """See `Lease.settle`; takes a token as well. Raises `LeaseError`."""
        if isinstance(lease, str):
            lease = self._of_token(lease)
        hold = lease.hold
        if not hold.periods:
            return
        try:
            units = parse_amount(amount, hold.currency, round_up=True)
        except ValueError as error:
            raise LeaseError(f"cannot settle: {error}") from error
        met = await self._arrive(lease.backend.settle(hold, units, replace=replace), "a settle", lease)
        if met is Settlement.DIFFERENT:
            logger.warning("settle ignored: lease %s was settled before with another amount", lease.id)
            self._notify(SettleIgnored(lease.id, format_amount(units, hold.currency), "different"))
        elif met is Settlement.UNKNOWN:
            logger.warning("settle ignored: lease %s has ended, or its period did two days ago", lease.id)
            self._notify(SettleIgnored(lease.id, format_amount(units, hold.currency), "unknown"))

    async def _renew(self, lease: Lease, seconds: float) -> bool:
        try:
            kept = await lease.backend.renew(lease.hold, seconds)
        except BackendError as error:
            logger.warning("lease %s could not be renewed: %s", lease.id, error)
            return True
        if not kept:
            lease.is_lost = True
            logger.warning(SLOT_LOST, lease.id)
        return kept

    async def _arrive(self, sent: Awaitable[T], what: str, lease: Lease) -> T | None:
        """Wait for the backend as long as a request would. What is owed to it goes on without the caller."""
        task = asyncio.ensure_future(_await(sent))
        self._owed.add(task)
        task.add_done_callback(self._owed.discard)
        done, _ = await asyncio.wait([task], timeout=self.settings.backend.timeout)
        if not done:
            logger.warning("%s of lease %s waits for the backend", what, lease.id)
            return None
        try:
            return task.result()
        except BackendError as error:
            logger.error(  # noqa: TRY400 - the reason says it all, a trace would not
                "%s of lease %s did not reach the backend: %s", what, lease.id, error
            )
            return None

    def _of_token(self, token: str) -> Lease:
        ticket = read_token(token, self._secret)
        lease = Lease(self, _EXEMPT, ticket.hold, self.backend, ticket.max_hold, ticket.admitted)
        lease.is_detached, lease.token = True, token
        return lease

    def _renewing(self) -> Renewals:
        loop = asyncio.get_running_loop()
        renewals = self._renewals.get(loop)
        if renewals is None:
            for closed in [each for each in self._renewals if each.is_closed()]:
                del self._renewals[closed]
            renewals = self._renewals[loop] = Renewals(self._notify)
        return renewals


def _decision(
    policy: Policy,
    charge: Charge,
    outcome: Outcome,
    price: int,
    never: Counter | None,
    *,
    by: Literal["shared", "local"] = "shared",
) -> Decision:
    standings = tuple(map(Standing, charge.counters, outcome.figures))
    refusal = None
    if never is not None:
        refusal = Refusal("cost", next(s for s in standings if s.counter is never), None)
    elif not outcome.admitted:
        refusal = refusal_of(standings, price, outcome.now)
    allowed = refusal is None or policy.shadow
    return Decision(allowed, outcome.now, charge.cost, price, standings, refusal, policy.shadow, by)


def _too_small_budget(charge: Charge, price: int) -> Counter | None:
    """A budget that this price never fits into, whatever was spent."""
    for counter in charge.allowances:
        if isinstance(counter.limit, Allowance) and price > counter.limit.amount:
            return counter
    return None


def _as_shared(counter: Counter, local: Counter, figures: Figures) -> Figures:
    """What this process counted on its own, told against the real limit: as much is left of both."""
    used = figures.used
    if isinstance(counter.limit, Window) and isinstance(local.limit, Window):
        used += counter.limit.quota - local.limit.quota
    elif isinstance(counter.limit, Slots) and isinstance(local.limit, Slots):
        used += counter.limit.limit - local.limit.limit
    elif isinstance(counter.limit, Allowance) and isinstance(local.limit, Allowance):
        used += counter.limit.amount - local.limit.amount
    return figures._replace(used=used)


async def _await(sent: Awaitable[T]) -> T:
    return await sent


def _check_cost(cost: int | None) -> int | None:
    if cost is not None and (type(cost) is not int or cost < 1):
        raise ValueError(f"cost must be a whole number, at least 1, not {cost!r}")
    return cost


_EXEMPT = Decision(True, 0)
