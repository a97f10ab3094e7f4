"""Other limiters on the same app, each as its own documentation mounts it, counting in Redis by API key.

They are imported only where they are served: the project does not depend on them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATH = "/v1/predictions"
Endpoint = Callable[[Request], Any]
GCRA = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local at = tonumber(redis.call('GET', KEYS[1]) or now)
if at < now then at = now end
if at - now > tonumber(ARGV[2]) then return {0, at - now} end
redis.call('SET', KEYS[1], string.format('%.0f', at + ARGV[1]), 'PX', 60000)
return {1, at - now}
"""
"""A token bucket in a script, as it is written by hand: what comes too early for its rate is refused."""
GCRA_ARGUMENTS = (60, 60_000_000)
"""Microseconds between two requests, and those that a caller may be ahead: no benchmark is refused."""


def api_key_of(scope: Scope) -> str:
    """Return the API key of a request, as every limiter here tells callers apart."""
    return next((value.decode() for name, value in scope["headers"] if name == b"x-api-key"), "nobody")


class _Hit:
    """Asks a limiter before each request; it answers with headers, or with None to refuse."""

    def __init__(self, app: ASGIApp, ask: Callable[[str], Any]) -> None:
        self.app = app
        self.ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = await self.ask(api_key_of(scope))
        if headers is None:
            await PlainTextResponse("Too many requests", 429)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def limits(redis_url: str, limit: int, endpoint: Endpoint) -> ASGIApp:
    """`limits` with its exact window, and the second call that its figures take."""
    storage = import_module("limits.aio.storage").RedisStorage(f"async+{redis_url}", implementation="redispy")
    limiter = import_module("limits.aio.strategies").MovingWindowRateLimiter(storage)
    rate = import_module("limits").parse(f"{limit}/minute")

    async def ask(api_key: str) -> dict[str, str] | None:
        if not await limiter.hit(rate, api_key):
            return None
        reset, remaining = await limiter.get_window_stats(rate, api_key)
        return {"x-ratelimit-remaining": str(remaining), "x-ratelimit-reset": str(int(reset))}

    return _Hit(Starlette(routes=[Route(PATH, endpoint)]), ask)


def throttled(redis_url: str, limit: int, endpoint: Endpoint) -> ASGIApp:
    """`throttled-py`; its sliding window is an estimate by two fixed ones."""
    package = import_module("throttled.asyncio")
    throttle = package.Throttled(
        using=package.RateLimiterType.SLIDING_WINDOW.value,
        quota=package.rate_limiter.per_min(limit),
        store=package.RedisStore(server=redis_url),
    )

    async def ask(api_key: str) -> dict[str, str] | None:
        result = await throttle.limit(api_key)
        return None if result.limited else {"x-ratelimit-remaining": str(result.state.remaining)}

    return _Hit(Starlette(routes=[Route(PATH, endpoint)]), ask)


def asgi_ratelimit(redis_url: str, limit: int, endpoint: Endpoint) -> ASGIApp:
    """`asgi-ratelimit`, which counts in fixed windows and sends no figures."""
    backend = import_module("ratelimit.backends.redis").RedisBackend(
        import_module("redis.asyncio").StrictRedis.from_url(redis_url)
    )

    async def authenticate(scope: Scope) -> tuple[str, str]:
        return api_key_of(scope), "default"

    middleware = import_module("ratelimit").RateLimitMiddleware
    rule = import_module("ratelimit").Rule(minute=limit)
    app: ASGIApp = middleware(
        Starlette(routes=[Route(PATH, endpoint)]), authenticate, backend, {"^/": [rule]}
    )
    return app


def slowapi(redis_url: str, limit: int, endpoint: Endpoint) -> ASGIApp:
    """`slowapi` with its exact window; its Redis client blocks the event loop."""
    package = import_module("slowapi")
    app = Starlette(routes=[Route(PATH, endpoint)])
    app.state.limiter = package.Limiter(
        key_func=lambda request: request.headers.get("x-api-key", "nobody"),
        default_limits=[f"{limit}/minute"],
        storage_uri=redis_url,
        strategy="moving-window",
        headers_enabled=True,
    )
    app.add_middleware(import_module("slowapi.middleware").SlowAPIMiddleware)
    return app


def bare_fastapi(*_: object) -> ASGIApp:
    """FastAPI without a limiter: what `fastapi_limiter` is measured against."""
    return _fastapi([])


def fastapi_limiter(redis_url: str, limit: int, _: Endpoint) -> ASGIApp:
    """`fastapi-limiter` on the Redis bucket of `pyrate-limiter`, one bucket for all callers."""
    pyrate = import_module("pyrate_limiter")
    client = import_module("redis.asyncio").Redis.from_url(redis_url)
    rate = pyrate.Rate(limit, pyrate.Duration.MINUTE)
    dependency: Any = None

    async def limited(request: Request, response: Any) -> None:
        nonlocal dependency
        if dependency is None:
            bucket = await pyrate.RedisBucket.init([rate], client, "benchmark")
            dependency = import_module("fastapi_limiter.depends").RateLimiter(limiter=pyrate.Limiter(bucket))
        await dependency(request, response)

    limited.__annotations__["response"] = import_module("starlette.responses").Response
    return _fastapi([import_module("fastapi").Depends(limited)])


def _fastapi(dependencies: list[Any]) -> ASGIApp:
    app: Any = import_module("fastapi").FastAPI()

    async def predict() -> dict[str, str]:
        return {"output": "ok"}

    app.get(PATH, dependencies=dependencies)(predict)
    served: ASGIApp = app
    return served


PEERS: dict[str, Callable[[str, int, Endpoint], ASGIApp]] = {
    "limits": limits,
    "slowapi": slowapi,
    "throttled-py": throttled,
    "asgi-ratelimit": asgi_ratelimit,
    "fastapi": bare_fastapi,
    "fastapi-limiter": fastapi_limiter,
}
