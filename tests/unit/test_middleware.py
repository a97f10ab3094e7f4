"""Responses of the app pass through untouched, with the headers of its limit added once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_mw import Lease, RateLimitMiddleware
from tests.support.asgi import (
    Down,
    FakeClock,
    client_of,
    limited,
    limited_client,
    ok,
    ok_app,
    settings_of,
    shown,
    statuses,
)

NINE = 'plans.anonymous.requests = ["9/minute"]'


async def raw(app: ASGIApp, scope: Scope) -> list[Message]:
    """Run an app; return its messages to a client that stays."""
    sent: list[Message] = []
    requests: list[Message] = [{"type": "http.request"}]

    async def receive() -> Message:
        return requests.pop() if requests else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def http_scope(path: str = "/", **more: Any) -> Scope:
    """The least that a server says about a request."""
    return {"type": "http", "method": "GET", "path": path, "headers": [], "client": ("192.0.2.1", 1)} | more


@pytest.mark.parametrize("status", [200, 204, 301, 400, 404, 422, 500, 503])
async def test_headers_on_every_status(status: int) -> None:
    """Every response carries the headers, whatever its status."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=status)(scope, receive, send)

    async with limited_client(NINE, FakeClock(), app) as client:
        response = await client.get("/")
    assert (response.status_code, shown(response)[:2]) == (status, ("9", "8"))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("OPTIONS", "/", 405),
        ("DELETE", "/", 405),
        ("BREW", "/", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/sub/", 200),
        ("GET", "/sub/nowhere", 404),
        ("GET", "/refused", 403),
        ("GET", "/moved", 307),
        ("GET", "/sub", 307),
    ],
)
async def test_nothing_is_free(method: str, path: str, status: int) -> None:
    """Every method and path counts, those that the app doesn't know too."""

    async def refuse(request: Request) -> Response:
        raise HTTPException(403)

    async def moved(request: Request) -> Response:
        return RedirectResponse("/")

    sub = Starlette(routes=[Route("/", ok)])
    routes = [Route("/", ok), Route("/refused", refuse), Route("/moved", moved), Mount("/sub", sub)]
    async with limited_client(NINE, FakeClock(), Starlette(routes=routes)) as client:
        response = await client.request(method, path)
    assert (response.status_code, shown(response)[:2]) == (status, ("9", "8"))


async def test_added_to_a_starlette_app() -> None:
    """`add_middleware` is all it takes, and the app's exceptions keep their handlers."""

    async def teapot(request: Request) -> Response:
        raise LookupError("no tea")

    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 418)

    app = Starlette(routes=[Route("/", teapot)], exception_handlers={LookupError: handle})
    app.add_middleware(RateLimitMiddleware, settings=settings_of(NINE))
    async with client_of(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.text, shown(response)[:2]) == (418, "no tea", ("9", "8"))


async def test_exceptions_propagate_unchanged() -> None:
    """An exception of the app reaches the server as the very object that was raised, and was counted."""
    error = RuntimeError("broken")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    served = limited('plans.anonymous = {requests = ["2/minute"], concurrent = 1}', FakeClock(), app)
    async with client_of(served) as client:
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                await client.get("/")
            assert caught.value is error
        assert (await client.get("/")).status_code == 429


async def test_server_error_page_stays_starlettes_own() -> None:
    """Starlette answers for unhandled errors outside of all middleware, and still does."""

    async def broken(request: Request) -> Response:
        raise RuntimeError("broken")

    app = Starlette(routes=[Route("/", broken)])
    app.add_middleware(RateLimitMiddleware, settings=settings_of(NINE))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")


async def test_streams_pass_chunk_by_chunk() -> None:
    """A stream starts once, with the headers, and each chunk is the app's own message."""

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (b"one", b"", b"three"):
            yield chunk

    async def stream(request: Request) -> Response:
        return StreamingResponse(chunks(), headers={"x-own": "1"})

    app = Starlette(routes=[Route("/", stream)])
    plain = await raw(app, http_scope())
    sent = await raw(limited(NINE, FakeClock(), app), http_scope())
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[1:] == plain[1:]
    names = [name for name, _ in sent[0]["headers"]]
    assert names == [b"x-own", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"]


async def test_chunks_are_not_held_back() -> None:
    """A chunk leaves when the app sends it, not when the response is complete."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"last"})

    arrived: list[Message] = []

    async def send(message: Message) -> None:
        arrived.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    served = asyncio.create_task(limited(NINE, FakeClock(), app)(http_scope(), receive, send))
    async with asyncio.timeout(5):
        while len(arrived) < 2:
            await asyncio.sleep(0)
    assert arrived[1]["body"] == b"first"
    go_on.set()
    await served


async def test_other_messages_pass_unchanged() -> None:
    """A message that is not a start of a response passes as the very object that the app sent."""
    messages: list[Message] = [
        {"type": "http.response.early_hint", "links": [b"</a.css>"]},
        {"type": "http.response.start", "status": 200, "trailers": True},
        {"type": "http.response.body", "body": b"x"},
        {"type": "http.response.trailers", "headers": [(b"a", b"b")]},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    sent = await raw(limited(NINE, FakeClock(), app), http_scope())
    assert [a is b for a, b in zip(sent, messages, strict=True)] == [True, False, True, True]
    assert sent[1]["trailers"] is True
    assert "headers" not in messages[1]


async def test_own_headers_of_the_app_stand() -> None:
    """An app that sets one of our headers itself keeps its answer as it is; the request still counts."""

    async def own(request: Request) -> Response:
        return Response(headers={"X-RateLimit-Limit": "7"})

    app = Starlette(routes=[Route("/own", own), Route("/", ok)])
    async with limited_client(NINE, FakeClock(), app) as client:
        assert shown(await client.get("/own")) == ("7", None, None)
        assert shown(await client.get("/"))[:2] == ("9", "7")


async def test_background_tasks_run() -> None:
    """Background tasks run after the response, and their slot is held until they have."""
    done: list[int] = []

    async def work(request: Request) -> Response:
        tasks = BackgroundTasks()
        tasks.add_task(done.append, 1)
        tasks.add_task(done.append, 2)
        return Response(background=tasks)

    app = Starlette(routes=[Route("/", work)])
    async with limited_client("plans.anonymous.concurrent = 1", FakeClock(), app) as client:
        assert await statuses(client, 2) == [200, 200]
    assert done == [1, 2, 1, 2]


async def test_mounted_on_a_sub_app() -> None:
    """Mounted inside an app, rules are matched as the sub-app's own router matches: without the mount."""
    text = NINE + '\nroutes = [{path = "/health", exempt = true}]'
    app = Starlette(routes=[Route("/health", ok), Mount("/api", limited(text, FakeClock()))])
    async with client_of(app) as client:
        assert shown(await client.get("/health")) == (None, None, None)
        assert shown(await client.get("/api/health")) == (None, None, None)
        assert shown(await client.get("/api/v1"))[:2] == ("9", "8")


async def test_root_path_is_left_out() -> None:
    """Behind a proxy that strips a prefix, or names one, a rule means the path below it."""
    served = limited('routes = [{path = "/health", exempt = true}]', FakeClock())
    for path, free in [("/api/health", True), ("/health", True), ("/apihealth", False)]:
        sent = await raw(served, http_scope(path, root_path="/api"))
        assert (len(sent[0]["headers"]) == 2) is free, path


async def test_other_scopes_pass() -> None:
    """A kind of connection that is neither HTTP nor a WebSocket is the app's own business."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope = {"type": "telnet"}
    await raw(limited(NINE, FakeClock(), app), scope)
    assert seen == [{"type": "telnet"}]


async def test_body_is_the_apps_to_read() -> None:
    """The request's body reaches the app whole; nothing of it is read before."""

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    async with limited_client(NINE, FakeClock(), app) as client:
        assert (await client.post("/", content=b"x" * 100_000)).content == b"x" * 100_000


async def test_settings_by_environment_and_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Without settings the file that `RATELIMIT_SETTINGS` names counts, else the built-in defaults."""
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    async with client_of(RateLimitMiddleware(ok_app()), x_api_key="a") as client:
        assert shown(await client.get("/"))[:2] == ("60", "59")
    async with client_of(RateLimitMiddleware(ok_app())) as client:
        assert shown(await client.get("/"))[:2] == ("20", "19")
    file = tmp_path / "ratelimit.toml"
    file.write_text(NINE)
    monkeypatch.setenv("RATELIMIT_SETTINGS", str(file))
    async with client_of(RateLimitMiddleware(ok_app())) as client:
        assert shown(await client.get("/"))[:2] == ("9", "8")


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("", None),
        ('routes = [{path = "/", exempt = true}]', None),
        ('backend.on_failure = "allow"', Down()),
        ('shadow = true\nplans.anonymous.requests = ["1/minute"]', None),
        ('plans.anonymous.spending = {daily = "1"}\nroutes = [{path = "/", price = "0.1"}]', None),
    ],
    ids=["plain", "exempt", "allow", "shadow", "priced"],
)
async def test_lease_is_always_there(text: str, backend: Down | None) -> None:
    """A handler finds its lease whatever was decided, and what it calls on it does no harm."""

    async def handler(request: Request) -> Response:
        lease: Lease = request.state.ratelimit
        await lease.settle("0.05")
        token = await lease.detach(ttl=5)
        await lease.release()
        return PlainTextResponse(f"{lease.allowed} {bool(token)}")

    app = Starlette(routes=[Route("/", handler)])
    async with limited_client(text, FakeClock(), app, backend=backend) as client:
        assert [(await client.get("/")).text for _ in range(2)] == ["True True"] * 2


async def test_a_stream_to_nobody_lets_others_have_a_turn() -> None:
    """A server that never waits for its client sends on and on; other requests are served all the same."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    other = asyncio.create_task(count())
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    await limited(NINE, FakeClock(), stream)(scope, asyncio.Future[Message], send)
    other.cancel()
    assert turns > 30
    assert len(sent) == 1_001
