"""Every server runs an app with all its limits: rates, slots, streams, WebSockets, start and end."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import websockets

from ratelimit_mw import Limiter, Settings
from tests.support.asgi_servers import KINDS, AsgiServer, Kind
from tests.support.servers import StoreServer
from tests.support.statuses import counted

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
url = "{url}"
timeout = 5
[identity]
hash_secret = "a secret of a test"
[plans.default]
requests = ["9/minute"]
concurrent = {{ limit = 2, lease = 120 }}
[[routes]]
path = "/ready"
exempt = true
[[routes]]
path = "/"
slot = false
"""
PATIENCE = 60.0
"""Seconds after which something that should happen soon has not."""


def _slow_if_known(name: str) -> Any:
    """A server's further ways to be run are for the drills; one of each server is for every run."""
    return pytest.param(name, marks=[pytest.mark.slow] if ", " in name and name != "gunicorn, asgi" else [])


@pytest.fixture(params=map(_slow_if_known, KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each server in turn."""
    return KINDS[request.param]


@pytest.fixture
def settings_file(tmp_path: Path, redis_server: StoreServer) -> Path:
    """Settings with counts in Redis, which all workers share, and slots that outlast a test unless freed."""
    file = tmp_path / "ratelimit.toml"
    file.write_text(SETTINGS.format(url=redis_server.url), encoding="utf-8")
    return file


@pytest.fixture
def served(kind: Kind, settings_file: Path, tmp_path: Path) -> Iterator[AsgiServer]:
    """An app under the server."""
    server = AsgiServer(kind, tmp_path, {"RATELIMIT_SETTINGS": str(settings_file)})
    try:
        server.start()
        yield server
    finally:
        server.stop()


def client_of(server: AsgiServer, api_key: str) -> httpx.AsyncClient:
    """A client with an API key."""
    return httpx.AsyncClient(base_url=server.url, headers={"X-API-Key": api_key}, timeout=PATIENCE)


async def until(check: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; it may be a coroutine function."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        found = check()
        if await found if asyncio.iscoroutine(found) else found:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not {what} within {PATIENCE:g} s")


@pytest.mark.once
async def test_a_server_runs_every_limit(kind: Kind, served: AsgiServer, settings_file: Path) -> None:
    """Rates, slots of streams and of WebSockets, lifespan and shutdown are as under any other server."""
    await check_lifespan(kind, served)
    await check_rates(served)
    await check_streams(served)
    await check_sockets(kind, served)
    await check_shutdown(kind, served, settings_file)


async def check_lifespan(kind: Kind, served: AsgiServer) -> None:
    """The app has been told of its start exactly where the server tells of it."""
    async with client_of(served, "start") as client:
        assert (await client.get("/ready")).json()["lifespan"] is kind.lifespan


async def check_rates(served: AsgiServer) -> None:
    """Nine requests of a minute are served, whichever worker they meet, and the tenth is refused."""
    async with client_of(served, "rates") as client:
        responses = await asyncio.gather(*[client.post("/", content=b"x" * 10_000) for _ in range(12)])
        assert sorted(response.status_code for response in responses) == [200] * 9 + [429] * 3
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
        assert int(refused.headers["retry-after"]) > 0
        assert {response.headers["x-ratelimit-limit"] for response in responses} == {"9"}


async def check_streams(served: AsgiServer) -> None:
    """A stream holds its slot until its client leaves."""
    async with client_of(served, "streams") as client:
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await begin_stream(client, stack)
            refused = await client.get("/late?seconds=0")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "CONCURRENT_LIMIT_EXCEEDED"

        async def is_free() -> bool:
            return (await client.get("/late?seconds=0")).status_code == 200

        await until(is_free, "freed after the streams")


async def begin_stream(client: httpx.AsyncClient, stack: AsyncExitStack) -> None:
    """Begin a stream, which goes on until the stack is closed."""
    streamed = await stack.enter_async_context(client.stream("GET", "/stream"))
    assert streamed.status_code == 200
    lines: Any = streamed.aiter_raw()
    stack.push_async_callback(lines.aclose)  # which also keeps it: the stream ends with its iterator
    assert await anext(lines) == b"line\n"


def connect(served: AsgiServer) -> websockets.connect:
    """A WebSocket to the app."""
    url = served.url.replace("http", "ws") + "/echo"
    return websockets.connect(url, additional_headers={"X-API-Key": "sockets"}, open_timeout=PATIENCE)


async def check_sockets(kind: Kind, served: AsgiServer) -> None:
    """A WebSocket is counted and holds a slot until it is closed; its handshake carries the headers."""
    async with AsyncExitStack() as stack:
        for left in ("8", "7"):
            socket: ClientConnection = await stack.enter_async_context(connect(served))
            await socket.send("x")
            assert await socket.recv() == "x"
            assert socket.response is not None
            assert socket.response.headers.get("x-ratelimit-remaining") == (
                left if kind.accept_headers else None
            )
        with pytest.raises(websockets.InvalidStatus) as refused:
            await stack.enter_async_context(connect(served))
        assert refused.value.response.status_code == (429 if kind.denial else 403)
        if kind.denial:
            assert b"CONCURRENT_LIMIT_EXCEEDED" in (refused.value.response.body or b"")

    async def is_free() -> bool:
        try:
            async with connect(served):
                return True
        except websockets.InvalidStatus:
            return False

    await until(is_free, "freed after the sockets")


async def check_shutdown(kind: Kind, served: AsgiServer, settings_file: Path) -> None:
    """A server that is told to end lets requests end and frees their slots; some cut what runs.

    The slots of what a server cuts by force are free when their lease ends.
    """
    async with AsyncExitStack() as stack:
        cut = await stack.enter_async_context(client_of(served, "cut"))
        ending = await stack.enter_async_context(client_of(served, "ending"))
        limiter = await stack.enter_async_context(Limiter(Settings.load(settings_file)))

        async def active(api_key: str) -> int:
            identity = limiter.engine.identity_of(api_key=api_key)
            decision = await limiter.engine.peek(limiter.engine.policies.match(identity, "GET", "/stream"))
            return counted(decision.limits[1])

        async def none_active() -> bool:
            return not await active("ending") and not (kind.frees_streams and await active("cut"))

        await begin_stream(cut, stack)
        late = asyncio.create_task(ending.get("/late?seconds=1.5"))
        while (await active("cut"), await active("ending")) != (1, 1):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(served.stop, signal.SIGTERM)
        if kind.ends_requests:
            assert (await late).status_code == 200
            await until(none_active, "freed after the end")
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                await late
