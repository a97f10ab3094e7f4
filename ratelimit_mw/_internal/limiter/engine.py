"""The engine: the parts of a limiter, and what the package itself does with them."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from ratelimit_mw._internal.backends import open_backend, open_figures_store
from ratelimit_mw._internal.cache.prefetch import Prefetch
from ratelimit_mw._internal.cache.refusals import RefusalCache
from ratelimit_mw._internal.checks.plain import is_shared
from ratelimit_mw._internal.checks.startup import LOOK_SECONDS, WorkerCheck, log_findings
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.manager import Leases
from ratelimit_mw._internal.limiter.decider import Decider
from ratelimit_mw._internal.limiter.late import LateCharges
from ratelimit_mw._internal.limiter.observers import DecisionNotifier, Observer, Observers, OnDecision
from ratelimit_mw._internal.limiter.questions import Question, ask
from ratelimit_mw._internal.limiter.turns import Turns
from ratelimit_mw._internal.live.resolve import Resolve
from ratelimit_mw._internal.live.state import Live
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.observe.budget_warnings import BudgetWarnings
from ratelimit_mw._internal.observe.decision_counts import DecisionCounts
from ratelimit_mw._internal.observe.events import Notifier, OnEvent
from ratelimit_mw._internal.observe.reporting import Reporter
from ratelimit_mw._internal.observe.sightings import Sightings, Watch
from ratelimit_mw._internal.observe.stats import Stats
from ratelimit_mw._internal.observe.uncounted_units import UncountedUnits
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from ratelimit_mw._internal.policy.decision import Decision, decision_of
from ratelimit_mw._internal.policy.identity import Identifier, Identity
from ratelimit_mw._internal.policy.policy import Policies, Policy
from ratelimit_mw._internal.runtime.event_loop import running_loop
from ratelimit_mw._internal.runtime.upkeep import Job
from ratelimit_mw._internal.settings import Settings

TAKE_OVER_SECONDS = 0.5
"""Seconds between two checks by an event loop for work left behind by another one that has ended."""


class Engine:
    """The parts of one limiter: deciding, leases, settings in force, reports.

    The middleware, the command line and the dashboard work with it. Users have `Limiter`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        backend: Backend | None = None,
        on_event: OnEvent | None = None,
        on_decision: OnDecision | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """Take the arguments of `Limiter`."""
        settings = settings or Settings()
        self.decision_counts: DecisionCounts = DecisionCounts()
        """Counts every decision."""
        self.backend: Backend = backend or open_backend(settings.backend)
        own = None if backend else self.backend
        sightings = Sightings(lambda scope: self.identify.address_of(scope), self._watch)  # noqa: PLW0108 - settings change
        self.reporter: Reporter = Reporter(
            open_figures_store(settings.backend, beside=own), self.decision_counts, self.stats, sightings
        )
        """Tells the fleet of them."""
        taking_over = Job("taking over from ended event loops", TAKE_OVER_SECONDS, self._take_over)
        jobs = [self.reporter.job(), taking_over]
        if not is_shared(settings):
            look = WorkerCheck(lambda: self.settings).run
            jobs.append(Job("looking for other workers", LOOK_SECONDS, look, waits=True))
        self.live: Live = Live(settings, resolve, jobs, beside=own)
        log_findings(self.settings)
        self.refusals: RefusalCache = RefusalCache()
        self._secret = self.settings.identity.hash_secret.get_secret_value()
        self.notify: Notifier = Notifier(on_event)
        """Hands events to the app."""
        self.leases: Leases = Leases(self.backend, self.notify, self._secret, self.settings.backend.timeout)
        """Everything that was admitted and is not over."""
        self.prefetch: Prefetch = Prefetch(self.backend, self.leases.background.tasks)
        self.decider: Decider = Decider(
            self.backend,
            decision_counts=self.decision_counts,
            leases=self.leases,
            prefetch=self.prefetch,
            refusals=self.refusals,
            local=LocalPolicy(self.backend),
            budget_warnings=BudgetWarnings(self.backend, self.notify),
            live=self.live,
        )
        """Decides about each request."""
        self.turns: Turns = Turns(self.decider, self.leases)
        """Calls that wait where they are refused."""
        self.leases.charge_late = LateCharges(self.decider, self.leases, self.live, self.turns).charge
        self.leases.settling.on_uncounted = UncountedUnits(lambda: self.settings)
        # A token may be of a reservation that only this process knows.
        self.leases.token_store = self.leases.settling.outage = self.decider.local.reconciler
        if on_decision is not None:
            self.observe(DecisionNotifier(on_decision))
        self.at_close: list[Callable[[], object]] = []
        """Called when it was closed: a server that stops may end a process without any other word."""

    @property
    def settings(self) -> Settings:
        """The settings in force. Those of a file change with it, all but the backend and the hash secret."""
        return self.live.rules.settings

    @property
    def identify(self) -> Identifier:
        """Tells who is calling, by the settings and the live keys in force."""
        return self.live.rules.identify

    @property
    def policies(self) -> Policies:
        """Tells which limits hold, by the settings in force."""
        return self.live.rules.policies

    @property
    def version(self) -> str:
        """Short name of the settings in force, the same in every process that has them."""
        return self.live.rules.version

    def apply(self, settings: Settings) -> None:
        """Put other settings in force, from the next request on; the backend and the hash secret stay.

        What was counted is kept. Raises `SettingsError` where the settings don't fit what stays.
        """
        self.live.apply(settings)

    async def open(self) -> None:
        """Connect ahead of the first request. A backend that is away is not an error."""
        running_loop()
        self.reporter.is_serving = True
        await asyncio.gather(self.backend.open(), self.live.open())

    async def close(self) -> None:
        """Send what is still owed to the backend, for a bounded time, and close."""
        self.turns.close()
        self.leases.stop_renewing()
        await self.live.close()
        if any(loop.is_running() for loop in list(self.live.ready)):
            await self.decider.local.reconciler.leave()
        else:
            await self.decider.local.reconciler.close()
        await self.backend.close()
        await self.leases.background.finish()
        for tell in self.at_close:
            tell()

    def with_settings(self, settings: Settings) -> "Engine":
        """Return another engine with these settings, counts of its own, and the hooks of this one."""
        resolver = self.live.resolver
        other = Engine(settings, resolve=None if resolver is None else resolver.hook)
        for hook in self.notify.hooks:
            other.notify.add(hook)
        other.decider.observers = self.decider.observers
        other.backend.call_observers += self.backend.call_observers
        other.at_close += self.at_close
        return other

    def _watch(self, watch: Watch | None) -> None:
        """Show each request to `watch` from now on."""
        self.live.watch = watch

    async def _take_over(self) -> None:
        """Go on with what event loops that have ended owed to the backend."""
        self.backend.take_over()
        self.decider.local.reconciler.resume()

    def stats(self) -> Stats:
        """Return figures of this limiter's work: done, and waiting."""
        return Stats(
            backend_up=not self.backend.is_away,
            load=self.backend.load,
            totals=self.decision_counts.totals(),
            decisions_without_backend=dict(self.decider.local.decisions),
            leases=self.leases.number,
            slots_lost=self.leases.slots_lost,
            settles_ignored=self.leases.settling.ignored,
            unsynced=len(self.decider.local.reconciler),
            unsynced_lost=self.decider.local.reconciler.lost,
            version=self.version,
        )

    def observe(self, observer: Observer) -> None:
        """Show every decision to `observer`, as it is made. For the app itself there is `on_decision`."""
        self.decider.observers = self.decider.observers or Observers()
        self.decider.observers.add(observer)

    def identity_of(
        self, identity: Identity | None = None, api_key: str | bytes | None = None, address: str | None = None
    ) -> Identity:
        """Return the identity of an API key, with the address if that matters, or of an address alone.

        An `identity` of the app's own is made safe, see `adopt`. Raises ValueError if nobody is named.
        """
        if identity is not None:
            return self.live.rules.adopted(identity)
        if known := self.hashed(api_key):
            _, hashed = known
            listed = self.identify.of_key(hashed)
            if listed is not None:
                return listed
            unknown = self.identify.of_unknown(hashed, self.identify.hop_at(address or "unknown"))
            # A cap on no address at all would be one on all callers together.
            return unknown if address else replace(unknown, address=None)
        if not address:
            raise ValueError("acquire needs an identity, an api_key or an address")
        return self.identify.of_address(address)

    def policy_of(
        self, caller: Identity, method: str, path: str, cost: int | None = None, address: str | None = None
    ) -> Policy:
        """Return the policy of a caller on this path; `address` is where it calls from, if that is known."""
        if address and self.identify.blocks_networks and self.identify.hop_at(address).blocked is not None:
            return self.policies.blocked(caller, self.policies.routes.match(method, path))
        return self.policies.match(caller, method, path, cost)

    def hashed(self, api_key: str | bytes | None) -> tuple[bytes, str] | None:
        """The bytes and the hash of a key; None where it is empty, which is not a key in a request either."""
        data = api_key.encode("utf-8", "surrogatepass") if isinstance(api_key, str) else api_key or b""
        data = data.strip(b" \t")
        return (data, hash_api_key(data, self._secret)) if data else None

    async def charge(
        self,
        policy: Policy,
        identity: Identity | None = None,
        price: int | None = None,
        units: Units | None = None,
    ) -> Lease:
        """Decide about one request under a policy. Never raises for a backend that is away.

        `price` takes the place of the route's estimate, in units of the caller's currency, and `units` that
        of its estimates of metered units.
        """
        lease = await ask(self.decider, Question(policy, identity or policy.identity, price, units))
        lease.is_acquired = True
        return lease

    async def peek(self, policy: Policy, price: int | None = None) -> Decision:
        """Return the status of a caller's limits, budgets included; charges nothing.

        Raises `BackendError`.
        """
        charge = policy.priced_charge
        outcome = await self.backend.peek(charge, price or 0)
        return decision_of(policy, charge, outcome, price or 0, None)

    async def reset(self, policy: Policy) -> None:
        """Forget what was counted of the caller's own limits. Raises `BackendError`."""
        await self.forget([c for c in policy.priced_charge.counters if c.owner != "everyone"])

    async def forget(self, counters: Iterable[Counter]) -> None:
        """Forget what was counted under these counters. Raises `BackendError`."""
        try:
            await self.backend.reset(Charge(counters))
        finally:
            # Only now: whoever asked meanwhile may have been refused by what was just forgotten.
            self.refusals.clear()
            self.prefetch.clear()  # what was taken before is counted nowhere any more
