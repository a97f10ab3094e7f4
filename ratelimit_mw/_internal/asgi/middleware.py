"""The ASGI middleware: a request's path from its scope to its answer.

Three ways out: not ours, refused, or the app with a `send` that adds our headers.
"""

import logging
import os
from asyncio import get_running_loop
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_mw._internal.asgi.answers import respond
from ratelimit_mw._internal.asgi.estimate_hooks import EstimateHooks
from ratelimit_mw._internal.asgi.hook_errors import HookError, answer_as, awaited, may_be_awaitable
from ratelimit_mw._internal.asgi.hooks import Estimate, Identify, Price
from ratelimit_mw._internal.asgi.lifespan import Lifespan
from ratelimit_mw._internal.asgi.marked_routes import MarkedRoutes
from ratelimit_mw._internal.asgi.marks import readers
from ratelimit_mw._internal.asgi.raised_refusals import RefusalHook, close_accepted, with_own_body
from ratelimit_mw._internal.asgi.usage import UsageEndpoint, asks_for_usage
from ratelimit_mw._internal.checks.code_limits import code_limit_findings
from ratelimit_mw._internal.checks.surroundings import mounted_twice, mounting_findings
from ratelimit_mw._internal.dashboard import is_below, open_dashboard
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.limiter.observers import DecisionNotifier, OnDecision
from ratelimit_mw._internal.limiter.questions import enforced
from ratelimit_mw._internal.live.resolve import Resolve, Resolver
from ratelimit_mw._internal.live.rules import Rules
from ratelimit_mw._internal.observe.events import OnEvent
from ratelimit_mw._internal.policy.api_key_reader import IdentityError
from ratelimit_mw._internal.policy.code_limits import declared
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.lookup import LookupEntry
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.policy.rate_limited import RateLimited, refusal_in
from ratelimit_mw._internal.policy.routing import route_path
from ratelimit_mw._internal.responses.header_sender import ACCEPTED, SERVER_ERROR, HeaderSender
from ratelimit_mw._internal.responses.refusals import Response
from ratelimit_mw._internal.responses.writers import Writers
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.event_loop import NEEDS_ASYNCIO
from ratelimit_mw._internal.runtime.plain_hooks import check_hooks
from ratelimit_mw._internal.settings import Settings, SettingsError
from ratelimit_mw._internal.settings.findings import say_once

logger = logging.getLogger("ratelimit_mw")


class LimitedApp:
    """An app, and the way of each of its connections."""

    def __init__(  # noqa: PLR0913 - hooks, all by name
        self,
        app: ASGIApp,
        settings: Settings | str | os.PathLike[str] | None = None,
        *,
        identify: Identify | None = None,
        resolve: Resolve | None = None,
        price: Price | None = None,
        estimate: Estimate | None = None,
        refusal: RefusalHook | None = None,
        on_event: OnEvent | None = None,
        on_decision: OnDecision | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        check_hooks(identify=identify, price=price, estimate=estimate, refusal=refusal)
        self.app = app
        self._identify_hook = identify
        has_estimates = price is not None or estimate is not None
        self._estimate_hooks = EstimateHooks(price, estimate, lambda: self.limiter) if has_estimates else None
        self._refusal_hook = refusal
        self._error: SettingsError | None = None
        try:
            self.limiter: Limiter = limiter or Limiter.from_settings(settings, on_event=on_event)
            if resolve is not None:
                self.limiter.engine.live.resolve_by(resolve)
        except SettingsError as error:
            # Starlette builds middleware within the lifespan call, where raising would only switch it off.
            self._error = error
            self.limiter = Limiter()
        if limiter is not None and on_event is not None:
            limiter.engine.notify.add(on_event)
        if on_decision is not None:
            self.limiter.engine.observe(DecisionNotifier(on_decision))
        self.writers: Writers = Writers(self.limiter.settings)
        self._lifespan = Lifespan(self.limiter, self.read_marks)
        self._marked: MarkedRoutes | None = None
        readers.add(self)
        self.follow()
        self.limiter.followers.add(self)
        for finding in mounting_findings(app, RateLimitMiddleware, self.limiter.settings):
            say_once(finding)

    def follow(self) -> None:
        """Take the parts of the limiter's present engine."""
        engine = self.limiter.engine
        self._live, self._decider, self._leases = engine.live, engine.decider, engine.leases
        self._usage = UsageEndpoint(self.limiter)
        has_dashboard = self.limiter.settings.operations.dashboard_path is not None
        self._dashboard = open_dashboard(self.limiter) if has_dashboard else None

    @property
    def settings_error(self) -> SettingsError | None:
        """Error that says why the settings failed to load; None if they loaded."""
        return self._error

    def read_marks(self) -> MarkedRoutes:
        """Learn which limits in code are on the app's routes, and log what the start-up checks find there."""
        marked = self._marked = MarkedRoutes(self.app)
        if marked.is_outdated:
            self.forget_marks()
        self.limiter.marked.update(marked.limits)
        for finding in (*marked.findings, *code_limit_findings(self.limiter.settings, set(declared))):
            say_once(finding)
        return marked

    def forget_marks(self) -> None:
        """Have the next request read the limits in code anew."""
        self._marked = None

    async def serve(  # noqa: C901, PLR0912, PLR0915 - the whole way: each further call would cost it
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve one connection."""
        try:
            loop = get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:  # outside of the handler above, whose error would be told beside ours
            await self._serve_unlimited(scope, receive, send, RuntimeError(NEEDS_ASYNCIO))
            return
        if scope["type"] not in ("http", "websocket") or self._error is not None:
            await self._serve_unlimited(scope, receive, send, self._error)
            return
        # From before the charge on, so that shutdown waits also for a cancelled one that is given back.
        self._lifespan.active += 1
        try:
            live = self._live
            if loop not in live.ready:
                await live.get_ready()
            rules, writers = live.rules, self.writers
            if writers.settings is not rules.settings:  # this request keeps its own to the end
                writers = self.writers = Writers(rules.settings)
                self.forget_marks()  # which are checked against these settings, too
            marked = self._marked
            if marked is None:
                marked = self.read_marks()
            if writers.has_own_paths and await self._serve_own_path(writers, scope, receive, send):
                return
            try:
                if self._identify_hook is None and live.resolver is None:
                    found = rules.lookup.find(scope)
                else:
                    entry = self._look_up(scope)
                    found = entry if isinstance(entry, LookupEntry) else await entry
                    rules = live.rules  # those that it was found by, once the hooks have answered
            except IdentityError as unclear:
                if not rules.policies.is_exempt(scope.get("method", "GET"), route_path(scope)):
                    await respond(writers.refusals.unidentified(unclear), scope, receive, send)
                    return
                found = rules.lookup.find_for(rules.identify.anonymous(scope), scope)
            policy, price, units = found.policy, None, None
            if marked.has_limits:
                extended = marked.policy_of(policy, found.identity, scope, rules)
                policy = extended if isinstance(extended, Policy) else await extended
            if self._estimate_hooks is not None:
                estimates = self._estimate_hooks.ask(scope, policy, found.identity)
                price, units = estimates if isinstance(estimates, tuple) else await estimates
            lease = self._decider.decide(policy, found.identity, price, units)
            if not isinstance(lease, Lease):
                lease = await lease
            if policy.enforced is not None:
                lease = await enforced(self._decider, lease, price, units)
            if live.watch is not None:
                live.watch(found, scope, lease.decision, marked.names)
            if lease.outcome is None and not lease.allowed:
                answer = writers.refusals.answer(lease)
                if self._refusal_hook is not None:
                    answer = await with_own_body(self._refusal_hook, scope, lease.decision, answer)
                await respond(answer, scope, receive, send)
                return
            state = scope.get("state")
            if state and isinstance(outer := state.get("ratelimit"), Lease) and not outer.is_ended:
                say_once(mounted_twice())
            # A dict of its own: some servers have one for all requests of a connection. The scope stays the
            # server's, since middleware around this one reads in it which route the app has found.
            scope["state"] = {**state, "ratelimit": lease} if state else {"ratelimit": lease}
            lease.scope = scope  # until it ends
            sender = HeaderSender(send, writers.headers, lease)
            failed, status = True, SERVER_ERROR
            try:
                await self.app(scope, receive, sender)
                status = sender.status
                failed = status >= 400
            except Exception as error:
                sender.refused = sender.refused or refusal_in(error)
                if sender.refused is None or (sender.has_started and sender.status != ACCEPTED):
                    raise
            finally:
                # Nothing is awaited here: a second cancellation could not be survived.
                if sender.refused is not None and not lease.is_ended:
                    lease.give_back()
                self._leases.end(lease, failed, status)
            if sender.refused is not None:
                if live.watch is not None:
                    live.watch.count(found, scope, sender.refused.decision, marked.names)
                await self._answer_raised(sender.refused.decision, sender, writers, scope, send)
        except HookError as raised:
            await self._answer_hook(raised.cause, scope, receive, send)
        finally:
            self._lifespan.active -= 1

    async def _answer_hook(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what a hook raised as the app does; a refusal that it has no handler for, as any refusal."""
        try:
            await answer_as(self.app, error, scope, receive, send)
        except RateLimited as refused:
            if refused is not error:
                raise
            await respond(await self._refusal_of(refused.decision, self.writers, scope), scope, receive, send)

    async def _refusal_of(self, decision: Decision, writers: Writers, scope: Scope) -> Response:
        """Return the answer to a refusal, with the app's own body where its `refusal=` hook has one."""
        answer = writers.refusals(decision)
        if self._refusal_hook is not None:
            answer = await with_own_body(self._refusal_hook, scope, decision, answer)
        return answer

    async def _answer_raised(
        self, decision: Decision, sender: HeaderSender, writers: Writers, scope: Scope, send: Send
    ) -> None:
        """Answer a request whose refusal was raised inside the app."""
        if sender.has_started:
            await close_accepted(send)
        else:
            await respond(await self._refusal_of(decision, writers, scope), scope, None, send)

    async def _serve_unlimited(
        self, scope: Scope, receive: Receive, send: Send, error: Exception | None
    ) -> None:
        """Serve what is not a request, and every request where nothing can be served, for this reason."""
        if scope["type"] == "lifespan":
            await self._lifespan(self.app, scope, receive, send, error)
        elif scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        else:
            self._lifespan.report_once(error)
            await respond(self.writers.refusals.broken(), scope, receive, send)

    async def _serve_own_path(self, writers: Writers, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request to the dashboard or to the usage path; false where it is to neither."""
        operations, lookup = writers.settings.operations, self._live.rules.lookup
        path = route_path(scope)
        found = lookup.find_blocked(scope) if lookup.blocks_networks else None
        if operations.dashboard_path is not None and is_below(path, operations.dashboard_path):
            if found is None or found.policy.shadow:
                if self._dashboard is None:  # it was switched on while the app runs
                    self._dashboard = await threads.call(partial(open_dashboard, self.limiter))
                await self._dashboard(scope, receive, send)
            else:
                refused = await self.limiter.engine.charge(found.policy, found.identity)
                await respond(writers.refusals(refused.decision), scope, receive, send)
            return True
        if operations.usage_path is None or not asks_for_usage(scope, operations.usage_path):
            return False
        try:
            if found is None:
                caller = self._identify(scope)
                caller = caller if isinstance(caller, Identity) else await caller
                found = lookup.find_for(caller, scope)
        except IdentityError as error:
            answer = writers.refusals.unidentified(error)
        else:
            answer = await self._usage(scope["method"], found.policy, writers)
        await respond(answer, scope, receive, send)
        return True

    def _look_up(self, scope: Scope) -> LookupEntry | Coroutine[Any, Any, LookupEntry]:
        """Find the policy of a request whose caller a hook names: the entry, or what to await for it."""
        rules, lookup = self._live.rules, self._live.rules.lookup
        if lookup.blocks_callers and (blocked := lookup.find_blocked_caller(scope)) is not None:
            return blocked
        index = lookup.index_of(scope)
        if rules.policies.is_exempt_at(index):
            return lookup.find_at(rules.identify.anonymous(scope), index)  # and nobody has to be asked
        identity = self._identify(scope)
        if isinstance(identity, Identity):
            return self._find(identity, rules, index, scope)
        return self._find_awaited(identity, rules, index, scope)

    def _find(self, identity: Identity, rules: Rules, index: int | None, scope: Scope) -> LookupEntry:
        """Find the policy of a caller, for whom this rule was found before the hook was asked."""
        now = self._live.rules
        return now.lookup.find_at(identity, index) if now is rules else now.lookup.find_for(identity, scope)

    async def _find_awaited(
        self, identity: Coroutine[Any, Any, Identity], rules: Rules, index: int | None, scope: Scope
    ) -> LookupEntry:
        return self._find(await identity, rules, index, scope)

    def _identify(self, scope: Scope) -> Identity | Coroutine[Any, Any, Identity]:
        """Identify the caller: the identity, or what to await for it where a hook has to be awaited.

        A caller whom `identify=` doesn't know is whoever the headers say.
        """
        if self._identify_hook is None:
            return self._identify_by_headers(scope)
        try:
            answer: Any = self._identify_hook(scope)
        except Exception as error:
            raise HookError(error) from error
        if may_be_awaitable(answer):
            return self._identify_awaited(answer, scope)
        return self._identify_by_headers(scope) if answer is None else self._live.rules.adopted(answer)

    async def _identify_awaited(self, answer: Any, scope: Scope) -> Identity:
        identity: Identity | None = await awaited(answer)
        if identity is not None:
            return self._live.rules.adopted(identity)
        caller = self._identify_by_headers(scope)
        return caller if isinstance(caller, Identity) else await caller

    def _identify_by_headers(self, scope: Scope) -> Identity | Coroutine[Any, Any, Identity]:
        if self._live.resolver is None:
            return self._live.rules.identify(scope)
        return self._resolve(self._live.resolver, scope)

    async def _resolve(self, resolver: Resolver, scope: Scope) -> Identity:
        try:
            return await resolver.caller(scope)
        except (HTTPException, RateLimited) as error:  # what the hook says to this key
            raise HookError(error) from error


class RateLimitMiddleware(LimitedApp):
    """Limits the requests of an ASGI app, as its settings say.

    `settings` is a path, a `Settings`, or absent: the file that `RATELIMIT_SETTINGS` names, else built-in
    defaults. Settings that don't load never start the app: lifespan start-up fails with every error, and
    where there is no lifespan every request is answered 503.
    """

    # By this assignment also the compiled one has a `__call__` that is a coroutine function: servers look.
    __call__: Callable[..., Coroutine[Any, Any, None]] = LimitedApp.serve
