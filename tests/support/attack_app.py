"""The app that attackers call: every answer says what ran, and `/peak` how much did at once."""

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware

logging.basicConfig(level=logging.DEBUG)

running = 0
peak = 0


async def ran(request: Request) -> PlainTextResponse:
    """Say which handler ran, with which method."""
    return PlainTextResponse(f"ran {request.method} {request.scope['route'].path}")


async def slow(request: Request) -> PlainTextResponse:
    """Work for so many seconds, whoever is still there."""
    global running, peak  # noqa: PLW0603 - one process, one count
    running += 1
    peak = max(peak, running)
    try:
        await asyncio.sleep(float(request.path_params["seconds"]))
    finally:
        running -= 1
    return PlainTextResponse("ran slow")


async def upload(request: Request) -> PlainTextResponse:
    """Read the body to its end."""
    return PlainTextResponse(f"ran upload {len(await request.body())}")


async def download(request: Request) -> Response:
    """Send more than any buffer on the way holds."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(400):
            yield bytes(65_536)
            await asyncio.sleep(0)

    return StreamingResponse(pieces())


async def job(request: Request) -> PlainTextResponse:
    """Detach, settle, and show the token."""
    lease = request.state.ratelimit
    token = await lease.detach(ttl=5)
    await lease.settle("0.01")
    return PlainTextResponse(token)


async def tell_peak(request: Request) -> PlainTextResponse:
    """Say how many slow handlers ran at once at most, and how many do now."""
    return PlainTextResponse(f"{peak} {running}")


app = Starlette(
    routes=[
        Route("/v1/predictions", ran, methods=["GET", "POST", "OPTIONS"]),
        Route("/v1/slow/{seconds}", slow, methods=["GET", "POST"]),
        Route("/v1/upload", upload, methods=["POST"]),
        Route("/v1/download", download),
        Route("/v1/jobs", job, methods=["POST"]),
        Route("/health", ran),
        Route("/peak", tell_peak),
        Route("/", ran),
    ]
)
app.add_middleware(RateLimitMiddleware)
