"""Refusals: the status, headers and body that tell a caller why, and when to come back."""

import json
from http import HTTPStatus
from typing import Any

from ratelimit_mw._internal.cache.refusals import CachedRefusal
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.charge import period_key
from ratelimit_mw._internal.model.limits import REQUESTS, SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, WindowStatus
from ratelimit_mw._internal.policy.api_key_reader import IdentityError
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, Refusal
from ratelimit_mw._internal.responses.headers import HeaderWriter, RawHeaders
from ratelimit_mw._internal.runtime.leaf import digits
from ratelimit_mw._internal.settings import ResponseSettings

GIVE_UP_AFTER = 60
"""Seconds of waiting beyond which clients are told not to retry by themselves."""
MAX_BODIES = 1_000
"""Bodies of refusals that are kept."""

_PROBLEM_TYPES = "https://iana.org/assignments/http-problem-types#"
_MILLISECONDS = b"retry-after-ms"
_PERIODS = {"daily": "Daily", "monthly": "Monthly"}


class Response:
    """A whole answer, ready for any server interface."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: RawHeaders, body: bytes) -> None:
        self.status: int = status
        self.headers: RawHeaders = headers
        self.body: bytes = body

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Response) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.status, self.body))

    def _values(self) -> tuple[object, ...]:
        return (self.status, self.headers, self.body)


class RefusalWriter:
    """Writes refusals as `[response]` says."""

    def __init__(self, settings: ResponseSettings) -> None:
        self._settings = settings
        self._writer = HeaderWriter(settings)
        self._bodies: dict[tuple[object, ...], bytes] = {}

    def __call__(self, decision: Decision) -> Response:
        """The answer to a refused request."""
        refusal = decision.refusal
        if refusal is None:
            raise ValueError("the request was not refused")
        statuses = {"capacity": self._settings.capacity_status, "unavailable": 503, "blocked": 403}
        status = statuses.get(refusal.reason, 429)
        headers = [*_waiting(refusal.retry_after_us), *self._writer(decision)]
        figures = self._figures(decision, refusal)
        body = None if figures is None else self._bodies.get(figures)
        if body is None:
            body = self._refusal_body(status, decision, refusal)
            if figures is not None:
                if len(self._bodies) >= MAX_BODIES:
                    self._bodies.clear()
                self._bodies[figures] = body
        return self._response(status, headers, body)

    def answer(self, lease: Lease) -> Response:
        """The answer to a refused request; the remembered one, where this refusal repeats another."""
        refused = lease.repeats
        if refused is None:
            return self(lease.decision)
        again = self.again(refused, refused.age(lease.repeated_at))
        if again is None:
            again = self(lease.decision)
            self.remember(refused, again, lease.decision)
        return again

    def remember(self, refused: CachedRefusal, response: Response, decision: Decision) -> None:
        """Remember the answer to a refusal, to give it again for as long as it says the same."""
        wait = None if decision.refusal is None else decision.refusal.retry_after_us
        if wait is None or not self._writer.is_absolute:
            return
        seconds = _whole_seconds(wait)
        wait += decision.now_us - refused.outcome.now  # from the refusal that is remembered
        last = wait - (seconds - 1) * SECOND
        at = [name for name, _ in response.headers].index(_MILLISECONDS)
        # A copy: middleware outside of ours may add to the headers that it is sent.
        copied = Response(response.status, response.headers.copy(), response.body)
        refused.answer = RememberedResponse(self, copied, at, wait, last)

    def again(self, refused: CachedRefusal, age: int) -> Response | None:
        """The remembered answer, `age` microseconds after the refusal; None where it would say another."""
        remembered = refused.answer
        if not isinstance(remembered, RememberedResponse) or remembered.writer is not self:
            return None
        if age >= remembered.last:
            return None
        response = remembered.response
        headers = response.headers.copy()
        left = remembered.wait - age
        headers[remembered.at] = (_MILLISECONDS, digits(max(-(-left // 1000), 1)))
        return Response(response.status, headers, response.body)

    def _refusal_body(self, status: int, decision: Decision, refusal: Refusal) -> bytes:
        error = _describe(decision, refusal, self._writer)
        if refusal.retry_after_us is not None and refusal.reason not in ("capacity", "unavailable"):
            error["details"]["retry_after"] = _whole_seconds(refusal.retry_after_us)
        return self._body(status, error, _violated(decision))

    def _figures(self, decision: Decision, refusal: Refusal) -> tuple[object, ...] | None:
        """All that the body of a refusal by a rate, or of a block, tells; who goes on is told it again."""
        limit_status, wait = refusal.limit, refusal.retry_after_us
        if refusal.reason == "blocked":
            return (refusal.reason,)
        if refusal.reason != "rate" or limit_status is None or limit_status.window is None or wait is None:
            return None
        window, status = limit_status.window
        reset = self._writer.reset(decision.now_us, status.reset_after_us)
        cost = decision.cost_of(limit_status)
        return (window, *_violated(decision), status.used, reset, cost, _whole_seconds(wait))

    def unidentified(self, error: IdentityError) -> Response:
        """An answer to who doesn't say clearly who is calling."""
        return self.error(error.status, "invalid_request_error", error.code, error.message)

    def broken(self) -> Response:
        """The answer to every request where the settings don't load."""
        message = "The service is not configured correctly. Its operator finds the reason in the log."
        return self.error(503, "server_error", "SETTINGS_ERROR", message)

    def error(self, status: int, type_: str, code: str, message: str) -> Response:
        """An answer that is not about limits: an API key that cannot be read, settings that don't load."""
        error = {"type": type_, "code": code, "message": message, "details": {}}
        return self._response(status, [], self._body(status, error, []))

    def _body(self, status: int, error: dict[str, Any], violated: list[str]) -> bytes:
        if self._settings.documentation_url:
            error["documentation_url"] = self._settings.documentation_url
        problem = self._settings.body == "problem"
        return json.dumps(_problem(status, error, violated) if problem else {"error": error}).encode()

    def _response(self, status: int, headers: RawHeaders, body: bytes) -> Response:
        problem = self._settings.body == "problem"
        content_type = b"application/problem+json" if problem else b"application/json"
        return Response(
            status,
            [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                (b"cache-control", b"no-store"),
                *headers,
            ],
            body,
        )


class RememberedResponse:
    """An answer of which only the milliseconds to wait change."""

    __slots__ = ("at", "last", "response", "wait", "writer")

    def __init__(self, writer: RefusalWriter, response: Response, at: int, wait: int, last: int) -> None:
        self.writer = writer
        self.response = response
        self.at = at
        """Index of those milliseconds among the headers."""
        self.wait = wait
        """Microseconds to wait from the moment that the refusal came."""
        self.last = last
        """Its age, in microseconds, from which on the whole seconds are others."""


def _waiting(wait: int | None) -> RawHeaders:
    """Return the headers that tell every client when to come back, and whether at all.

    Seconds are for HTTP, milliseconds for SDKs. `x-should-retry: false` tells a client not to come back by
    itself.
    """
    if wait is None:
        return [(b"x-should-retry", b"false")]
    seconds = _whole_seconds(wait)
    headers = [(b"retry-after", b"%d" % seconds), (_MILLISECONDS, b"%d" % max(-(-wait // 1000), 1))]
    if seconds > GIVE_UP_AFTER:
        headers.append((b"x-should-retry", b"false"))
    return headers


def _violated(decision: Decision) -> list[str]:
    """Every rate of the caller's that refused, also those that are not the one named."""
    return [
        counter.name or counter.limit.text
        for counter, status in decision.limits
        if isinstance(counter.limit, Window) and counter.owner != "everyone" and status.refuses
    ]


def _whole_seconds(wait: int) -> int:
    return max(-(-wait // 1_000_000), 1)


def _describe(decision: Decision, refusal: Refusal, writer: HeaderWriter) -> dict[str, Any]:
    """Type, code, message and details of the error, in that order."""
    limit_status = refusal.limit
    if refusal.reason == "blocked":
        return _error("permission_error", "CALLER_BLOCKED", "This caller is blocked.", {})
    if limit_status is None:  # nobody could be asked
        message = "Rate limits cannot be checked at the moment. Please try again."
        return _error("rate_limit_unavailable", "RATE_LIMIT_UNAVAILABLE", message, {})
    if refusal.reason == "cost":
        return _too_large(decision, limit_status)
    if refusal.reason == "capacity":
        message = "The service is at capacity. Please try again later."
        details: dict[str, Any] = {"retry_after": _whole_seconds(refusal.retry_after_us or 0)}
        if limit_status.counter.name:
            details["policy"] = limit_status.counter.name
        return _error("capacity_error", "CAPACITY_EXCEEDED", message, details)
    if limit_status.window is not None:
        return _rate(decision, limit_status, *limit_status.window, writer)
    if limit_status.slots is not None:
        return _concurrency(*limit_status.slots, limit_status.counter.name)
    if limit_status.budget is not None:
        period_ends = period_key(limit_status.counter, decision.now_us).ends
        return _spending(decision, *limit_status.budget, period_ends, writer)
    raise TypeError(f"{limit_status} is a limit of no known kind")


def _rate(
    decision: Decision, standing: LimitStatus, window: Window, status: WindowStatus, writer: HeaderWriter
) -> dict[str, Any]:
    used, cost = status.used, decision.cost_of(standing)
    details: dict[str, Any] = {
        "policy": standing.counter.name or window.text,
        "limit": window.quota,
        "remaining": max(window.quota - used, 0),
        "window": window.seconds,
        "reset": writer.reset(decision.now_us, status.reset_after_us),
    }
    if window.counted != REQUESTS:
        details["unit"] = window.counts
    message = f"Rate limit exceeded. {used}/{window.quota} {window.counted} used in {window.phrase}"
    if cost > 1:
        details["cost"] = cost
        message += f"; this request needs {cost}"
    return _error("rate_limit_error", "RATE_LIMIT_EXCEEDED", f"{message}.", details)


def _concurrency(slots: Slots, status: SlotStatus, name: str) -> dict[str, Any]:
    active = status.active
    units = slots.unit if slots.limit == 1 else f"{slots.unit}s"
    message = f"Concurrent {slots.unit} limit exceeded. {active}/{slots.limit} {units} running."
    details: dict[str, Any] = {"limit": slots.limit, "active": active}
    if name:
        details["policy"] = name
    return _error("rate_limit_error", "CONCURRENT_LIMIT_EXCEEDED", message, details)


def _spending(
    decision: Decision, allowance: Allowance, status: BudgetStatus, period_ends: int, writer: HeaderWriter
) -> dict[str, Any]:
    spent, held, currency = status.spent, status.held, allowance.currency
    unit = "tokens" if currency == "token" else currency
    limit_text, spent_text, held_text, price_text = (
        format_amount(amount, currency) for amount in (allowance.amount, spent, held, decision.price_micros)
    )
    details: dict[str, Any] = {
        "period": allowance.period,
        "limit": limit_text,
        "spent": spent_text,
        "held": held_text,
        "currency": currency,
        "reset": writer.reset(decision.now_us, period_ends - decision.now_us),
    }
    message = f"{_PERIODS[allowance.period]} spending limit exceeded. {spent_text}/{limit_text} {unit} spent"
    if held:
        message += f", {held_text} held"
    if status.taken < allowance.amount:
        details["price"] = price_text
        message += f"; this request needs {price_text}"
    return _error("rate_limit_error", "SPENDING_LIMIT_EXCEEDED", f"{message}.", details)


def _too_large(decision: Decision, limit_status: LimitStatus) -> dict[str, Any]:
    """A request that no waiting helps. What everyone shares is not told."""
    limit, details = limit_status.counter.limit, dict[str, Any]()
    cost = decision.cost_of(limit_status)
    unit = limit.counts if isinstance(limit, Window) and limit.counted != REQUESTS else "units"
    if isinstance(limit, Allowance):
        price = format_amount(decision.price_micros, limit.currency)
        amount = format_amount(limit.amount, limit.currency)
        details = {"period": limit.period, "limit": amount, "currency": limit.currency, "price": price}
        message = f"This request needs {price} {limit.currency}; the {limit.period} limit is {amount}."
    elif isinstance(limit, Window) and limit_status.counter.owner != "everyone":
        policy = limit_status.counter.name or limit.text
        details = {"policy": policy, "limit": limit.quota, "window": limit.seconds, "cost": cost}
        if limit.counted != REQUESTS:
            details["unit"] = limit.counts
        message = f"This request needs {cost} {unit}; the limit is {limit.quota} in {limit.phrase}."
    else:
        details = {"cost": cost}
        if unit != "units":
            details["unit"] = unit
        message = f"This request needs {cost} {unit}, more than are ever granted at once."
    return _error("rate_limit_error", "COST_EXCEEDS_LIMIT", message, details)


def _error(type_: str, code: str, message: str, details: dict[str, Any]) -> dict[str, Any]:
    return {"type": type_, "code": code, "message": message, "details": details}


def _problem(status: int, error: dict[str, Any], violated: list[str]) -> dict[str, Any]:
    """Return an error as a problem (RFC 9457), with the types of the RateLimit header fields' draft."""
    problem: dict[str, Any] = {"status": status, "detail": error["message"], "code": error["code"]}
    if error["type"] == "rate_limit_error":
        problem["type"] = f"{_PROBLEM_TYPES}quota-exceeded"
        problem["title"] = "Request cannot be satisfied as assigned quota has been exceeded"
        problem["violated-policies"] = violated
    elif error["type"] in ("capacity_error", "rate_limit_unavailable"):
        problem["type"] = f"{_PROBLEM_TYPES}temporary-reduced-capacity"
        problem["title"] = "Request cannot be satisfied due to temporary server capacity constraints"
    else:
        problem["type"] = "about:blank"
        problem["title"] = HTTPStatus(status).phrase
    problem["details"] = error["details"]
    if "documentation_url" in error:
        problem["documentation_url"] = error["documentation_url"]
    return problem
