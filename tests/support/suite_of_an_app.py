"""A suite as users write it, run by `test_suites.py` in a pytest of its own with warnings as errors.

`REDIS_URL` names a Redis. Nobody closes anything that a test framework doesn't close.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import uvloop
from asgi_lifespan import LifespanManager
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from tests.support.asgi import ok
from tests.support.served import echo
from tests.support.statuses import counted


def settings(scheme: str = "redis") -> Settings:
    """Counts in Redis, with slots, which are freed at the end of a request."""
    url = os.environ["CLUSTER_URL" if scheme == "redis+cluster" else "REDIS_URL"]
    plan = {"requests": ["100/minute"], "concurrent": 5}
    identity = {"hash_secret": "a secret of a test"}
    tables = {"backend": {"url": url, "timeout": 5}, "identity": identity, "plans": {"default": plan}}
    return Settings.model_validate(tables)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Nothing to start."""
    yield


def app(scheme: str = "redis") -> Starlette:
    """An app with the middleware added."""
    made = Starlette(routes=[Route("/", ok), WebSocketRoute("/echo", echo)], lifespan=lifespan)
    made.add_middleware(RateLimitMiddleware, settings=settings(scheme))
    return made


def client(made: Starlette) -> httpx.AsyncClient:
    """A client of an app in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://app")


KEY = {"X-API-Key": "a"}


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_client_without_lifespan(scheme: str) -> None:
    """Each request has an event loop of its own, which nobody tells the app of."""
    tested = TestClient(app(scheme))
    for _ in range(3):
        assert tested.get("/", headers=KEY).status_code == 200


def test_client_with_lifespan() -> None:
    """One event loop for all, which is started and stopped in good order."""
    with TestClient(app()) as tested:
        assert tested.get("/", headers=KEY).status_code == 200


def test_websocket_without_lifespan() -> None:
    """A WebSocket in an event loop of its own, which nobody tells the app of, is served."""
    with TestClient(app()).websocket_connect("/echo", headers=KEY) as socket:
        socket.send_text("x")
        assert socket.receive_text() == "x"


@pytest.mark.asyncio
async def test_with_pytest_asyncio() -> None:
    """The event loop is the test's own."""
    async with client(app()) as tested:
        assert (await tested.get("/", headers=KEY)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_with_anyio() -> None:
    """A request under anyio's plugin is served."""
    async with client(app()) as tested:
        assert (await tested.get("/", headers=KEY)).status_code == 200


@pytest.mark.asyncio
async def test_with_asgi_lifespan() -> None:
    """The lifespan is run by hand."""
    async with LifespanManager(app()) as manager:
        transport = httpx.ASGITransport(manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as tested:
            assert (await tested.get("/", headers=KEY)).status_code == 200


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_limiter_that_nobody_closes(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A limiter used by a short-lived event loop, more than once."""
    limiter = Limiter(settings())

    async def ask() -> bool:
        async with await limiter.acquire(api_key="a") as lease:
            return lease.allowed

    for _ in range(3):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            assert runner.run(ask())


def test_server_that_is_away() -> None:
    """A loop ends at once also where it is still trying to connect, and owes what was admitted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    tables = {"backend": {"url": f"redis://127.0.0.1:{port}"}, "identity": {"hash_secret": "a secret"}}
    limiter = Limiter(Settings.model_validate(tables))

    async def ask() -> bool:
        async with await limiter.acquire(api_key="a") as lease:
            return lease.allowed

    start = time.monotonic()
    assert asyncio.run(ask())
    assert time.monotonic() - start < 30


def test_keys_set_live_by_a_script() -> None:
    """The client for single commands goes with its event loop, too."""
    limiter = Limiter(settings())
    asyncio.run(limiter.engine.live.set_keys({"hmac-sha256:" + "0" * 64: KeyEntry("default")}))


@pytest.mark.asyncio
async def test_slots_are_free_after_it_all() -> None:
    """Releases that the requests of ended event loops owed have arrived."""
    async with Limiter(settings()) as limiter:
        policy = limiter.engine.policies.match(
            limiter.engine.identity_of(api_key="a", address="testclient"), "GET", "/"
        )
        decision = await limiter.engine.peek(policy)
        assert counted(decision.limits[1]) == 0
