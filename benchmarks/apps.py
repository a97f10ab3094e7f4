"""The same small app behind each limiter, served by uvicorn: `BENCH_VARIANT` names which."""

import os
from collections.abc import Awaitable, Callable
from functools import partial

from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import peers
from ratelimit_mw import RateLimitMiddleware, Settings

LIMIT = int(os.environ.get("BENCH_LIMIT", "1000000"))
ROUTES = int(os.environ.get("BENCH_ROUTES", "1"))
REDIS_URL = os.environ.get("BENCH_REDIS", "redis://127.0.0.1:6379/0")


async def predict(_: Request) -> JSONResponse:
    """What an API does when it does nothing."""
    return JSONResponse({"output": "ok"})


def bare() -> ASGIApp:
    """The app without a limiter: the measure of all others."""
    return Starlette(routes=[Route("/v1/predictions", predict)])


class Unframed:
    """The same answer by no framework: what is left is the server's own cost, which no limiter can save."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; there is nothing to start or stop."""
        if scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"content-length", b"15")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"output":"ok"}'})


class Headers:
    """Three headers on each response and no decision: the least that any limiter costs."""

    OURS = ((b"x-ratelimit-limit", b"1000000"), (b"x-ratelimit-remaining", b"999999"))
    RESET = (b"x-ratelimit-reset", b"1795325697")

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and add them."""

        def with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.OURS, self.RESET]
            return send(message)

        await self.app(scope, receive, with_headers)


class OneGet:
    """One redis-py command before each request: the least that a limiter built on it can cost."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.client = Redis.from_url(REDIS_URL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and go on."""
        if scope["type"] == "http":
            await self.client.get("benchmark")
        await self.app(scope, receive, send)


def ours(url: str, *rates: str, slots: int | None = None, prefetch: bool = False) -> ASGIApp:
    """The app behind this middleware."""
    plan = {
        "requests": rates,
        "concurrent": None if slots is None else {"limit": slots},
        "prefetch": prefetch,
    }
    settings = Settings.model_validate(
        {
            "backend": {"url": url},
            "identity": {"hash_secret": "of the benchmark"},
            "plans": {"default": {name: value for name, value in plan.items() if value is not None}},
            # Rules that never match, in front: a request has to find its way past them.
            "routes": [{"path": f"/v1/models/m{number}/{{id}}"} for number in range(ROUTES - 1)],
        }
    )
    return RateLimitMiddleware(bare(), settings)


MINUTE, HOUR = f"{LIMIT}/minute", f"{LIMIT * 60}/hour"
VARIANTS: dict[str, Callable[[], ASGIApp]] = {
    "bare": bare,
    "server": Unframed,
    "headers": lambda: Headers(bare()),
    "get": lambda: OneGet(bare()),
    "memory": lambda: ours("memory://", MINUTE, HOUR, slots=1000),
    "redis-1": lambda: ours(REDIS_URL, MINUTE),
    "redis-2": lambda: ours(REDIS_URL, MINUTE, HOUR, slots=1000),
    "prefetch": lambda: ours(REDIS_URL, MINUTE, HOUR, prefetch=True),
    "refuse": lambda: ours(REDIS_URL, "10/hour"),
    **{name: partial(build, REDIS_URL, LIMIT, predict) for name, build in peers.PEERS.items()},
}


def app() -> ASGIApp:
    """The app that uvicorn is to serve; use it with `--factory`."""
    return VARIANTS[os.environ["BENCH_VARIANT"]]()
