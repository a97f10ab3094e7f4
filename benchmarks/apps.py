"""Small app, the same behind each limiter, served by uvicorn: `BENCH_VARIANT` names the limiter."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import peers
from benchmarks.load import PATH
from ratelimit_mw import Identity, KeyEntry, Limiter, RateLimitMiddleware, Settings

LIMIT = int(os.environ.get("BENCH_LIMIT", "1000000"))
PERIODS = os.environ.get("BENCH_PERIODS", "minute hour").split()
"""Periods of the two windows."""
ROUTES = int(os.environ.get("BENCH_ROUTES", "1"))
EXHAUSTED = 10
"""Requests an hour of a key that is refused."""
ESTIMATE = 100
USED = {"tokens": 60}
"""Tokens that a request is charged, and those that it settles."""
TIMEOUT = float(os.environ.get("BENCH_TIMEOUT", "0.1"))
"""Seconds that a request may wait for Redis."""
REDIS_URL = os.environ.get("BENCH_REDIS", "redis://127.0.0.1:6379/0")


async def predict(_: Request) -> JSONResponse:
    """Answer as an API that does nothing."""
    return JSONResponse({"output": "ok"})


async def predict_and_settle(request: Request) -> JSONResponse:
    """Answer as `predict`, and settle fewer tokens than the route's estimate."""
    await request.state.ratelimit.settle(units=USED)
    return JSONResponse({"output": "ok"})


def bare() -> ASGIApp:
    """The app without a limiter: the measure of all others."""
    return Starlette(routes=[Route(PATH, predict)])


async def ask(app: ASGIApp, caller: int, send: Send) -> None:
    """One request of a caller of the load, in this process."""
    headers = [(b"host", b"bench"), (b"x-api-key", b"key-%d" % caller)]
    scope = {"type": "http", "method": "GET", "path": PATH, "query_string": b"", "headers": headers}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app({**scope, "client": ("127.0.0.1", 1)}, receive, send)


def answer_of(app: ASGIApp, requests: int = 1) -> list[Message]:
    """The messages in which an app answers the last of so many equal requests of one caller."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def ask_all() -> None:
        for _ in range(requests):
            messages.clear()
            await ask(app, 0, send)

    with ThreadPoolExecutor(1) as thread:  # the server's own loop may run in this one
        thread.submit(lambda: asyncio.run(ask_all())).result()
    return messages


class Unframed:
    """One answer to everything, by no framework: what is left is the server's own cost."""

    def __init__(self, answer: Sequence[Message]) -> None:
        self._start, self._body = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; there is nothing to start or stop."""
        if scope["type"] == "http":
            await send(self._start)
            await send(self._body)


class Headers:
    """Headers as constant as these on each response and no decision: the least that a limiter costs."""

    def __init__(self, app: ASGIApp, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.app = app
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and add them."""

        def with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            return send(message)

        await self.app(scope, receive, with_headers)


class OneCommand:
    """One redis-py command before each request: the least that a limiter built on it can cost."""

    def __init__(self, make: Callable[[Redis], Callable[[str], Awaitable[object]]]) -> None:
        """`make` gets a client, and returns what asks for the caller with an API key."""
        self.app = bare()
        self.ask = make(Redis.from_url(REDIS_URL))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and go on."""
        if scope["type"] == "http":
            await self.ask(peers.api_key_of(scope))
        await self.app(scope, receive, send)


def gcra(client: Redis) -> Callable[[str], Awaitable[object]]:
    """Ask a token bucket of the caller in a script."""
    script = client.register_script(peers.GCRA)
    return lambda caller: script(keys=[f"g{caller}"], args=peers.GCRA_ARGUMENTS)


class Traced:
    """A span around each request, as the middleware makes it that traces an app."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - of these variants alone

        self.app = app
        self.tracer = TracerProvider().get_tracer("benchmark")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on within a span."""
        with self.tracer.start_as_current_span("request"):
            await self.app(scope, receive, send)


async def chat(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept a WebSocket and close it: the least that an app can do with one."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000, "reason": ""})


async def knock(app: ASGIApp, caller: int) -> None:
    """Open one WebSocket of a caller of the load, in this process."""
    headers = [(b"host", b"bench"), (b"x-api-key", b"key-%d" % caller)]

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(_: Message) -> None:
        """Nobody reads the answer."""

    await app(
        {"type": "websocket", "path": PATH, "headers": headers, "client": ("127.0.0.1", 1)}, receive, send
    )


def settings_of(
    url: str,
    *rates: str,
    slots: int | None = None,
    prefetch: bool = False,
    price: str | None = None,
    tokens: int | None = None,
    application: dict[str, Any] | None = None,
) -> Settings:
    """One plan for all callers, on this backend; with a budget for a price, and a limit of tokens."""
    plan = {
        "requests": rates,
        "concurrent": None if slots is None else {"limit": slots},
        "prefetch": prefetch,
        "spending": None if price is None else {"daily": "1000000"},
        "units": None if tokens is None else {"tokens": ["1000000000/hour"]},
    }
    route = {"path": PATH, "price": price or None, "units": None if tokens is None else {"tokens": tokens}}
    estimated = {name: value for name, value in route.items() if value is not None}
    return Settings.model_validate(
        {
            "backend": {"url": url, "timeout": TIMEOUT},
            "identity": {"hash_secret": "of the benchmark"},
            "application": application or {},
            "plans": {"default": {name: value for name, value in plan.items() if value is not None}},
            # Rules that never match, in front: a request has to find its way past them.
            "routes": [{"path": f"/v1/models/m{number}/{{id}}"} for number in range(ROUTES - 1)]
            + ([estimated] if len(estimated) > 1 else []),
        }
    )


def ours(settings: Callable[[], Settings], **hooks: Any) -> ASGIApp:
    """The app behind this middleware."""
    return RateLimitMiddleware(bare(), settings(), **hooks)


def traced(settings: Callable[[], Settings]) -> ASGIApp:
    """The app behind this middleware, which tells spans how it decided, within one that makes them."""
    from ratelimit_mw.otel import instrument  # noqa: PLC0415 - of this variant alone

    limiter = Limiter(settings())
    instrument(limiter)
    return Traced(RateLimitMiddleware(bare(), limiter=limiter))


def identify(scope: Scope) -> Identity | None:
    """Name a caller by the key, as an app does that knows its own users."""
    return next((Identity(key.decode(), "default") for name, key in scope["headers"] if name == KEY), None)


async def resolve(_: str) -> KeyEntry:
    """Find any key in the app's own database."""
    return KeyEntry("default")


KEY = b"x-api-key"
SHORT, LONG = f"{LIMIT}/{PERIODS[0]}", f"{LIMIT * 60}/{PERIODS[1]}"
SETTINGS: dict[str, Callable[[], Settings]] = {
    "memory": partial(settings_of, "memory://", SHORT, LONG, slots=1000),
    "redis-1": partial(settings_of, REDIS_URL, SHORT),
    "redis-2": partial(settings_of, REDIS_URL, SHORT, LONG, slots=1000),
    "prefetch": partial(settings_of, REDIS_URL, SHORT, LONG, prefetch=True),
    "shared": partial(settings_of, REDIS_URL, SHORT, application={"requests": [SHORT]}),
    "shared-ahead": partial(
        settings_of, REDIS_URL, SHORT, application={"requests": [SHORT], "prefetch": True}
    ),
    "refuse": partial(settings_of, REDIS_URL, f"{EXHAUSTED}/hour"),
    "priced": partial(settings_of, REDIS_URL, SHORT, LONG, slots=1000, price="0.000001"),
    "units": partial(settings_of, REDIS_URL, SHORT, LONG, slots=1000, tokens=ESTIMATE),
}
"""Of this middleware in each of its variants."""
_TWO, _BUDGET = SETTINGS["redis-2"], partial(settings_of, REDIS_URL, SHORT, LONG, slots=1000, price="")
HOOKED: dict[str, Callable[[], ASGIApp]] = {
    "on_decision": partial(ours, _TWO, on_decision=lambda _: None),
    "identify": partial(ours, _TWO, identify=identify),
    "resolve": partial(ours, _TWO, resolve=resolve),
    "price": partial(ours, _BUDGET, price=lambda *_: "0.000001"),
    "traced": partial(traced, _TWO),
    "websocket": lambda: RateLimitMiddleware(chat, _TWO()),
    "cluster": partial(ours, _TWO),
}
"""Two windows and a slot in Redis with one thing more; `cluster` is for a `BENCH_REDIS` that is one."""
YARDSTICKS = {"traced": "bare traced", "websocket": "bare websocket", "refuse": "refusal"}
"""Variants that are not measured against the bare app, each with the one that is its measure."""


def same_headers() -> Headers:
    """The bare app with the headers that this middleware adds, from one answer of its own."""
    start, _ = answer_of(ours(SETTINGS["memory"]))
    return Headers(bare(), [header for header in start["headers"] if header[0].startswith(b"x-ratelimit-")])


def same_refusal() -> Unframed:
    """The refusal of an exhausted key, decided once and for all."""
    exhausted = ours(partial(settings_of, "memory://", f"{EXHAUSTED}/hour"))
    return Unframed(answer_of(exhausted, EXHAUSTED + 1))


VARIANTS: dict[str, Callable[[], ASGIApp]] = {
    "bare": bare,
    "bare traced": lambda: Traced(bare()),
    "bare websocket": lambda: chat,
    "server": lambda: Unframed(answer_of(bare())),
    "headers": same_headers,
    "refusal": same_refusal,
    "get": lambda: OneCommand(lambda client: lambda _: client.get("benchmark")),
    "incr": lambda: OneCommand(lambda client: client.incr),
    "gcra": lambda: OneCommand(gcra),
    **{name: partial(ours, settings) for name, settings in SETTINGS.items()},
    "units": lambda: RateLimitMiddleware(
        Starlette(routes=[Route(PATH, predict_and_settle)]), SETTINGS["units"]()
    ),
    **HOOKED,
    **{name: partial(build, REDIS_URL, LIMIT, predict) for name, build in peers.PEERS.items()},
}


def app() -> ASGIApp:
    """The app that uvicorn is to serve; use it with `--factory`."""
    return VARIANTS[os.environ["BENCH_VARIANT"]]()
