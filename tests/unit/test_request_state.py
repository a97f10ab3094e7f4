"""Each request has a state of its own, and nothing that a server or another middleware owns is changed."""

import asyncio
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from asgi_lifespan import LifespanManager
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.settings import findings
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, limited
from tests.support.processes import HOST, ServerProcess
from tests.support.state_app import make_app

if TYPE_CHECKING:
    from ratelimit_mw import RateLimitMiddleware


class Hypercorn(ServerProcess):
    """`hypercorn module:app`, which speaks HTTP/2 in the clear to clients that know it does."""

    own_process_group = True

    def __init__(self, app: str, folder: Path) -> None:
        super().__init__("hypercorn", folder)
        self._app = app

    def command(self) -> list[str]:
        """One worker on a port of its own."""
        return [sys.executable, "-m", "hypercorn", "--bind", f"{HOST}:{self.port}", self._app]

    def environment(self) -> dict[str, str]:
        """With the project on the path."""
        return {**super().environment(), "PYTHONPATH": str(ROOT)}

    def answers(self) -> bool:
        """Whether it has said that it serves."""
        return f"Running on http://{HOST}:{self.port}" in self.log


@pytest.fixture
def hypercorn(tmp_path: Path) -> Iterator[Hypercorn]:
    """Hypercorn with the app of `state_app`."""
    server = Hypercorn("tests.support.state_app:app", tmp_path)
    server.start()
    yield server
    server.stop()


async def settle_together(client: httpx.AsyncClient) -> None:
    """Two callers settle at the same time; each of them has spent its own amount and nothing else."""
    prices = {"alice": "9.00", "bob": "0.25"}
    answers = await asyncio.gather(
        *[client.get(f"/settle/{price}", headers={"x-api-key": key}) for key, price in prices.items()]
    )
    assert [answer.text for answer in answers] == ["hello", "hello"]
    for key, price in prices.items():
        usage = (await client.get("/limits", headers={"x-api-key": key})).json()
        assert usage["spending"][0]["spent"] == price


async def test_requests_of_one_http2_connection_have_their_own_lease(hypercorn: Hypercorn) -> None:
    """Hypercorn hands one state to all requests of a connection; each still settles its own lease."""
    url = f"http://{HOST}:{hypercorn.port}"
    async with httpx.AsyncClient(base_url=url, http1=False, http2=True, timeout=30) as client:
        await settle_together(client)
    assert "mounted-twice" not in hypercorn.log


async def test_requests_under_asgi_lifespan_have_their_own_lease(caplog: pytest.LogCaptureFixture) -> None:
    """`LifespanManager` hands one state to all requests of a test; each still settles its own lease."""
    findings._said.clear()
    async with LifespanManager(make_app()) as manager:
        transport = httpx.ASGITransport(manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            await settle_together(client)
    assert "mounted-twice" not in caplog.text


def nobody(_: Scope) -> None:
    """Know no caller: the request goes the way of those with a hook."""


HOOKS: list[dict[str, Any]] = [{}, {"identify": nobody}]


class Exchange:
    """One connection to an app, with the objects that were handed over and come back."""

    def __init__(self, kind: str, state: Any) -> None:
        self.scope: Scope = {
            "type": kind,
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [(b"host", b"app")],
            "client": ("192.0.2.1", 1),
            "extensions": {"websocket.http.response": {}},
            "state": state,
        }
        self.sent: list[Message] = []

    async def run(self, app: ASGIApp) -> None:
        """Serve the connection."""

        async def receive() -> Message:
            return {"type": "http.request" if self.scope["type"] == "http" else "websocket.connect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        await app(self.scope, receive, send)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_what_others_own_is_not_written_into(kind: str, hooks: dict[str, Any]) -> None:
    """State, headers and messages stay as they were handed over; the app sees the server's state.

    The scope gets another state and is the server's else: middleware around this one reads the route in it.
    """
    seen: list[Scope] = []
    start = "websocket.accept" if kind == "websocket" else "http.response.start"
    message = {"type": start, "status": 200, "headers": [(b"x-own", b"1")]}
    before = copy.deepcopy(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        scope["state"]["user"] = "ann"
        await send(message)

    exchange = Exchange(kind, {"pool": "p"})
    state, scope = exchange.scope["state"], copy.deepcopy(exchange.scope)
    await exchange.run(limited("", FakeClock(), app, **hooks))
    assert state == scope["state"]
    assert {**exchange.scope, "state": state} == scope
    assert seen[0] is exchange.scope
    assert message == before
    assert len(exchange.sent[0]["headers"]) > 1
    assert seen[0]["state"]["pool"] == "p"
    assert isinstance(seen[0]["state"]["ratelimit"], Lease)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("state", [None, MappingProxyType({"pool": "p"})])
async def test_any_state_of_a_server_serves(state: Any, hooks: dict[str, Any]) -> None:
    """A state that is missing, or can't be written to, is not a reason for a handler to have no lease."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    exchange = Exchange("http", state)
    await exchange.run(limited("", FakeClock(), app, **hooks))
    assert dict(seen[0]["state"]) == {**(state or {}), "ratelimit": seen[0]["state"]["ratelimit"]}


@pytest.mark.parametrize("hooks", HOOKS)
async def test_a_request_that_is_sent_through_again_is_not_mounted_twice(
    hooks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """An outer middleware that tries again with the same scope is charged again, and nothing untrue said."""
    findings._said.clear()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    served = limited("", FakeClock(), app, **hooks)
    exchange = Exchange("http", {})
    for _ in range(2):
        await exchange.run(served)
    assert "mounted-twice" not in caplog.text


@pytest.mark.parametrize("hooks", HOOKS)
async def test_middleware_around_itself_is_still_told(
    hooks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A request that meets the middleware twice on its way down is told of, as before."""
    clock = FakeClock()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    inner: RateLimitMiddleware = limited("", clock, app, **hooks)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    findings._said.clear()
    await Exchange("http", {}).run(limited("", clock, between, **hooks))
    assert "mounted-twice" in caplog.text


async def test_a_refusal_is_sent_with_headers_of_its_own() -> None:
    """Headers that an outer middleware adds to one refusal are not sent with the next."""
    served = limited('plans.anonymous.requests = ["1/minute"]', FakeClock())
    sizes = []
    for _ in range(4):
        exchange = Exchange("http", {})
        await exchange.run(served)
        sizes.append(len(exchange.sent[0]["headers"]))
        exchange.sent[0]["headers"].append((b"access-control-allow-origin", b"https://alice.example"))
    assert sizes[1] == sizes[2] == sizes[3]
