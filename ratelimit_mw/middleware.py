"""The ASGI middleware: a request's path from its scope to its answer.

Three ways out: not ours, refused, or the app with a `send` that adds our headers.
"""

import asyncio
import inspect
import logging
import os
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_mw.charge import BackendError
from ratelimit_mw.checks.surroundings import app_findings, mounted_twice
from ratelimit_mw.dashboard import Dashboard, is_below
from ratelimit_mw.events import DecisionNotifier, OnDecision, OnEvent
from ratelimit_mw.findings import say_once
from ratelimit_mw.gate import gate_of
from ratelimit_mw.identity import Identity, IdentityError, adopt
from ratelimit_mw.lease import Lease
from ratelimit_mw.lifespan import Lifespan
from ratelimit_mw.limiter import Limiter
from ratelimit_mw.live.resolve import Resolve
from ratelimit_mw.money import parse_amount
from ratelimit_mw.policy import Policy
from ratelimit_mw.routing import route_path
from ratelimit_mw.settings import Settings, SettingsError
from ratelimit_mw.usage import UsageEndpoint, asks_for_usage
from ratelimit_mw.wire.refusals import Response
from ratelimit_mw.wire.sender import Sender
from ratelimit_mw.wire.writers import Writers

logger = logging.getLogger("ratelimit_mw")

Identify = Callable[[Scope], Identity | Awaitable[Identity | None] | None]
"""A hook that says who is calling; None for nobody it knows, who then counts as anonymous."""
Price = Callable[[Scope, Identity], "Amount | Awaitable[Amount | None] | None"]
"""A hook that estimates what a request will cost, in the caller's currency; None: what the route says."""
Amount = str | int | Decimal


class RateLimitMiddleware:
    """Limits the requests of an ASGI app, as its settings say.

    `settings` is a path, a `Settings`, or absent: the file that `RATELIMIT_SETTINGS` names, else built-in
    defaults. Settings that don't load never start the app: lifespan start-up fails with every error, and
    where there is no lifespan every request is answered 503.
    """

    def __init__(  # noqa: PLR0913 - hooks, all by name
        self,
        app: ASGIApp,
        settings: Settings | str | os.PathLike[str] | None = None,
        *,
        identify: Identify | None = None,
        resolve: Resolve | None = None,
        price: Price | None = None,
        on_event: OnEvent | None = None,
        on_decision: OnDecision | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self.app = app
        self._identify_hook = identify
        self._price_hook = price
        self._error: SettingsError | None = None
        try:
            self.limiter = limiter or Limiter.from_settings(settings, on_event=on_event)
            if resolve is not None:
                self.limiter.live.resolve_by(resolve)
        except SettingsError as error:
            # Starlette builds middleware within the lifespan call, where raising would only switch it off.
            self._error = error
            self.limiter = Limiter()
        if on_decision is not None:
            self.limiter.observe(DecisionNotifier(on_decision))
        self.writers = Writers(self.limiter.settings)
        hooked = identify is not None or price is not None
        self._gate = None if hooked or self._error is not None else gate_of(self)
        self._lifespan = Lifespan(self.limiter, self._error, self._gate)
        self._usage = UsageEndpoint(self.limiter)
        self._dashboard = Dashboard(self.limiter)
        for finding in app_findings(app, RateLimitMiddleware):
            say_once(finding)

    @property
    def settings_error(self) -> SettingsError | None:
        """Why the settings don't load; None where they do."""
        return self._error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        writers = self.writers  # the request keeps them to the end
        passage = None if self._gate is None else self._gate.enter(scope, send)
        if passage is None:
            await self._serve(scope, receive, send)
            return
        if isinstance(passage, tuple):
            start, body = passage
            await send(start)
            await send(body)
            return
        try:
            asked = passage.asked
            if asked is not None:
                try:
                    answer = await asked
                except BackendError:
                    refused = passage.unanswered()
                except BaseException:  # cancelled, or ended by hand
                    passage.give_up()
                    raise
                else:
                    refused = passage.answered(answer)
                if refused is not None:
                    await _respond(_refusal(refused, writers), scope, receive, send)
                    return
            await self.app(scope, receive, passage)
        finally:
            passage.leave()

    async def _serve(  # noqa: C901, PLR0912 - the whole path: each further call would cost it
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve one connection in Python alone. The gate is the short way of what is plain here."""
        if scope["type"] not in ("http", "websocket") or self._error is not None:
            await self._serve_unlimited(scope, receive, send)
            return
        # From before the charge on, so that shutdown waits also for what a cancelled one gives back.
        self._lifespan.active += 1
        try:
            limiter = self.limiter
            live = limiter.live
            if asyncio.get_running_loop() not in live.ready:
                await live.get_ready()
            rules, writers = live.rules, self.writers
            if writers.settings is not rules.settings:  # this request keeps its own to the end
                writers = self.writers = Writers(rules.settings)
            if writers.has_own_paths and await self._serve_own_path(writers, scope, receive, send):
                return
            try:
                if self._identify_hook is None and live.resolver is None:
                    identity = rules.identify(scope)
                else:
                    identity = await self._identify(scope)
                    rules = live.rules  # an identity is always made by the present ones
            except IdentityError as error:
                if not rules.policies.is_exempt(scope.get("method", "GET"), route_path(scope)):
                    await _respond(writers.refusals.unidentified(error), scope, receive, send)
                    return
                identity = rules.identify.anonymous(scope)
            policy = rules.policies.match(identity, scope.get("method", "GET"), route_path(scope))
            price = None if self._price_hook is None else await self._price(scope, policy, identity)
            if price is None and policy.charge in limiter.refusals.kept:
                again = limiter.repeat(policy, writers.refusals.again)
                if again is not None:
                    await _respond(again, scope, receive, send)
                    return
            lease = await limiter.charge(policy, price)
            if not lease.allowed:
                await _respond(_refusal(lease, writers), scope, receive, send)
                return
            state = scope.get("state")
            if state is None:
                state = scope["state"] = {}
            elif isinstance(state.get("ratelimit"), Lease):
                say_once(mounted_twice())
            state["ratelimit"] = lease
            sender = Sender(send, writers.headers, lease)
            failed = True
            try:
                await self.app(scope, receive, sender)
                failed = sender.status >= 400
            finally:
                # Nothing is awaited here: a second cancellation could not be survived.
                limiter.leases.end(lease, failed=failed)
        finally:
            self._lifespan.active -= 1

    async def _serve_unlimited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is not a request, and every request while there are no settings to go by."""
        if scope["type"] == "lifespan":
            await self._lifespan(self.app, scope, receive, send)
        elif scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        else:
            self._lifespan.report_once()
            await _respond(self._broken(), scope, receive, send)

    async def _serve_own_path(self, writers: Writers, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request to the dashboard or to the usage path; false where it is to neither."""
        operations = writers.settings.operations
        path = route_path(scope)
        if operations.dashboard_path is not None and is_below(path, operations.dashboard_path):
            await self._dashboard(scope, receive, send)
            return True
        if operations.usage_path is None or not asks_for_usage(scope, operations.usage_path):
            return False
        try:
            identity = await self._identify(scope)
        except IdentityError as error:
            answer = writers.refusals.unidentified(error)
        else:
            policy = self.limiter.policies.match(identity, scope["method"], path)
            answer = await self._usage(scope["method"], policy, writers)
        await _respond(answer, scope, receive, send)
        return True

    async def _identify(self, scope: Scope) -> Identity:
        """Who is calling, where somebody may have to be waited for who knows.

        By the app's own hook, where there is one, and anonymous, by address, whom that doesn't know.
        """
        resolver = self.limiter.live.resolver
        if self._identify_hook is None:
            return await resolver.caller(scope) if resolver is not None else self.limiter.identify(scope)
        identity = await _value(self._identify_hook(scope))
        if identity is None:
            return self.limiter.identify.anonymous(scope)
        return adopt(identity, self.limiter.settings)

    async def _price(self, scope: Scope, policy: Policy, identity: Identity) -> int | None:
        """What the app's own hook estimates; None where the route's price counts.

        It is told who calls: keys of one account, and unknown ones of one address, share a policy.
        """
        if self._price_hook is None or policy.currency is None or policy.is_exempt:
            return None
        amount = await _value(self._price_hook(scope, identity))
        try:
            return None if amount is None else parse_amount(amount, policy.currency, round_up=True)
        except ValueError as error:
            logger.warning("price= returned no amount (%s); the route's price counts", error)
            return None

    def _broken(self) -> Response:
        message = "The service is not configured correctly. Its operator finds the reason in the log."
        return self.writers.refusals.error(503, "server_error", "SETTINGS_ERROR", message)


def _refusal(lease: Lease, writers: Writers) -> Response:
    response = writers.refusals(lease.decision)
    if lease.repeats is not None:
        writers.refusals.keep(lease.repeats, response, lease.decision)
    return response


async def _respond(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer instead of the app. A WebSocket gets the same, or a rejected handshake where it cannot."""
    prefix = ""
    if scope["type"] == "websocket":
        await receive()  # the handshake, which a server wants to be asked for first
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1013, "reason": ""})
            return
        prefix = "websocket."
    start = {"type": f"{prefix}http.response.start", "status": response.status, "headers": response.headers}
    await send(start)
    await send({"type": f"{prefix}http.response.body", "body": response.body})


async def _value(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
