"""The middleware in this process: on a clock that a test moves, asked by httpx or by bare ASGI messages."""

import tomllib
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import Backend, BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.outcome import Outcome

START = 1_705_312_740
"""Time at which a clock starts, in seconds since 1970."""

ALL_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class FakeClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = START * SECOND

    def __call__(self) -> int:
        """Microseconds since 1970."""
        return self.now

    def set(self, seconds: float) -> None:
        """Make it so many seconds since the start."""
        self.now = START * SECOND + round(seconds * SECOND)


class Down(MemoryBackend):
    """A backend that cannot be reached for charges."""

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Fail as a backend does that is away."""
        raise BackendError("nobody answers")

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Fail as a backend does that is away."""
        raise BackendError("nobody answers")

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Fail as a backend does that is away."""
        raise BackendError("nobody answers")


class Counting(MemoryBackend):
    """Counts how often it is asked."""

    asked = 0

    def decide(self, charge: Charge, lease_id: bytes | None, price: int) -> Outcome:
        """Decide, and count that."""
        self.asked += 1
        return super().decide(charge, lease_id, price)


def settings_of(text: str) -> Settings:
    """Return the settings of a file with this text."""
    return Settings(**tomllib.loads(text))


def limiter_of(text: str, clock: FakeClock, backend: Backend | None = None) -> Limiter:
    """A limiter on the memory backend with this clock, unless another backend is handed in."""
    return Limiter(settings_of(text), backend=backend or MemoryBackend(clock=clock))


def client_of(app: ASGIApp, *, address: str = "192.0.2.1", **headers: str) -> httpx.AsyncClient:
    """A client of an app in this process, calling from an address; `x_api_key="a"` is a header it sends."""
    transport = httpx.ASGITransport(app, client=(address, 50_000))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.AsyncClient(transport=transport, base_url="http://app", headers=named)


async def ok(request: Request) -> PlainTextResponse:
    """Answer `ok`."""
    return PlainTextResponse("ok")


def ok_app() -> Starlette:
    """An app that answers `ok` on every path and common method."""
    return Starlette(routes=[Route("/{rest:path}", ok, methods=ALL_METHODS)])


def limited(
    text: str, clock: FakeClock, app: ASGIApp | None = None, *, backend: Backend | None = None, **hooks: Any
) -> RateLimitMiddleware:
    """An app, `ok_app` if none is given, behind the middleware with these settings."""
    return RateLimitMiddleware(app or ok_app(), limiter=limiter_of(text, clock, backend), **hooks)


def limited_client(
    text: str,
    clock: FakeClock,
    app: ASGIApp | None = None,
    *,
    backend: Backend | None = None,
    address: str = "192.0.2.1",
    **headers: str,
) -> httpx.AsyncClient:
    """A client with `headers`, of an app behind the middleware with these settings."""
    return client_of(limited(text, clock, app, backend=backend), address=address, **headers)


async def statuses(client: httpx.AsyncClient, count: int, path: str = "/", method: str = "GET") -> list[int]:
    """Send so many requests, one after the other; return their statuses."""
    return [(await client.request(method, path)).status_code for _ in range(count)]


def shown(response: httpx.Response) -> tuple[str | None, ...]:
    """Limit, remaining and reset, as the `X-RateLimit` headers say."""
    return tuple(response.headers.get(f"x-ratelimit-{name}") for name in ("limit", "remaining", "reset"))


def scope_of(api_key: bytes, path: str = "/") -> Scope:
    """The scope of a request with this key."""
    headers = [(b"x-api-key", api_key)]
    client = ("192.0.2.1", 1)
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b""}
    return {**scope, "headers": headers, "client": client}


async def start_of(app: ASGIApp, api_key: bytes, path: str = "/") -> Message:
    """Send a request; how the response to it starts."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope_of(api_key, path), receive, send)
    return sent[0]
