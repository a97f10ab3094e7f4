"""Start and stop with the server, whether or not the app speaks the lifespan protocol."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from tests.conftest import StartApp
from tests.support.asgi import FakeClock, client_of, limited, ok, ok_app


class Noted(MemoryBackend):
    """Notes when it is opened and closed."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    async def open(self) -> None:
        """Note it."""
        self._calls.append("open")

    async def close(self) -> None:
        """Note it."""
        self._calls.append("close")


class Server:
    """A server's side of the lifespan protocol, step by step."""

    def __init__(self, app: ASGIApp) -> None:
        self.sent: list[str] = []
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[str] = asyncio.Queue()
        self._app = app
        self.state: dict[str, Any] = {}

    async def _send(self, message: Message) -> None:
        if not message["type"].startswith("lifespan."):
            raise RuntimeError(f"{message['type']} is no message of this protocol")
        self.sent.append(message["type"])
        self._answers.put_nowait(message["type"])

    async def _receive(self) -> Message:
        return await self._events.get()

    async def _serve(self, scope: Scope) -> None:
        await self._app(scope, self._receive, self._send)

    async def run(self) -> None:
        """Start the app and stop it again."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self.state}
        task = asyncio.create_task(self._serve(scope))
        for event in ("lifespan.startup", "lifespan.shutdown"):
            self._events.put_nowait({"type": event})
            async with asyncio.timeout(5):
                await self._answers.get()
        await task


async def asserts_http(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that expects nothing but HTTP."""
    if scope["type"] != "http":
        raise AssertionError(scope["type"])
    await PlainTextResponse("ok")(scope, receive, send)


async def returns_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that leaves what it doesn't know alone."""
    if scope["type"] == "http":
        await PlainTextResponse("ok")(scope, receive, send)


async def answers_anything(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that never looks at what it is asked."""
    await PlainTextResponse("ok")(scope, receive, send)


@pytest.mark.parametrize("app", [asserts_http, returns_at_once, answers_anything, ok_app()])
async def test_opened_and_closed_around_any_app(app: ASGIApp) -> None:
    """The backend is opened at the start and closed at the end, though the app knows no lifespan."""
    calls: list[str] = []
    server = Server(RateLimitMiddleware(app, limiter=Limiter(backend=Noted(calls))))
    await server.run()
    assert calls[0] == "open"
    assert set(calls[1:]) == {"close"}
    assert server.sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_what_an_app_raises_at_once_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An app that ends before it asks how it starts is served; its exception can be found in the log."""
    with caplog.at_level(logging.DEBUG, "ratelimit_mw"):
        await Server(RateLimitMiddleware(asserts_http, limiter=Limiter())).run()
    (record,) = [
        each for each in caplog.records if "raised before it took the start-up event" in each.message
    ]
    assert record.exc_info is not None
    assert record.exc_info[0] is AssertionError


async def test_open_before_the_app_starts_and_closed_after_it_ends() -> None:
    """In its own start-up and shutdown an app finds the limiter open; what it ends there is given back."""
    calls: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        calls.append("app starts")
        yield {"own": "state"}
        calls.append("app ends")

    app = Starlette(routes=[Route("/", ok)], lifespan=lifespan)
    server = Server(RateLimitMiddleware(app, limiter=Limiter(backend=Noted(calls))))
    await server.run()
    assert calls[:2] == ["open", "app starts"]
    assert calls[-2:] == ["app ends", "close"]
    assert server.state == {"own": "state"}


async def test_failing_start_up_of_the_app_stays_a_failure() -> None:
    """An app that fails to start fails as it would alone."""

    async def fail() -> None:
        raise RuntimeError("no database")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await fail()
        yield

    served = limited("", FakeClock(), Starlette(lifespan=lifespan))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(RuntimeError, match="no database"):
        await served({"type": "lifespan", "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]


async def test_shutdown_waits_for_requests() -> None:
    """A request that ends just now has its slot given back before the backend is closed."""
    calls: list[str] = []
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await go_on.wait()
            calls.append("request ends")
            await PlainTextResponse("ok")(scope, receive, send)

    served = RateLimitMiddleware(app, limiter=Limiter(backend=Noted(calls)))
    async with client_of(served) as client:
        request = asyncio.create_task(client.get("/"))
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        await Server(served).run()
        assert (await request).status_code == 200
    assert calls.index("request ends") < calls.index("close")


async def test_limits_hold_without_lifespan() -> None:
    """Requests are limited also if no lifespan events come."""
    async with client_of(limited('plans.anonymous.requests = ["1/minute"]', FakeClock())) as client:
        assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("arguments", [(), ("--lifespan", "off")])
def test_uvicorn_serves_an_app_without_lifespan(start_app: StartApp, arguments: tuple[str, ...]) -> None:
    """Under uvicorn an app that serves HTTP only starts, is limited, and stops in good order."""
    server = start_app("tests.support.served:limited_bare", *arguments)
    assert httpx.get(server.url).headers["x-ratelimit-remaining"] == "19"
    server.stop()
    assert "Traceback" not in server.log
    assert "Finished server process" in server.log
