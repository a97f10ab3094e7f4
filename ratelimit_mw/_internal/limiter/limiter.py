"""The limiter: decides about charges, keeps their leases, and knows what to do without its backend."""

import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from decimal import Decimal
from functools import partial
from typing import NamedTuple, Protocol, Self
from weakref import WeakSet

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.limiter.engine import Engine
from ratelimit_mw._internal.limiter.late import asked_late, first_partition, policy_with, scope_of_job
from ratelimit_mw._internal.limiter.observers import OnDecision
from ratelimit_mw._internal.limiter.questions import Question
from ratelimit_mw._internal.limiter.turns import check_max_wait
from ratelimit_mw._internal.live.resolve import Resolve
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.money import parse_estimate
from ratelimit_mw._internal.observe.events import OnEvent
from ratelimit_mw._internal.observe.stats import Stats
from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime.event_loop import running_loop
from ratelimit_mw._internal.settings import Settings

TAKE_OVER_SECONDS = 0.5
"""Seconds between two looks of an event loop whether another has ended and left something to do."""


class Follower(Protocol):
    """Keeper of parts of a limiter's engine."""

    def follow(self) -> None:
        """Take the parts of the limiter's present engine."""


class _Named(NamedTuple):
    """Arguments of `Limiter.acquire`: who is named, on what, at what cost."""

    limits: Sequence[KeyedLimit | Limit]
    identity: Identity | None
    api_key: str | bytes | None
    address: str | None
    method: str
    path: str
    cost: int | None
    price: str | int | Decimal | None
    units: Units | None


class Limiter:
    """Decides about requests and jobs. One serves a whole process, all its event loops included."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        backend: Backend | None = None,
        on_event: OnEvent | None = None,
        on_decision: OnDecision | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """`backend` takes the place of the one that the settings name; `on_event` is told what happens, and
        `on_decision` each decision; `resolve` looks keys up that are neither set live nor in the settings.
        Raises TypeError for an `on_event` or `on_decision` that would have to be awaited.
        """
        self.engine: Engine = Engine(
            settings, backend=backend, on_event=on_event, on_decision=on_decision, resolve=resolve
        )
        """Parts of the limiter, for this package alone: no public interface."""
        self.followers: WeakSet[Follower] = WeakSet()
        """Keepers of parts of the engine, for this package alone."""
        self.marked: WeakSet[Limit] = WeakSet()
        """Limits in code on the routes of the apps that it limits, for this package alone."""

    @property
    def settings(self) -> Settings:
        """The settings in force. Those of a file change with it, all but the backend and the hash secret."""
        return self.engine.settings

    @property
    def version(self) -> str:
        """Short name of the settings in force, the same in every process that has them."""
        return self.engine.version

    def apply(self, settings: Settings) -> None:
        """Put other settings in force, from the next request on; the backend and the hash secret stay.

        What was counted is kept. Raises `SettingsError` where the settings don't fit what stays.
        """
        self.engine.live.apply(settings)

    @classmethod
    def from_settings(
        cls,
        settings: Settings | str | os.PathLike[str] | None = None,
        *,
        on_event: OnEvent | None = None,
        on_decision: OnDecision | None = None,
        resolve: Resolve | None = None,
    ) -> Self:
        """A limiter by a settings file, or by the one that `RATELIMIT_SETTINGS` names.

        Raises `SettingsError`.
        """
        loaded = settings if isinstance(settings, Settings) else Settings.load(settings)
        return cls(loaded, on_event=on_event, on_decision=on_decision, resolve=resolve)

    def use(self, engine: Engine) -> None:
        """Work with other parts from now on, for this package alone."""
        self.engine = engine
        for follower in list(self.followers):
            follower.follow()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect ahead of the first request. A backend that is away is not an error."""
        await self.engine.open()

    async def close(self) -> None:
        """Send what is still owed to the backend, for a bounded time, and close."""
        await self.engine.close()

    def stats(self) -> Stats:
        """Return the figures of this limiter in this process: decisions, leases, and work that waits."""
        return self.engine.stats()

    # deciding -----------------------------------------------------------------------------------

    async def acquire(  # noqa: PLR0913 - who, on what, at what cost: all by name
        self,
        *limits: KeyedLimit | Limit | Identity,
        identity: Identity | None = None,
        api_key: str | bytes | None = None,
        address: str | None = None,
        method: str = "GET",
        path: str = "/",
        cost: int | None = None,
        price: str | int | Decimal | None = None,
        units: Units | None = None,
        max_wait: float | None = None,
    ) -> Lease:
        """Decide as about a request: for an identity, an API key or an address, on a method and path.

        `limits` are limits in code with their keys, decided in the same step; alone, where nobody is named.
        An `identity` is counted as one that the `identify=` hook returned. `cost`, `price` and `units`, its
        estimates of metered units, take the place of the route's. The lease says whether it was admitted:
        ask `lease.allowed`, or enter it with `async with`, which raises `RateLimited` where it was not. Leave
        it by that or by `await lease.release()`.

        A refused call waits for at most `max_wait` seconds: until the promised moment, in turn with all calls
        of this limiter that wait for the same limit, and then asks again. It is refused at once if that
        moment comes too late or never, and if a thousand calls wait for the limit already.

        Raises ValueError for a cost below 1, a price, an estimate or a `max_wait` that is malformed, an
        identity on a plan that doesn't exist, a cost of nobody, or when nobody and no limit is named, and
        TypeError for a limit without its key and for two identities.
        """
        keyed = [each for each in limits if not isinstance(each, Identity)]
        identities = [each for each in (*limits, identity) if isinstance(each, Identity)]
        if len(identities) > 1:
            raise TypeError(f"one identity is asked about, not {len(identities)}")
        identity = identities[0] if identities else identity
        estimates = None if units is None else check_amounts(units)
        seconds, own_cost = check_max_wait(max_wait), _check_cost(cost)
        if running_loop() not in self.engine.live.ready:
            await self.engine.live.get_ready()
        named = _Named(keyed, identity, api_key, address, method, path, own_cost, price, estimates)
        question = await self._question(named)
        if seconds:
            lease = await self.engine.turns.wait(question, partial(self._question, named), seconds)
            lease.is_acquired = True
            return lease
        return await self.engine.charge(*question)

    async def _question(self, named: "_Named") -> Question:
        """Return what to ask about somebody, by the rules in force."""
        engine, code_limits = self.engine, self.engine.live.rules.code_limits
        identity, api_key, address = named.identity, named.api_key, named.address
        if (
            identity is None
            and engine.live.resolver is not None
            and not engine.policies.is_exempt(named.method, named.path)
            and (known := engine.hashed(api_key))
        ):
            identity = await engine.live.resolver.of_key(*known)
        is_nobody = bool(named.limits) and identity is None and not api_key and not address
        if is_nobody and named.cost is not None:
            raise ValueError("cost is a caller's: name that of a limit with its key, as in .on(key, cost=3)")
        if is_nobody:  # who is called by the first key
            partition = first_partition(named.limits[0], code_limits)
            caller = Identity(partition, self.settings.identity.anonymous_plan)
        else:
            caller = engine.identity_of(identity, api_key, address)
        scope = scope_of_job(named.method, named.path)
        asked = await asked_late(named.limits, caller, code_limits, scope)
        policy = engine.policy_of(caller, named.method, named.path, named.cost, address)
        policy = policy_with(policy, asked, code_limits, alone=is_nobody)
        price = None
        if named.price is not None and policy.currency is not None:
            price = parse_estimate(named.price, policy.currency)
        for unit in named.units or ():
            if not policy.charge.counts(unit):
                engine.leases.settling.on_uncounted(unit, "estimate")
        return Question(policy, caller, price, named.units)

    # leases -------------------------------------------------------------------------------------

    async def release(self, lease: Lease | str) -> None:
        """Free the slots of a lease or a token. Idempotent. Raises `LeaseError` for what is not a token."""
        await self.engine.leases.release(lease)

    def resume(self, token: str) -> AbstractAsyncContextManager[Lease]:
        """Go on with a detached job: its slot is renewed meanwhile and freed at the end, however it ends.

        Raises `LeaseError` for a token that is damaged or forged. Where the slot was lost before, the work
        runs on uncounted, and `is_lost` says so.
        """
        return self.engine.leases.resume(token)

    async def renew(self, token: str) -> bool:
        """Let a detached job's slot last for its lease from now; false where it was lost before."""
        return await self.engine.leases.renew(token)

    async def settle(
        self,
        lease: Lease | str,
        amount: str | int | Decimal | None = None,
        *,
        units: Units | None = None,
        replace: bool = False,
    ) -> None:
        """See `Lease.settle`; takes a token as well. Raises `LeaseError`."""
        await self.engine.leases.settle(lease, amount, units=units, replace=replace)


def _check_cost(cost: int | None) -> int | None:
    if cost is not None and (type(cost) is not int or cost < 1):
        raise ValueError(f"cost must be a whole number, at least 1, not {cost!r}")
    return cost
