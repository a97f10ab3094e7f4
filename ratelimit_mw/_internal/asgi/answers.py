"""Answers that the middleware sends in place of the app."""

from starlette.types import Receive, Scope, Send

from ratelimit_mw._internal.asgi.hook_errors import POLICY_VIOLATION
from ratelimit_mw._internal.responses.refusals import Response

FORBIDDEN = 403
TRY_AGAIN_LATER = 1013
"""Code of a WebSocket that is closed because of a limit."""


async def respond(response: Response, scope: Scope, receive: Receive | None, send: Send) -> None:
    """Answer instead of the app. A WebSocket gets the same, or a rejected handshake where it cannot.

    `receive` is None where the app has begun to read what the client sends.
    """
    start, body = "http.response.start", "http.response.body"
    if scope["type"] == "websocket":
        if receive is not None:
            await receive()  # the handshake, which a server wants to be asked for first
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            code = POLICY_VIOLATION if response.status == FORBIDDEN else TRY_AGAIN_LATER
            await send({"type": "websocket.close", "code": code, "reason": ""})
            return
        start, body = f"websocket.{start}", f"websocket.{body}"
    await send({"type": start, "status": response.status, "headers": response.headers})
    await send({"type": body, "body": response.body})
