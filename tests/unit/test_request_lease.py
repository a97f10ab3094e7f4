"""`get_lease`: the typed way from a request to its lease."""

from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from starlette.types import Message

from ratelimit_mw import Lease, RateLimitMiddleware, get_lease


def app_of() -> FastAPI:
    """Make an app whose handlers ask for their lease."""
    app = FastAPI()

    @app.get("/request")
    async def by_request(request: Request) -> bool:
        return get_lease(request) is request.state.ratelimit and get_lease(request).allowed

    @app.get("/dependency")
    async def by_dependency(lease: Annotated[Lease, Depends(get_lease)]) -> int:
        return lease.decision.cost

    @app.websocket("/socket")
    async def by_socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_json(get_lease(socket).allowed)
        await socket.close()

    return app


async def test_a_request_and_a_dependency_lead_to_the_lease() -> None:
    """A request and a dependency of FastAPI both give the lease of this request."""
    app = app_of()
    app.add_middleware(RateLimitMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/request")).json() is True
        assert (await client.get("/dependency")).json() == 1


async def test_a_web_socket_leads_to_the_lease() -> None:
    """A WebSocket gives the lease of its handshake."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/socket", "headers": [], "client": ("192.0.2.1", 1)}
    await RateLimitMiddleware(app_of())(scope | {"query_string": b""}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert sent[1]["text"] == "true"


async def test_without_the_middleware_the_error_says_so() -> None:
    """The error names the missing middleware if none let the request through."""
    transport = httpx.ASGITransport(app_of())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(LookupError, match="RateLimitMiddleware is not mounted"):
            await client.get("/request")
