"""`operations.usage_path`: where callers read how their own limits stand.

An answer costs nothing of the limits that it tells of. Rates of its own keep it from being flooded; who
exceeds them is refused as anywhere else, and mostly without asking the backend.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

from ratelimit_mw._internal.limiter.inspect_caller import charges_of, limits_by_caller, look, with_rates
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import CODE_SCOPE, Charge, Counter, period_key
from ratelimit_mw._internal.model.limits import REQUESTS, Window
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.outage.fallback import RETRY_UNAVAILABLE
from ratelimit_mw._internal.policy.counters import PLAN_SCOPE, route_scope
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, Refusal
from ratelimit_mw._internal.policy.identity import Identity, address_partition
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.policy.routing import route_path
from ratelimit_mw._internal.responses.headers import HeaderWriter
from ratelimit_mw._internal.responses.refusals import Response
from ratelimit_mw._internal.responses.writers import Writers
from ratelimit_mw._internal.settings import RouteSettings

EACH_CALLER = Window(60, 1, "minute")
"""Rate limit of one caller's requests to the usage path."""
EACH_ADDRESS = Window(600, 1, "minute")
"""Rate limit of one address's anonymous requests and unknown keys together: keys can be invented."""
MAX_QUESTIONS = 200
"""Callers whose question is kept ready; beyond it all are made anew."""

_CALLER_SCOPE, _ADDRESS_SCOPE = "u", "ua"
_METHODS = ("GET", "HEAD")

Scope = MutableMapping[str, Any]


class _Question(NamedTuple):
    """Policy and charges that the backend is asked about for a caller's request to the usage path."""

    gate: Policy
    """Policy of the caller on the usage path, in place of its plan and of the route rule for that path."""
    charges: tuple[Charge, ...]
    """All that is counted of the caller."""


def asks_for_usage(scope: Scope, usage_path: str) -> bool:
    """Whether a scope is a request to the usage path; a WebSocket handshake is none."""
    return route_path(scope) == usage_path and scope["type"] == "http"


class UsageEndpoint:
    """Answers requests to the usage path."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._questions: dict[tuple[object, ...], _Question] = {}

    async def __call__(self, method: str, policy: Policy, writers: Writers) -> Response:
        """The answer to the caller of `policy`: its usage, or why not. Never raises `BackendError`."""
        if method not in _METHODS and not policy.is_blocked:
            message = "Usage is read with GET."
            answer = writers.refusals.error(405, "invalid_request_error", "METHOD_NOT_ALLOWED", message)
            return Response(
                answer.status, [*answer.headers, (b"allow", ", ".join(_METHODS).encode())], answer.body
            )
        answer = await self._answer(policy, writers)
        return Response(answer.status, answer.headers, b"") if method == "HEAD" else answer

    async def _answer(self, policy: Policy, writers: Writers) -> Response:
        question, identity = await self._question(policy), policy.identity  # which another request may change
        # Gate and figures together take the backend no longer than any other request may.
        deadline = asyncio.get_running_loop().time() + self._limiter.settings.backend.timeout
        lease = await self._limiter.engine.charge(question.gate, identity)
        if not lease.allowed:
            return writers.refusals(lease.decision)
        try:
            async with asyncio.timeout_at(deadline):
                usage = await look(self._limiter, question.charges)
        except (BackendError, TimeoutError):
            refusal = Refusal("unavailable", None, RETRY_UNAVAILABLE)
            return writers.refusals(Decision(False, lease.decision.now_us, refusal=refusal))
        routes = self._limiter.settings.routes
        body = json.dumps(_usage(identity, usage, routes, writers.headers)).encode()
        return Response(200, _headers(len(body), usage, writers.headers), body)

    async def _question(self, policy: Policy) -> _Question:
        """Made once for a caller under the settings in force, which a policy stands for."""
        limits = limits_by_caller(self._limiter)
        question = self._questions.get((policy, limits))
        if question is None:
            rated = await with_rates(limits, policy.identity)
            if len(self._questions) >= MAX_QUESTIONS:
                self._questions.clear()
            path = self._limiter.settings.operations.usage_path or "/"
            charges = charges_of(self._limiter, policy.identity, rated)
            question = self._questions[policy, limits] = _Question(_gate_of(policy, path), charges)
        return question


def _gate_of(policy: Policy, path: str) -> Policy:
    identity = policy.identity
    counters = [Counter(identity.partition, _CALLER_SCOPE, EACH_CALLER)]
    if identity.address is not None:
        address = address_partition(identity.address)
        counters.append(Counter(address, _ADDRESS_SCOPE, EACH_ADDRESS, "address"))
    charge = Charge(counters)
    return Policy(
        identity=identity,
        route=RouteSettings.model_construct(path=path, slot=False, requests=(EACH_CALLER,)),
        charge=charge,
        priced_charge=charge,
        price=None,
        currency=None,
        too_small=None,
        on_failure="local",
        on_failure_priced="local",
        shadow=False,
        is_exempt=False,
        is_blocked=policy.is_blocked and not policy.shadow,
        prefetch_state=None,
    )


def _headers(length: int, usage: Decision, writer: HeaderWriter) -> list[tuple[bytes, bytes]]:
    """Return the headers of a usage response.

    Limits of single routes are left out of the rate limit headers.
    """
    everywhere = [each for each in usage.limits if not each.counter.scope.startswith(("r:", CODE_SCOPE))]
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % length),
        (b"cache-control", b"no-store"),
        *writer(usage._replace(limits=tuple(everywhere))),
    ]


def _usage(
    identity: Identity, usage: Decision, routes: Iterable[RouteSettings], writer: HeaderWriter
) -> dict[str, Any]:
    """Return a caller's usage as the object of the JSON body. Limits that all callers share are left out."""
    by_scope: dict[str, list[LimitStatus]] = {}
    for limit_status in usage.limits:
        by_scope.setdefault(limit_status.counter.scope, []).append(limit_status)
    units = {
        scope.removeprefix(f"{PLAN_SCOPE}:"): list(_rates(by_scope[scope], usage.now_us, writer))
        for scope in by_scope
        if scope.startswith(f"{PLAN_SCOPE}:")
    }
    in_code = [
        {
            "name": scope.removeprefix(CODE_SCOPE),
            "unit": _unit(statuses),
            "rates": list(_rates(statuses, usage.now_us, writer)),
            "concurrent": next(_slots(statuses), None),
        }
        for scope, statuses in by_scope.items()
        if scope.startswith(CODE_SCOPE)
    ]
    now, of_plan, of_address = usage.now_us, by_scope.pop(PLAN_SCOPE, []), by_scope.pop("a", [])
    return {
        "plan": identity.plan,
        "requests": list(_rates(of_plan, now, writer)),
        **({"units": units} if units else {}),
        "concurrent": next(_slots(of_plan), None),
        "spending": list(_budgets(of_plan, now, writer)),
        "routes": [
            {
                "path": route.path,
                "methods": None if route.methods is None else sorted(route.methods),
                "requests": list(_rates(by_scope.pop(scope), now, writer)),
            }
            for route in routes
            if route.requests
            and (scope := route_scope(route)) in by_scope  # a repeated rule counts with the first
        ],
        "address": list(_rates(of_address, now, writer)),
        **({"limits": in_code} if in_code else {}),
    }


def _rates(statuses: Iterable[LimitStatus], now: int, writer: HeaderWriter) -> Iterator[dict[str, Any]]:
    for limit_status in statuses:
        if limit_status.window is not None:
            window, status = limit_status.window
            yield {
                "policy": window.text,
                "limit": window.quota,
                "used": status.used,
                "remaining": max(window.quota - status.used, 0),
                "window": window.seconds,
                "reset": writer.reset(now, status.reset_after_us),
            }


def _unit(statuses: Iterable[LimitStatus]) -> str:
    """Return the unit that the rates of a limit in code count."""
    windows = [each.window[0].counted for each in statuses if each.window is not None]
    return windows[0] if windows else REQUESTS


def _slots(statuses: Iterable[LimitStatus]) -> Iterator[dict[str, Any]]:
    for limit_status in statuses:
        if limit_status.slots is not None:
            slots, status = limit_status.slots
            remaining = max(slots.limit - status.active, 0)
            yield {"unit": slots.unit, "limit": slots.limit, "active": status.active, "remaining": remaining}


def _budgets(statuses: Iterable[LimitStatus], now: int, writer: HeaderWriter) -> Iterator[dict[str, Any]]:
    for limit_status in statuses:
        if limit_status.budget is not None:
            budget, status = limit_status.budget
            amounts = {
                "limit": budget.amount,
                "spent": status.spent,
                "held": status.held,
                "remaining": max(budget.amount - status.taken, 0),
            }
            yield {
                "period": budget.period,
                "currency": budget.currency,
                **{name: format_amount(amount, budget.currency) for name, amount in amounts.items()},
                "reset": writer.reset(now, period_key(limit_status.counter, now).ends - now),
            }
