"""The app that tests of slots run under uvicorn. Each path is one way in which a request can end.

Settings come from the file that `RATELIMIT_SETTINGS` names, the ledger's file from `LEDGER`, and the gate,
a file that opens the handlers behind it once it exists, from `GATE`.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratelimit_mw import RateLimitMiddleware
from tests.support.slots import Ledger

LEDGER = Ledger(Path(os.environ.get("LEDGER", os.devnull)))
GATE = Path(os.environ.get("GATE", os.devnull))


class Abandon(BaseException):
    """Exception that no `except Exception` catches."""


@contextmanager
def inside() -> Iterator[str]:
    """Be inside the handler, in the ledger's eyes."""
    name = f"{os.getpid()}-{os.urandom(4).hex()}"
    LEDGER.enter(name)
    try:
        yield name
    finally:
        LEDGER.leave(name)


class LedgeredStream(StreamingResponse):
    """A stream that is inside for as long as the app is in it: its generator may be collected later."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with inside():
            await super().__call__(scope, receive, send)


async def work(request: Request) -> Response:
    """Work for so many seconds."""
    with inside():
        await asyncio.sleep(float(request.path_params["seconds"]))
    return PlainTextResponse("done")


async def gate(request: Request) -> Response:
    """Wait until the gate opens for this round."""
    with inside():
        while not GATE.with_suffix(f".{request.path_params['round']}").exists():
            await asyncio.sleep(0.01)
    return PlainTextResponse("done")


async def stubborn(request: Request) -> Response:
    """Work for so many seconds, whatever is cancelled."""
    with inside():
        end = time.monotonic() + float(request.path_params["seconds"])
        while time.monotonic() < end:
            try:
                await asyncio.sleep(end - time.monotonic())
            except asyncio.CancelledError:
                continue
    return PlainTextResponse("done")


async def stall(request: Request) -> Response:
    """Keep the whole event loop from turning."""
    with inside():
        time.sleep(float(request.path_params["seconds"]))  # noqa: ASYNC251 - the fault to show
    return PlainTextResponse(str(request.state.ratelimit.is_lost))


async def stream(request: Request) -> Response:
    """Send so many chunks of so many bytes, each so many seconds after the one before."""
    number, size, pause = (float(request.query_params[name]) for name in ("number", "size", "pause"))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(int(number)):
            yield b"data: " + b"x" * int(size) + b"\n\n"
            await asyncio.sleep(pause)

    return LedgeredStream(chunks(), media_type="text/event-stream")


async def spin(request: Request) -> Response:
    """Send chunks for ever from a generator that awaits nothing itself."""

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000

    return LedgeredStream(chunks())


async def background(request: Request) -> Response:
    """Answer at once, and work on for so many seconds."""

    async def after() -> None:
        with inside():
            await asyncio.sleep(float(request.path_params["seconds"]))

    return PlainTextResponse("accepted", background=BackgroundTask(after))


async def fail(request: Request) -> Response:
    """Raise: before the response, in the middle of it, in the background, or what is not an Exception."""
    when = request.path_params["when"]

    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        raise RuntimeError("in the middle")

    async def after() -> None:
        raise RuntimeError("in the background")

    if when == "before":
        raise RuntimeError("before the response")
    if when == "base":
        raise Abandon
    if when == "cancelled":
        raise asyncio.CancelledError
    if when == "background":
        return PlainTextResponse("ok", background=BackgroundTask(after))
    return StreamingResponse(chunks())


async def detach(request: Request) -> Response:
    """Hand the slot over to a job."""
    token = await request.state.ratelimit.detach(ttl=float(request.path_params["ttl"]))
    LEDGER.detach()
    return JSONResponse({"token": token}, status_code=202)


async def die(request: Request) -> Response:
    """Detach, and be killed before anybody is told."""
    await request.state.ratelimit.detach(ttl=1)
    LEDGER.detach()
    os._exit(1)


async def who(request: Request) -> Response:
    """Answer with the id of this process; the route takes no slot."""
    return PlainTextResponse(str(os.getpid()))


async def socket(websocket: WebSocket) -> None:
    """Send back what comes, until it is `bye`; `boom` raises."""
    await websocket.accept()
    with inside():
        try:
            while (text := await websocket.receive_text()) != "bye":
                if text == "boom":
                    raise RuntimeError("boom")
                await websocket.send_text(text)
            await websocket.close()
        except WebSocketDisconnect:
            pass


app = Starlette(
    routes=[
        Route("/run/{seconds:float}", work),
        Route("/gate/{round:int}", gate),
        Route("/stubborn/{seconds:float}", stubborn),
        Route("/stall/{seconds:float}", stall),
        Route("/stream", stream),
        Route("/spin", spin),
        Route("/background/{seconds:float}", background),
        Route("/fail/{when}", fail),
        Route("/detach/{ttl:float}", detach),
        Route("/die", die),
        Route("/who", who),
        WebSocketRoute("/socket", socket),
    ]
)
app.add_middleware(RateLimitMiddleware)
