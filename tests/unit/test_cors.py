"""CORS: browsers can read refusals and our headers where CORSMiddleware is outside."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from examples.fastapi_app import app as example
from ratelimit_mw import RateLimitMiddleware
from tests.support.asgi import FakeClock, client_of, limiter_of, ok

ORIGIN = "https://app.example.com"
EXPOSED = [
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
    *("Retry-After", "retry-after-ms", "x-should-retry"),
]
TEXT = '[plans.anonymous]\nrequests = ["1/minute"]'
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


def served() -> Starlette:
    """An app with one request a minute, CORS outside."""
    return Starlette(
        routes=[Route("/", ok, methods=["GET", "POST"])],
        middleware=[
            Middleware(CORSMiddleware, allow_origins=[ORIGIN], allow_methods=["*"], expose_headers=EXPOSED),
            Middleware(RateLimitMiddleware, limiter=limiter_of(TEXT, FakeClock())),
        ],
    )


async def test_refusals_keep_their_cors_headers() -> None:
    """A page reads the 429, its body and its headers as it reads any answer."""
    async with client_of(served()) as client:
        admitted = await client.get("/", headers={"Origin": ORIGIN})
        refused = await client.get("/", headers={"Origin": ORIGIN})
    assert (admitted.status_code, refused.status_code) == (200, 429)
    for response in (admitted, refused):
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-expose-headers"] == ", ".join(EXPOSED)
    assert "retry-after" in refused.headers


async def test_preflights_cost_nothing() -> None:
    """CORSMiddleware answers them itself: a browser's question is not a request of the caller's."""
    async with client_of(served()) as client:
        for _ in range(5):
            assert (await client.options("/", headers=PREFLIGHT)).status_code == 200
        assert (await client.get("/")).status_code == 200


async def test_options_that_are_no_preflight_are_counted() -> None:
    """Nothing is free by its method: OPTIONS without a browser's question costs as any request."""
    async with client_of(served()) as client:
        assert (await client.options("/")).status_code == 405
        assert (await client.get("/")).status_code == 429


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_the_example_has_the_order_right(method: str) -> None:
    """The app that the docs point to answers preflights, and exposes what clients need."""
    transport = httpx.ASGITransport(example)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        asked = await client.options(
            "/v1/models", headers={"Origin": ORIGIN, "Access-Control-Request-Method": method}
        )
        answered = await client.get("/v1/models", headers={"Origin": ORIGIN})
    assert "x-ratelimit-limit" not in asked.headers
    assert "x-ratelimit-limit" in answered.headers
    assert set(EXPOSED) <= set(answered.headers["access-control-expose-headers"].split(", "))
