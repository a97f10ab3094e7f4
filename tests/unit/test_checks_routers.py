"""Routers of other frameworks: what they run without its rule, and that it is told at the start."""

from typing import Any

import pytest
from blacksheep import Application
from blacksheep.server.routing import Router as BlackSheepRouter
from fastapi import FastAPI
from litestar import Litestar, get
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ratelimit_mw import RateLimitMiddleware
from tests.support.asgi import FakeClock, client_of, limited, ok_app, shown

pytestmark = pytest.mark.usefixtures("nothing_said")

RULE = 'routes = [{ path = "/v1/x", requests = ["1/hour"] }]'


def litestar_app() -> Any:
    """An app of Litestar's with one route."""

    @get("/v1/x", sync_to_thread=False)
    def endpoint() -> str:
        return "x"

    return Litestar([endpoint], logging_config=None)


def blacksheep_app() -> Application:
    """An app of BlackSheep's with one route."""
    app = Application(router=BlackSheepRouter())

    @app.router.get("/v1/x")
    def endpoint() -> str:
        return "x"

    return app


class Unknown:
    """An app that shows nothing of what it is made of."""

    async def __call__(self, *_: Any) -> None:
        """Answer nobody."""


class Flask:
    """An app of a framework that nobody has heard of, which has a router."""

    url_map: tuple[str, ...] = ()

    async def __call__(self, *_: Any) -> None:
        """Answer nobody."""


def checks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names of what was found."""
    return [record.__dict__["check"] for record in caplog.records]


@pytest.mark.parametrize(
    ("app", "name"),
    [
        (litestar_app(), "litestar.app.Litestar"),
        (blacksheep_app(), "blacksheep.server.application.Application"),
        (GZipMiddleware(litestar_app()), "litestar.app.Litestar"),
        (Starlette(routes=[Mount("/api", litestar_app())]), "litestar.app.Litestar"),
        (Flask(), "tests.unit.test_checks_routers.Flask"),
    ],
)
def test_a_router_of_another_framework_is_told(
    app: ASGIApp, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it lies inside, it may run what no rule matches."""
    limited(RULE, FakeClock(), app)
    assert checks(caplog) == ["other-router"]
    assert name in caplog.text


@pytest.mark.parametrize(
    "app",
    [
        ok_app(),
        FastAPI(),
        Router(),
        GZipMiddleware(ok_app()),
        Starlette(routes=[Mount("/static", StaticFiles(directory=".")), Mount("/sub", FastAPI())]),
        Unknown(),
        Unknown().__call__,
    ],
)
def test_starlettes_router_and_what_nobody_can_tell_are_silent(
    app: ASGIApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said of Starlette's and FastAPI's routers, nor of an app that doesn't show what it is."""
    limited(RULE, FakeClock(), app)
    assert checks(caplog) == []


def test_without_rules_for_routes_there_is_nothing_to_pass_by(caplog: pytest.LogCaptureFixture) -> None:
    """A path may be written in any way if plans alone count."""
    limited("", FakeClock(), litestar_app())
    assert checks(caplog) == []


async def test_a_middleware_that_is_added_sees_the_router_too(caplog: pytest.LogCaptureFixture) -> None:
    """A router that is mounted in an app is told also if the middleware was added to the app."""
    app = Starlette(routes=[Mount("/api", litestar_app())])
    app.add_middleware(RateLimitMiddleware, limiter=limited(RULE, FakeClock()).limiter)
    async with client_of(app) as client:
        await client.get("/")
    assert checks(caplog) == ["other-router"]


@pytest.mark.parametrize(
    ("app", "spellings"),
    [(litestar_app(), ["/v1/x/", "//v1/x", "/v1//x"]), (blacksheep_app(), ["/v1/x/", "/V1/X"])],
)
async def test_what_the_page_on_attacks_says_of_them(app: Any, spellings: list[str]) -> None:
    """Such a route runs, and the plan counts it; the route's own limit does not."""
    if isinstance(app, Application):
        await app.start()  # type: ignore[no-untyped-call]
    async with client_of(limited(RULE, FakeClock(), app)) as client:
        assert shown(await client.get("/v1/x"))[0] == "1"
        for spelling in spellings:
            response = await client.get(f"http://app{spelling}")
            assert (response.status_code, shown(response)[0]) == (200, "20")
