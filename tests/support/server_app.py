"""An app for every ASGI server: rates, slots, streams and WebSockets, with and without lifespan."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from ratelimit_mw import RateLimitMiddleware
from tests.support.served import echo, ok

STREAM_SECONDS = 120
has_started = False


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Note that the server has started the app."""
    global has_started  # noqa: PLW0603 - one app in a process
    has_started = True
    yield


async def ready(_: Request) -> JSONResponse:
    """Tell which process of whose answers, and whether its lifespan was run."""
    return JSONResponse({"of": os.environ["SERVER_TOKEN"], "lifespan": has_started, "pid": os.getpid()})


async def stream(_: Request) -> StreamingResponse:
    """Send a line at once, and others until the client is gone."""

    async def lines() -> AsyncIterator[bytes]:
        for _ in range(STREAM_SECONDS * 10):
            yield b"line\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(lines())


async def late(request: Request) -> PlainTextResponse:
    """Answer a moment later, so that requests meet."""
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("late")


app = Starlette(
    routes=[
        Route("/", ok, methods=["GET", "POST"]),
        Route("/ready", ready),
        Route("/stream", stream),
        Route("/late", late),
        WebSocketRoute("/echo", echo),
    ],
    lifespan=lifespan,
)
app.add_middleware(RateLimitMiddleware)
