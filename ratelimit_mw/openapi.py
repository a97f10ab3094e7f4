"""The 429 in an app's OpenAPI schema, so that clients generated from it know refusals and their headers.

FastAPI is met as an object with `openapi()`, and not imported.
"""

import copy
from collections.abc import Iterator
from typing import Any, Protocol

from ratelimit_mw._internal.asgi.app_routes import find_app
from ratelimit_mw._internal.asgi.marked_routes import MarkedRoutes
from ratelimit_mw._internal.policy.loose_paths import route_table
from ratelimit_mw._internal.policy.routing import RouteTable
from ratelimit_mw._internal.policy.sample_paths import samples
from ratelimit_mw._internal.settings import ResponseSettings, Settings

Schema = dict[str, Any]

ERROR_SCHEMA = "RateLimitError"
RESPONSE = "RateLimited"
CODE_LIMITS = "x-ratelimit-limits"
"""Extension of an operation that has limits in code: their names and rates."""
BLOCKED_RESPONSE = "CallerBlocked"

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace", "query")
_WHOLE = {"type": "integer", "minimum": 0}
_REFUSAL_HEADERS: dict[str, Schema] = {
    "Retry-After": {
        "description": "Seconds to wait. Absent where waiting is no use.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "retry-after-ms": {"description": "The wait of Retry-After in milliseconds.", "schema": _WHOLE},
    "x-should-retry": {
        "description": '"false" where a client should not try again by itself.',
        "schema": {"type": "string", "enum": ["false"]},
    },
}
_RATE_HEADERS: dict[str, Schema] = {
    "X-RateLimit-Limit": {"description": "Requests per window.", "schema": _WHOLE},
    "X-RateLimit-Remaining": {"description": "Requests left in the window.", "schema": _WHOLE},
}
_RESETS = {
    "unix": "When Remaining next grows, as a Unix time in seconds.",
    "seconds": "Seconds until Remaining next grows.",
}
_IETF_HEADERS: dict[str, Schema] = {
    "RateLimit-Policy": {"description": "The caller's limits.", "schema": {"type": "string"}},
    "RateLimit": {"description": "What is left of each limit.", "schema": {"type": "string"}},
}
_CODES = [
    "RATE_LIMIT_EXCEEDED",
    "CONCURRENT_LIMIT_EXCEEDED",
    "SPENDING_LIMIT_EXCEEDED",
    "COST_EXCEEDS_LIMIT",
    "CAPACITY_EXCEEDED",
    "CALLER_BLOCKED",
]


class HasOpenAPI(Protocol):
    """An app that describes itself, as FastAPI does."""

    openapi_schema: Schema | None

    def openapi(self) -> Schema:
        """The schema, made once and kept in `openapi_schema`."""


def add_rate_limit_responses(app: HasOpenAPI, settings: Settings | None = None) -> None:
    """Document the 429 and its headers in the OpenAPI schema of a FastAPI app, on every limited operation.

    Where the settings can block callers, the 403 of these is described, too.
    Exempt routes are left out, and headers and body described as they are set: in `settings`, or else in
    those of the middleware that was added to the app. An operation that describes a 429 of its own keeps
    it. The schema is made when it is first asked for, and may raise `SettingsError` then.
    """
    original = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None or RESPONSE not in _responses(app.openapi_schema):
            in_force = settings or find_app(app).settings or Settings()
            app.openapi_schema = _with_refusals(original(), in_force, MarkedRoutes(app))
        return app.openapi_schema

    app.openapi_schema = None
    app.openapi = openapi  # type: ignore[method-assign]


def _with_refusals(schema: Schema, settings: Settings, marked: MarkedRoutes | None = None) -> Schema:
    schema, rules = copy.deepcopy(schema), route_table(settings)
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {})[ERROR_SCHEMA] = _error_schema(settings.response)
    described = components.setdefault("responses", {})
    described[RESPONSE] = _response(settings.response)
    can_block = any(plan.blocked for plan in settings.plans.values()) or settings.identity.blocked_networks
    if can_block:
        described[BLOCKED_RESPONSE] = _blocked_response(settings.response)
    for path, method, operation in _operations(schema):
        if not _is_exempt(settings, rules, method, path):
            limits = [] if marked is None else _code_limits(marked, settings, method, path)
            if limits:
                operation[CODE_LIMITS] = limits
            responses = operation.setdefault("responses", {})
            responses.setdefault("429", {"$ref": f"#/components/responses/{RESPONSE}"})
            if can_block:
                responses.setdefault("403", {"$ref": f"#/components/responses/{BLOCKED_RESPONSE}"})
    return schema


def _code_limits(marked: MarkedRoutes, settings: Settings, method: str, path: str) -> list[Schema]:
    """Name the limits in code of an operation, with their rates as the settings leave them."""
    route = next((found for sample in samples(path) if (found := marked.find("http", method, sample))), None)
    limits = []
    for limit in () if route is None else route.limits:
        said = settings.limits.get(limit.name)
        rates = limit.rates if said is None or said.requests is None else said.requests
        if said is None or not said.off:
            limits.append({"name": limit.name, "rates": [rate.name for rate in rates]})
    return limits


def _responses(schema: Schema) -> Schema:
    responses: Schema = schema.get("components", {}).get("responses", {})
    return responses


def _operations(schema: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, item in schema.get("paths", {}).items():
        for method in _METHODS:
            if isinstance(item.get(method), dict):
                yield path, method.upper(), item[method]


def _is_exempt(settings: Settings, rules: RouteTable, method: str, path: str) -> bool:
    """Whether every request of the operation is. A schema's `{id}` may be any convertor's."""
    found = {rules.match(method, sample) for sample in samples(path)}
    return bool(found) and all(rule is not None and settings.routes[rule].exempt for rule in found)


def _response(response: ResponseSettings) -> Schema:
    headers = dict(_REFUSAL_HEADERS)
    if "x-ratelimit" in response.headers:
        headers |= _RATE_HEADERS
        headers["X-RateLimit-Reset"] = {"description": _RESETS[response.reset], "schema": _WHOLE}
    if "ietf" in response.headers:
        headers |= _IETF_HEADERS
    return _described("Too many requests, too many at once, or a budget is used up.", headers, response)


def _blocked_response(response: ResponseSettings) -> Schema:
    headers = {"x-should-retry": _REFUSAL_HEADERS["x-should-retry"]}
    return _described("The caller, or the network it calls from, is blocked.", headers, response)


def _described(description: str, headers: Schema, response: ResponseSettings) -> Schema:
    media_type = "application/json" if response.body == "json" else "application/problem+json"
    schema = {"$ref": f"#/components/schemas/{ERROR_SCHEMA}"}
    return {"description": description, "headers": headers, "content": {media_type: {"schema": schema}}}


def _error_schema(response: ResponseSettings) -> Schema:
    text, code = {"type": "string"}, {"type": "string", "enum": _CODES}
    details = {"type": "object", "additionalProperties": True}
    url = {"type": "string", "format": "uri"}
    if response.body == "problem":
        names = {"type": text, "title": text, "status": {"type": "integer"}, "detail": text, "code": code}
        violated = {"type": "array", "items": text}
        names |= {"violated-policies": violated, "details": details, "documentation_url": url}
        return _object(names, "type", "title", "status", "detail", "code")
    kind = {"type": "string", "enum": ["rate_limit_error", "capacity_error", "permission_error"]}
    error = _object(
        {"type": kind, "code": code, "message": text, "details": details, "documentation_url": url},
        *("type", "code", "message", "details"),
    )
    return _object({"error": error}, "error")


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}
