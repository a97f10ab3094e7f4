"""Exceptions of hooks: answered as the app answers them, and hooks that exempt routes never ask."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.exceptions import WebSocketException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from ratelimit_mw import Identity, Limiter, RateLimited, RateLimitMiddleware
from tests.support.asgi import client_of, ok, ok_app, settings_of

SETTINGS = """
operations = { usage_path = "/limits" }
plans.default = { requests = ["9/minute"], spending = { daily = "9.00" }, units = { tokens = ["99/minute"] } }
routes = [{ path = "/health", exempt = true }, { path = "/{rest:path}", price = "0.01" }]
"""
HOOKS = ["identify", "price", "estimate", "resolve"]


class CachedRefusal(Exception):  # noqa: N818 - as an app may call it
    """An exception of the app's own, for which it has a handler."""


def raising(error: Exception) -> Callable[..., Any]:
    """A hook that raises."""

    async def hook(*_: object) -> Any:
        raise error

    return hook


def starlette_app() -> Starlette:
    """An app of Starlette's, with its defaults."""
    return Starlette(routes=[Route("/{rest:path}", ok)])


def fastapi_app() -> FastAPI:
    """An app of FastAPI's, with its defaults."""
    app = FastAPI()
    app.add_api_route("/{rest:path}", ok, response_model=None)
    return app


def app_with_handlers() -> Starlette:
    """An app with handlers of its own, which ask for the app."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        request.app.state.met = True
        return JSONResponse({"own": getattr(error, "detail", "refused")}, getattr(error, "status_code", 403))

    return Starlette(
        routes=[Route("/{rest:path}", ok)],
        exception_handlers={StarletteHTTPException: on_http, CachedRefusal: on_http},
    )


async def bare_app(scope: Scope, receive: Any, send: Any) -> None:
    """An app of nobody's."""
    await PlainTextResponse("ok")(scope, receive, send)


ERROR = HTTPException(401, "who are you?", {"www-authenticate": "Bearer"})
APPS: list[Any] = [starlette_app, fastapi_app, app_with_handlers, lambda: bare_app]
BODIES = ["who are you?", '{"detail":"who are you?"}', '{"own":"who are you?"}', "who are you?"]


def limited(make: Callable[[], Any], hooks: dict[str, Any], *, outside: bool) -> ASGIApp:
    """An app behind the middleware, added to it or wrapped around it."""
    app = make()
    settings = settings_of(SETTINGS)
    if outside or app is bare_app:
        return RateLimitMiddleware(app, settings=settings, **hooks)
    app.add_middleware(RateLimitMiddleware, settings=settings, **hooks)
    result: ASGIApp = app
    return result


@pytest.mark.parametrize(("make", "body"), list(zip(APPS, BODIES, strict=True)))
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", HOOKS)
async def test_an_http_exception_is_answered_as_the_app_would(
    name: str, make: Callable[[], Any], body: str, *, outside: bool
) -> None:
    """Status, headers and body are those of the app's own handlers, or Starlette's where it has none."""
    app = limited(make, {name: raising(ERROR)}, outside=outside)
    async with client_of(app, x_api_key="a") as client:
        for _ in range(2):
            response = await client.get("/x")
            assert (response.status_code, response.text) == (401, body)
            assert outside or make is app_with_handlers or response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", ["identify", "price"])
async def test_an_exception_of_the_apps_own_goes_to_its_handler(name: str, *, outside: bool) -> None:
    """An app's own exception has the handler that it has inside the app."""
    app = limited(app_with_handlers, {name: raising(CachedRefusal())}, outside=outside)
    async with client_of(app, x_api_key="a") as client:
        response = await client.get("/x")
    assert (response.status_code, response.json()) == (403, {"own": "refused"})


@pytest.mark.parametrize("name", ["identify", "price"])
async def test_what_has_no_handler_reaches_the_server(name: str) -> None:
    """An error that nobody handles stays one, and is not let through unlimited."""
    app = limited(app_with_handlers, {name: raising(PermissionError("no database"))}, outside=True)
    async with client_of(app, x_api_key="a") as client:
        with pytest.raises(PermissionError, match="no database"):
            await client.get("/x")


async def test_a_sync_hook_may_raise_too() -> None:
    """A hook that is a plain function may raise, too, and is answered alike."""

    def identify(_: Scope) -> Identity | None:
        raise HTTPException(403, "no")

    async with client_of(RateLimitMiddleware(fastapi_app(), identify=identify)) as client:
        assert (await client.get("/")).json() == {"detail": "no"}


async def test_the_usage_path_is_answered_the_same() -> None:
    """A caller who may not call may not ask for usage, and is told so in the same way."""
    app = limited(fastapi_app, {"identify": raising(ERROR)}, outside=True)
    async with client_of(app) as client:
        response = await client.get("/limits")
    assert (response.status_code, response.json()) == (401, {"detail": "who are you?"})


@pytest.mark.parametrize("name", HOOKS)
async def test_exempt_routes_ask_no_hook(name: str) -> None:
    """An exempt route asks no hook: nobody has to be known, and a health check works without it."""
    app = limited(fastapi_app, {name: raising(ERROR)}, outside=True)
    async with client_of(app, x_api_key="a") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/x")).status_code == 401


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("make", [fastapi_app, lambda: bare_app])
async def test_a_hook_may_refuse_by_a_limit(name: str, make: Callable[[], Any]) -> None:
    """`RateLimited` that a hook raises is answered as the middleware's own refusals are."""
    limiter = Limiter(settings_of('plans.anonymous.requests = ["1/minute"]'))

    async def hook(*_: object) -> None:
        (await limiter.acquire(address="192.0.2.7")).raise_for_refusal()

    async with client_of(limited(make, {name: hook}, outside=True), x_api_key="a") as client:
        assert (await client.get("/first")).status_code == 200
        async with client_of(limited(make, {name: hook}, outside=True), x_api_key="b") as other:
            response = await other.get("/x")
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert 0 < int(response.headers["retry-after"]) <= 60
    assert response.headers["cache-control"] == "no-store"


async def test_an_app_s_own_handler_answers_a_hook_s_refusal() -> None:
    """An app's handler for `RateLimited`, or its `refusal=` hook, says what a refused hook is answered."""
    limiter = Limiter(settings_of('plans.anonymous.requests = ["1/minute"]'))
    await limiter.acquire(address="192.0.2.7")

    async def hook(_: Scope) -> None:
        (await limiter.acquire(address="192.0.2.7")).raise_for_refusal()

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RateLimited)
        return JSONResponse({"own": error.decision.limit}, 429)

    own = Starlette(routes=[Route("/{rest:path}", ok)], exception_handlers={RateLimited: answer})
    async with client_of(RateLimitMiddleware(own, identify=hook)) as client:
        assert (await client.get("/x")).json() == {"own": 1}
    body = PlainTextResponse("mine")
    hooked = RateLimitMiddleware(starlette_app(), identify=hook, refusal=lambda *_: body)
    async with client_of(hooked) as client:
        response = await client.get("/x")
    assert (response.status_code, response.text) == (429, "mine")
    assert "retry-after" in response.headers


async def test_what_a_look_up_raises_is_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the app answers itself costs its database no question for each request, nor for ever."""
    asked: list[str] = []

    async def resolve(key: str) -> None:
        asked.append(key)
        raise HTTPException(402, "unpaid")

    app = limited(fastapi_app, {"resolve": resolve}, outside=True)
    async with client_of(app, x_api_key="a") as client:
        for _ in range(3):
            assert (await client.get("/x")).status_code == 402
        assert len(asked) == 1
        monkeypatch.setattr("ratelimit_mw._internal.live.resolve.time", Later())
        assert (await client.get("/x")).status_code == 402
        assert len(asked) == 2


class Later:
    """A clock that is ten seconds ahead."""

    @staticmethod
    def monotonic() -> float:
        """Seconds since whenever."""
        return asyncio.get_running_loop().time() + 10


async def test_by_hand_the_hooks_answer_is_raised() -> None:
    """Acquiring for an API key raises the answer that the hook raised about it."""
    limiter = Limiter(settings_of(SETTINGS), resolve=raising(HTTPException(402)))
    with pytest.raises(StarletteHTTPException):
        await limiter.acquire(api_key="a")


@pytest.mark.parametrize(
    ("extensions", "error", "expected"),
    [
        ({"websocket.http.response": {}}, ERROR, ("websocket.http.response.start", 401)),
        ({}, ERROR, ("websocket.close", 1008)),
        ({}, WebSocketException(4001, "no"), ("websocket.close", 4001)),
    ],
)
async def test_a_handshake_is_answered_too(
    extensions: dict[str, Any], error: Exception, expected: tuple[str, int]
) -> None:
    """A WebSocket gets the answer where its server can send one, else its handshake is rejected."""
    app = RateLimitMiddleware(ok_app(), settings=settings_of(SETTINGS), identify=raising(error))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/", "headers": [], "extensions": extensions, "client": None}
    await app(scope, receive, send)
    assert (sent[0]["type"], sent[0].get("status", sent[0].get("code"))) == expected


async def test_a_request_that_a_hook_refused_holds_nothing() -> None:
    """Neither a slot nor a unit is taken by what a hook answers."""
    text = SETTINGS.replace('requests = ["9/minute"]', 'requests = ["9/minute"], concurrent = 1')
    app = RateLimitMiddleware(fastapi_app(), settings=settings_of(text), price=raising(ERROR))
    async with client_of(app, x_api_key="a") as client:
        assert [(await client.get("/x")).status_code for _ in range(12)] == [401] * 12
        usage = await client.get("/limits")
    assert isinstance(usage, httpx.Response)
    assert {each["used"] for each in usage.json()["requests"]} == {0}
