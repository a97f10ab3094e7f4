"""Refusals that are raised inside an app: answered by the middleware, or by a handler of the app's own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratelimit_mw import Decision, Limiter, RateLimited, RateLimitMiddleware
from tests.support.asgi import FakeClock, client_of, limited, limiter_of

PLANS = """
    plans.default.requests = ["9/minute"]
    plans.jobs.requests = ["1/minute"]
    plans.anonymous.requests = ["1/minute"]
"""


def jobs() -> Limiter:
    """A limiter of work that the app does for its callers."""
    return limiter_of(PLANS, FakeClock())


async def refused(limiter: Limiter) -> None:
    """Raise what the second request of a minute is refused with."""
    for _ in range(2):
        (await limiter.acquire(address="192.0.2.7")).raise_for_refusal()


def starlette_app(**options: Any) -> Starlette:
    """An app of Starlette's whose handler is refused."""
    limiter = jobs()

    async def handler(request: Request) -> Response:
        await refused(limiter)
        return PlainTextResponse("not reached")

    return Starlette(routes=[Route("/", handler)], **options)


def fastapi_app() -> FastAPI:
    """An app of FastAPI's, of whose dependencies one is refused."""
    limiter, app = jobs(), FastAPI()

    async def dependency() -> None:
        await refused(limiter)

    @app.get("/", dependencies=[Depends(dependency)])
    async def handler() -> str:
        return "not reached"

    return app


def added_app() -> Starlette:
    """An app that the middleware is to be added to, beside one of the app's own."""

    async def other(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    app = starlette_app()
    app.add_middleware(BaseHTTPMiddleware, dispatch=other)
    return app


def mounted_app() -> Starlette:
    """An app that has another one mounted, with error handling of its own, which is refused."""
    return Starlette(routes=[Mount("/", starlette_app())])


def catching_app() -> ASGIApp:
    """An app that answers all its errors itself, and raises none."""
    inner = starlette_app()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await inner.router(scope, receive, send)
        except Exception:  # noqa: BLE001 - as apps do
            await PlainTextResponse("broken", 500)(scope, receive, send)

    return app


@pytest.mark.parametrize("make", [starlette_app, fastapi_app, mounted_app, added_app, catching_app])
async def test_a_raised_refusal_is_answered_as_any_other(make: Callable[[], ASGIApp]) -> None:
    """A refusal that nobody handles is answered with the contract's 429, wherever the app lets it out."""
    async with client_of(limited(PLANS, FakeClock(), make()), x_api_key="a") as client:
        answer = await client.get("/")
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert answer.json()["error"]["details"]["policy"] == "1/minute"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("60", "60000")
    assert answer.headers["cache-control"] == "no-store"


async def test_a_raised_refusal_of_an_app_that_the_middleware_was_added_to() -> None:
    """`add_middleware` makes no difference."""
    app = added_app()
    app.add_middleware(RateLimitMiddleware, limiter=limiter_of(PLANS, FakeClock()))
    async with client_of(app, x_api_key="a") as client:
        assert (await client.get("/")).status_code == 429


@pytest.mark.parametrize("make", [starlette_app, fastapi_app, added_app])
async def test_an_app_may_answer_refusals_itself(make: Callable[[], Any]) -> None:
    """The app's own handler is handed the decision, and what it answers is sent."""
    app = make()

    def handler(request: Request, error: RateLimited) -> JSONResponse:
        assert error.decision.refusal is not None
        return JSONResponse({"slow": "down", "after": error.retry_after}, 420)

    app.add_exception_handler(RateLimited, handler)
    async with client_of(limited(PLANS, FakeClock(), app), x_api_key="a") as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()) == (420, {"slow": "down", "after": 60.0})


@pytest.mark.parametrize("make", [starlette_app, fastapi_app])
async def test_a_refusal_that_the_app_answers_itself_costs_nothing(make: Callable[[], Any]) -> None:
    """A request whose refusal the app's own handler answers with an error is given back, headers included."""
    app = make()

    async def handler(request: Request, error: RateLimited) -> JSONResponse:
        return JSONResponse({"after": error.retry_after}, 420)

    app.add_exception_handler(RateLimited, handler)
    async with client_of(limited(PLANS, FakeClock(), app), x_api_key="a") as client:
        answers = [await client.get("/") for _ in range(20)]
    assert [answer.status_code for answer in answers] == [420] * 20
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["9"] * 20


async def test_a_decision_that_is_given_back_says_what_is_left_then() -> None:
    """Units, slots and money that a request gave back are left again, and what others hold is not."""
    text = 'plans.default = { requests = ["10/minute"], concurrent = 3, spending = { daily = "1.00" } }'
    limiter = limiter_of(text, FakeClock())
    running = await limiter.acquire(api_key="a", price="0.10")
    refused = await limiter.acquire(api_key="a", price="0.20")
    refused.give_back()
    left = [each.remaining for each in refused.decision.limits]
    assert left == [each.remaining for each in running.decision.limits] == [9, 2, Decimal("0.90")]


async def test_other_errors_stay_the_apps() -> None:
    """An exception that has nothing to do with a limit is neither answered nor swallowed."""

    async def handler(request: Request) -> Response:
        raise ZeroDivisionError

    app = limited(PLANS, FakeClock(), Starlette(routes=[Route("/", handler)]))
    async with client_of(app, x_api_key="a") as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/")
    with TestClient(app, raise_server_exceptions=False) as plain:
        answer = plain.get("/")
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")


async def test_a_response_that_has_begun_ends_as_with_any_exception() -> None:
    """A refusal in the middle of a stream cannot become a 429: the exception reaches the server."""
    limiter = jobs()

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        await refused(limiter)

    async def handler(request: Request) -> Response:
        return StreamingResponse(body())

    app = limited(PLANS, FakeClock(), Starlette(routes=[Route("/", handler)]))
    async with client_of(app, x_api_key="a") as client:
        with pytest.raises(RateLimited):
            await client.get("/")


def test_raise_for_refusal_raises_for_refusals_alone() -> None:
    """An admission, and a refusal that shadow mode lets through, raise nothing."""

    async def run(text: str) -> None:
        await refused(limiter_of(PLANS + text, FakeClock()))

    asyncio.run(run("shadow = true"))
    with pytest.raises(RateLimited, match=r"refused by 1/minute; retry after 60\.000 s"):
        asyncio.run(run(""))


def websocket_app(*, accepts: bool) -> Starlette:
    """An app whose WebSocket meets a refusal before or after it is accepted."""
    limiter = jobs()

    async def handler(websocket: WebSocket) -> None:
        if accepts:
            await websocket.accept()
        await refused(limiter)

    return Starlette(routes=[WebSocketRoute("/", handler)])


def test_a_websocket_that_is_refused_before_it_is_accepted_is_rejected() -> None:
    """The handshake is answered with the 429, where the server can send one."""
    with TestClient(limited(PLANS, FakeClock(), websocket_app(accepts=False))) as client:
        with pytest.raises(WebSocketDenialResponse) as rejected, client.websocket_connect("/"):
            pass
        assert rejected.value.status_code == 429


def test_an_accepted_websocket_is_closed() -> None:
    """A refusal on an open WebSocket closes it with "try again later"."""
    with (
        TestClient(limited(PLANS, FakeClock(), websocket_app(accepts=True))) as client,
        client.websocket_connect("/") as websocket,
        pytest.raises(WebSocketDisconnect) as closed,
    ):
        websocket.receive_text()
    assert closed.value.code == 1013


# the body of refusals ---------------------------------------------------------------------------


async def answer_with(hook: Any, *, make: Callable[[], ASGIApp] | None = None) -> Any:
    """Return a refusal of a middleware whose `refusal=` is this hook."""
    app = limited(PLANS, FakeClock(), None if make is None else make(), refusal=hook)
    async with client_of(app) as client:
        if make is None:
            assert (await client.get("/")).status_code == 200
        return await client.get("/")


@pytest.mark.parametrize("make", [None, starlette_app])
@pytest.mark.parametrize("is_async", [False, True])
async def test_refusal_replaces_the_body(make: Callable[[], ASGIApp] | None, *, is_async: bool) -> None:
    """A `refusal=` hook replaces the body of any refusal; status and headers stay."""

    def own(scope: Scope, decision: Decision) -> Response:
        assert decision.refusal is not None
        text = f"<h1>{scope['path']} {decision.refusal.reason}</h1>"
        return Response(text, 200, {"x-own": "1", "retry-after": "never"}, "text/html")

    async def waits(scope: Scope, decision: Decision) -> Response:
        return own(scope, decision)

    answer = await answer_with(waits if is_async else own, make=make)
    assert (answer.status_code, answer.text) == (429, "<h1>/ rate</h1>")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert (answer.headers["content-length"], answer.headers["x-own"]) == ("15", "1")
    assert answer.headers.get_list("retry-after") == ["60"]


async def test_refusal_may_leave_the_body() -> None:
    """None stands for the standard body."""
    assert (await answer_with(lambda *_: None)).json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"


@pytest.mark.parametrize(
    "hook", [lambda *_: 1 / 0, lambda *_: {"slow": "down"}, lambda *_: StreamingResponse(())]
)
async def test_a_refusal_hook_that_fails_changes_nothing(hook: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The standard body is sent if the hook raises or returns what has no body, and the log says why."""
    answer = await answer_with(hook)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "RATE_LIMIT_EXCEEDED")
    assert "refusal=" in caplog.text


def test_a_refusal_is_no_http_exception() -> None:
    """Handlers of HTTPException, which know nothing of limits, are not handed refusals."""
    assert not issubclass(RateLimited, HTTPException)
