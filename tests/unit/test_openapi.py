"""The 429 in FastAPI's schema: on what is limited, as the settings say."""

import subprocess
import sys
from typing import Any

import pytest
from fastapi import FastAPI

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw.openapi import add_rate_limit_responses
from tests.support.asgi import FakeClock, client_of, limiter_of, settings_of, statuses

REFERENCE = {"$ref": "#/components/responses/RateLimited"}
EXEMPT = '[[routes]]\npath = "/health"\nexempt = true'


def api() -> FastAPI:
    """An app with three operations, of which one describes a 429 of its own."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/v1/{name}")
    async def predict(name: str) -> str:
        return name

    @app.get("/own", responses={429: {"description": "busy"}})
    async def own() -> str:
        return "ok"

    return app


def refusals(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the 429 response that the schema has for each path."""
    return {path: next(iter(item.values()))["responses"].get("429") for path, item in schema["paths"].items()}


def test_limited_operations_have_a_429() -> None:
    """Every operation but what is exempt, and what describes its own."""
    app = api()
    app.add_middleware(RateLimitMiddleware, settings=settings_of(EXEMPT))
    add_rate_limit_responses(app)
    found = refusals(app.openapi())
    assert found == {"/health": None, "/v1/{name}": REFERENCE, "/own": {"description": "busy"}}


def test_schema_is_made_once_and_for_each_app() -> None:
    """Asked again, the same object; another app's schema is its own."""
    app = api()
    add_rate_limit_responses(app)
    assert app.openapi() is app.openapi()
    assert refusals(api().openapi())["/health"] is None


def test_schema_asked_for_before_is_made_anew() -> None:
    """Called late, what was made before is not kept."""
    app = api()
    app.openapi()
    add_rate_limit_responses(app)
    assert refusals(app.openapi())["/health"] == REFERENCE


@pytest.mark.parametrize(
    ("text", "media_type", "headers"),
    [
        ("", "application/json", {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}),
        ('response.headers = ["ietf"]', "application/json", {"RateLimit", "RateLimit-Policy"}),
        ('response = { body = "problem", headers = [] }', "application/problem+json", set()),
    ],
)
async def test_what_is_described_is_what_is_sent(text: str, media_type: str, headers: set[str]) -> None:
    """A real refusal has the media type, the headers and the members that the schema names."""
    settings = f'{text}\n[plans.anonymous]\nrequests = ["1/minute"]'
    app = api()
    add_rate_limit_responses(app, settings_of(settings))
    components = app.openapi()["components"]
    described = components["responses"]["RateLimited"]
    assert set(described["content"]) == {media_type}
    assert set(described["headers"]) - {"Retry-After", "retry-after-ms", "x-should-retry"} == headers
    app.add_middleware(RateLimitMiddleware, limiter=limiter_of(settings, FakeClock()))
    async with client_of(app) as client:
        assert await statuses(client, 1, "/own") == [200]
        refused = await client.get("/own")
    assert refused.headers["content-type"].startswith(media_type)
    assert headers <= {name.title().replace("Ratelimit", "RateLimit") for name in refused.headers}
    _check(components["schemas"]["RateLimitError"], refused.json())


def test_fastapi_is_not_imported() -> None:
    """Neither the package nor this part of it needs FastAPI."""
    code = "import sys, ratelimit_mw, ratelimit_mw.openapi; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _check(schema: dict[str, Any], value: Any) -> None:
    """Check a value by as much of JSON Schema as the error's schema takes."""
    kinds = {"object": "dict", "string": "str", "integer": "int", "array": "list"}
    assert type(value).__name__ == kinds[schema["type"]]
    assert value in schema.get("enum", [value])
    for name in schema.get("required", []):
        assert name in value
    for name, part in schema.get("properties", {}).items():
        if name in value:
            _check(part, value[name])
    if schema["type"] == "object" and not schema.get("additionalProperties"):
        assert set(value) <= set(schema["properties"])
