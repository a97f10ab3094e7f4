"""Testing of an app by its own authors: counts that begin at nothing, and no limits at all."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Scope

from ratelimit_mw import Identity, Limiter, RateLimitMiddleware, Settings, SettingsError, limited
from ratelimit_mw.testing import disabled, fresh
from tests.support.asgi import client_of, ok, settings_of
from tests.support.served import echo

TEXT = """
operations.usage_path = "/limits"
application = { requests = ["50/minute"], concurrent = 3 }
identity.per_address = ["40/minute"]
plans.anonymous = { requests = ["3/minute"], concurrent = 2 }
plans.default = { requests = ["3/minute"], spending = { daily = "1.00" }, units = { tokens = ["9/minute"] } }
keys = [{ key = "own", plan = "default", requests = ["2/minute"], concurrent = 1 }]
routes = [{ path = "/paid", price = "0.50", units = { tokens = 3 }, total = ["2/minute"] }]
"""


async def settled(request: Request) -> PlainTextResponse:
    """Do all that a handler may do with its lease."""
    lease = request.state.ratelimit
    await lease.settle("0.10", units={"tokens": 1})
    await lease.detach(ttl=5)
    await lease.release()
    return PlainTextResponse("ok")


def routes() -> list[Any]:
    """Routes of an app."""
    return [WebSocketRoute("/echo", echo), Route("/paid", settled), Route("/{rest:path}", ok)]


def added() -> Starlette:
    """An app with the middleware added, which is made at the first request."""
    app = Starlette(routes=routes(), middleware=[Middleware(GZipMiddleware)])
    app.add_middleware(RateLimitMiddleware, settings=settings_of(TEXT))
    return app


def around() -> ASGIApp:
    """An app with the middleware around it."""
    return RateLimitMiddleware(Starlette(routes=routes()), settings=settings_of(TEXT))


def wrapped() -> ASGIApp:
    """An app with the middleware between others."""
    return GZipMiddleware(around())


def fastapi() -> FastAPI:
    """An app of FastAPI's with the middleware added."""
    app = FastAPI(routes=routes())
    app.add_middleware(RateLimitMiddleware, settings=settings_of(TEXT))
    return app


def mounted() -> Starlette:
    """An app with a limited one mounted in it."""
    return Starlette(
        routes=[Mount("/inner", Router(routes=[Host("app", app=added())])), Mount("/", around())]
    )


def on_a_mount() -> Starlette:
    """An app with the middleware on a mount of it."""
    limited = Middleware(RateLimitMiddleware, settings=settings_of(TEXT))
    return Starlette(routes=[Mount("/", routes=routes(), middleware=[limited])])


APPS = [added, around, wrapped, fastapi, mounted, on_a_mount]


async def asked(app: ASGIApp, number: int = 4, path: str = "/", **headers: str) -> list[int]:
    """Statuses of so many requests."""
    async with client_of(app, **headers) as client:
        return [(await client.get(path)).status_code for _ in range(number)]


@pytest.mark.parametrize("make", APPS)
async def test_fresh_counts_begin_at_nothing(make: Callable[[], ASGIApp]) -> None:
    """Each block begins with empty counts, and leaves those of outside as they were."""
    app = make()
    for _ in range(2):
        with fresh(app) as same:
            assert same is app
            assert await asked(app) == [200, 200, 200, 429]
    assert await asked(app) == [200, 200, 200, 429]
    with fresh(app):
        assert await asked(app, 1) == [200]
    assert await asked(app, 1) == [429]


@pytest.mark.parametrize("make", APPS)
@pytest.mark.parametrize(
    "headers", [{}, {"x_api_key": "own"}, {"x_api_key": "b", "authorization": "Bearer c"}]
)
async def test_disabled_limits_nothing(make: Callable[[], ASGIApp], headers: dict[str, str]) -> None:
    """No plan, key, address, route or shared limit holds, and nothing is counted meanwhile."""
    app = make()
    with disabled(app):
        for path in ("/", "/paid"):
            assert await asked(app, 60, path, **headers) == [200] * 60
        async with client_of(app, **headers) as client:
            assert "x-ratelimit-limit" not in (await client.get("/")).headers
    if headers != {"x_api_key": "own"}:
        return
    assert await asked(app, 3, **headers) == [200, 200, 429]


async def test_limits_in_code_are_fresh_or_disabled() -> None:
    """Limits that mark endpoints begin at nothing, too, and don't hold where nothing limits the app."""

    @limited("2/minute")
    async def endpoint(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/marked", endpoint)])
    app.add_middleware(RateLimitMiddleware, settings=Settings())
    for _ in range(2):
        with fresh(app):
            assert await asked(app, 3, "/marked") == [200, 200, 429]
        with disabled(app):
            assert await asked(app, 30, "/marked") == [200] * 30
    assert await asked(app, 3, "/marked") == [200, 200, 429]


async def test_blocks_hold_under_fresh_alone() -> None:
    """Blocked callers and networks are refused under `fresh`, and are not where nothing limits the app."""
    text = TEXT + "\nplans.blocked.blocked = true\n" + 'identity.blocked_networks = ["192.0.2.0/24"]'
    app = RateLimitMiddleware(Starlette(routes=routes()), settings=settings_of(text))
    with fresh(app):
        assert await asked(app, 1) == [403]
    with disabled(app):
        assert await asked(app, 1) == [200]


async def test_disabled_asks_no_hook() -> None:
    """Nobody has to be known while nothing is limited."""

    def identify(scope: Scope) -> Identity:
        raise AssertionError("asked")

    app = RateLimitMiddleware(Starlette(routes=routes()), settings=settings_of(TEXT), identify=identify)
    with disabled(app):
        assert await asked(app, 1) == [200]
    with pytest.raises(AssertionError, match="asked"):
        await asked(app, 1)


async def test_hooks_go_on_under_fresh() -> None:
    """Every hook of the app is asked and told within a block as outside of it."""
    told: list[str] = []

    def note(name: str, answer: Any = None) -> Callable[..., Any]:
        def hook(*_: object) -> Any:
            told.append(name)
            return answer

        return hook

    async def resolve(key: str) -> None:
        told.append("resolve")

    hooks: dict[str, Any] = {name: note(name) for name in ("identify", "price", "estimate", "on_decision")}
    app = RateLimitMiddleware(
        Starlette(routes=routes()),
        settings=settings_of(TEXT),
        resolve=resolve,
        on_event=note("event"),
        **hooks,
    )
    with fresh(app):
        assert await asked(app, 1, "/paid", x_api_key="a") == [200]
        await asyncio.sleep(0)
    assert {"identify", "price", "estimate", "resolve", "on_decision"} <= set(told)


async def test_a_limiter_of_the_apps_own_is_fresh_with_it() -> None:
    """Counts of a limiter that app and middleware share are one, within a block, too."""
    limiter = Limiter(settings_of(TEXT))
    app = RateLimitMiddleware(Starlette(routes=routes()), limiter=limiter)
    for subject in (app, limiter):
        with fresh(subject):
            assert (await limiter.acquire(address="192.0.2.1")).decision.remaining == 2
            assert await asked(app, 3) == [200, 200, 429]
        with disabled(subject):
            leases = [await limiter.acquire(api_key="own") for _ in range(9)]
            assert all(lease.allowed for lease in leases)
            assert await asked(app, 9) == [200] * 9
    assert not any(limiter.stats().totals.values())


async def test_blocks_nest() -> None:
    """The inner block holds to its end, then the outer one does."""
    app = added()
    with fresh(app):
        assert await asked(app, 3) == [200] * 3
        with fresh(app):
            assert await asked(app, 3) == [200] * 3
        with disabled(app):
            assert await asked(app, 9) == [200] * 9
        assert await asked(app, 1) == [429]


@pytest.mark.parametrize("make", [added, around, fastapi])
async def test_the_innermost_block_counts(make: Callable[[], ASGIApp]) -> None:
    """`fresh` within `disabled` has the limits of the settings, and the outer block goes on after it."""
    app = make()
    headers = {"X-API-Key": "own"}
    async with client_of(app) as client:
        with disabled(app), disabled(app):
            for _ in range(2):
                with fresh(app):
                    answers = [await client.get("/", headers=headers) for _ in range(3)]
                    assert [each.status_code for each in answers] == [200, 200, 429]
                    with disabled(app):
                        assert "x-ratelimit-limit" not in (await client.get("/", headers=headers)).headers
                assert "x-ratelimit-limit" not in (await client.get("/", headers=headers)).headers


async def test_a_block_ends_with_an_exception() -> None:
    """A test that fails leaves nothing behind."""
    app = added()
    await asked(app)
    with pytest.raises(AssertionError), fresh(app):
        raise AssertionError
    assert await asked(app, 1) == [429]


def test_clients_of_starlette_with_and_without_lifespan() -> None:
    """The order of blocks and clients is free, and a WebSocket is like any request."""
    app = added()
    with TestClient(app) as client:
        for _ in range(2):
            with fresh(app):
                assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
    with fresh(app), TestClient(app) as client:
        assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
    with fresh(app):
        client = TestClient(app)
        for _ in range(3):
            with client.websocket_connect("/echo") as socket:
                socket.send_text("x")
                assert socket.receive_text() == "x"
        assert client.get("/").status_code == 429
    with disabled(app):
        assert [TestClient(app).get("/").status_code for _ in range(9)] == [200] * 9


async def test_an_app_without_the_middleware_is_said() -> None:
    """An app that nothing limits is a mistake of the test, and so are settings that don't load."""
    with pytest.raises(LookupError, match="no RateLimitMiddleware is found in"):
        fresh(Starlette(routes=routes())).__enter__()
    with pytest.raises(SettingsError, match="no-such-file"):
        disabled(RateLimitMiddleware(ok_app, settings="no-such-file.toml")).__enter__()


async def ok_app(scope: Scope, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """Answer `ok`."""
    await PlainTextResponse("ok")(scope, receive, send)


async def test_settings_apply_within_a_block_only() -> None:
    """Settings that a test puts in force go with its block."""
    limiter = Limiter(settings_of(TEXT))
    with fresh(limiter):
        limiter.apply(Settings())
        assert limiter.settings == Settings()
    assert limiter.settings == settings_of(TEXT)


async def test_blocks_leave_nothing_behind() -> None:
    """Hundreds of blocks in one event loop leave neither tasks nor memory behind."""
    app = added()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        before = set(asyncio.all_tasks())
        for _ in range(50):
            with fresh(app):
                assert (await client.get("/")).status_code == 200
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(asyncio.all_tasks() - before) == 0:
                break
        gc.collect()
        assert asyncio.all_tasks() - before == set()
