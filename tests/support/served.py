"""Apps for uvicorn processes, each behind the middleware with what `RATELIMIT_SETTINGS` names."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from ratelimit_mw import RateLimitMiddleware


async def ok(request: Request) -> PlainTextResponse:
    """Answer `ok`."""
    return PlainTextResponse("ok")


async def echo(websocket: WebSocket) -> None:
    """Accept, and send back what comes until the client leaves."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


async def shy(websocket: WebSocket) -> None:
    """Close before accepting."""
    await websocket.close()


app = Starlette(
    routes=[
        Route("/", ok, methods=["GET", "POST"]),
        WebSocketRoute("/echo", echo),
        WebSocketRoute("/shy", shy),
    ]
)
app.add_middleware(RateLimitMiddleware)


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that serves HTTP only, and says so to anything else."""
    if scope["type"] != "http":
        raise RuntimeError(f"cannot serve {scope['type']}")
    await PlainTextResponse("ok")(scope, receive, send)


limited_bare = RateLimitMiddleware(bare)
