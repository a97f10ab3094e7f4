"""An app whose requests settle only once two of them are inside, for servers whose requests share a state."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware
from tests.support.asgi import settings_of

SETTINGS = """
operations = { usage_path = "/limits" }
plans.default = { requests = ["100/hour"], spending = { daily = "100.00" } }
"""
PATIENCE = 20
"""Seconds that a request waits for the other one."""


def make_app() -> RateLimitMiddleware:
    """A new app, with counts of its own."""
    inside: list[str] = []

    async def settle(request: Request) -> PlainTextResponse:
        """Settle at the amount in the path, after another request was admitted on the same connection."""
        inside.append("in")
        async with asyncio.timeout(PATIENCE):
            while len(inside) < 2:
                await asyncio.sleep(0.005)
        await request.state.ratelimit.settle(request.path_params["amount"])
        return PlainTextResponse(request.state.greeting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        yield {"greeting": "hello"}

    inner = Starlette(routes=[Route("/settle/{amount}", settle)], lifespan=lifespan)
    return RateLimitMiddleware(inner, settings=settings_of(SETTINGS))


app = make_app()
