"""Apps of every framework, limited and mounted; no spelling of a path runs a route outside its rule."""

import re
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw.testing import fresh
from tests.support.apps import ROOT
from tests.support.asgi import client_of, settings_of, shown, statuses
from tests.support.framework_apps import APPS, RAN, quart_app, start

pytestmark = pytest.mark.rerun

RULES = """
plans.anonymous = { requests = ["50/minute"], concurrent = 1 }
[[routes]]
path = "/v1/x"
requests = ["3/hour"]
[[routes]]
path = "/p/{id}"
requests = ["3/hour"]
[[routes]]
path = "/f/{rest:path}"
requests = ["3/hour"]
"""
SPELLINGS = (
    "/v1/x /v1/x/ //v1/x /v1//x /V1/X /v1/X /v1/x// ///v1///x/// /v1/x%2F /v1%2Fx /%761/x /v1/x%0A /%2Fv1/x",
    "/p/a /P/a /p/a/ //p/a /p//a /p/A%2Fb /P/a%2fb/ /p/a%0A /p/%2F /p/a%00 /p/%C4%B1 /p/ /p",
    "/f/a/b /f/ /f /F/ /F /F/a /f//a /f/a%2Fb /f/a/ /%66/a /F%2Fa",
)
"""Paths as they are sent, those of one route in a line."""


@pytest.fixture(params=APPS)
async def app(request: pytest.FixtureRequest) -> Any:
    """An app of each framework, started."""
    made = APPS[request.param]()
    await start(made)
    return made


async def sent(app: Any, spelling: str) -> httpx.Response:
    """The response to a request with exactly this path."""
    async with client_of(app) as client:
        return await client.get(httpx.URL("http://app", raw_path=spelling.encode()))


async def test_an_app_of_any_framework_is_limited(app: Any) -> None:
    """Inside the middleware its routes are limited by plan and rule, and its handlers have their lease."""
    limited = RateLimitMiddleware(app, settings=settings_of(RULES))
    async with client_of(limited) as client:
        assert await statuses(client, 4, "/v1/x") == [200, 200, 200, 429]
        response = await client.get("/p/a")
        assert (response.text, shown(response)[:2]) == (RAN, ("3", "2"))
        assert await statuses(client, 3, "/p/b") == [200, 200, 429]


async def test_an_app_of_any_framework_is_limited_where_it_is_mounted(app: Any) -> None:
    """Mounted in an app of Starlette's with the middleware added, it is limited by the whole path."""
    outer = Starlette(routes=[Mount("/api", app)])
    rules = RULES.replace('path = "/', 'path = "/api/')
    outer.add_middleware(RateLimitMiddleware, settings=settings_of(rules))
    async with client_of(outer) as client:
        assert await statuses(client, 4, "/api/v1/x") == [200, 200, 200, 429]


async def test_tests_of_any_framework_s_app_begin_with_empty_counts(app: Any) -> None:
    """`fresh` works on the middleware around it."""
    limited = RateLimitMiddleware(app, settings=settings_of(RULES))
    for _ in range(2):
        with fresh(limited):
            async with client_of(limited) as client:
                assert await statuses(client, 4, "/v1/x") == [200, 200, 200, 429]


@pytest.mark.parametrize("shift", ["", "exempt"])
async def test_no_spelling_runs_a_route_outside_its_rule(app: Any, shift: str) -> None:
    """Whatever spelling of a path runs a route, its rule counts it, with `paths = "loose"`."""
    exempt = '[[routes]]\npath = "/{rest:path}"\nexempt = true\n' if shift else ""
    settings = settings_of('paths = "loose"\n' + RULES + exempt)
    ran = 0
    for spelling in " ".join(SPELLINGS).split():
        response = await sent(RateLimitMiddleware(app, settings=settings), spelling)
        if response.text == RAN:
            ran += 1
            assert shown(response)[0] == "3", spelling
    assert ran >= 10


@pytest.mark.parametrize("name", ["starlette", "fastapi", "django"])
async def test_routers_that_need_no_loose_paths(name: str) -> None:
    """Starlette's, FastAPI's and Django's routers run no spelling that their rule doesn't match as it is."""
    app = APPS[name]()
    for spelling in " ".join(SPELLINGS).split():
        response = await sent(RateLimitMiddleware(app, settings=settings_of(RULES)), spelling)
        assert response.text != RAN or shown(response)[0] == "3", spelling


async def test_the_example_of_the_page_serves() -> None:
    """The example of docs/servers.md is an app that serves, and its rules load."""
    page = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "servers.md", "exec"), names)
    for spelling in ("/v1/x", "/v1/x/", "//v1/x"):
        assert (await sent(names["app"], spelling)).text == "x"


async def test_quart_may_have_the_middleware_as_its_asgi_app() -> None:
    """`app.asgi_app = RateLimitMiddleware(app.asgi_app)` limits the app, and `fresh` finds it there."""
    app: Any = quart_app()
    app.asgi_app = RateLimitMiddleware(app.asgi_app, settings=settings_of(RULES))
    for _ in range(2):
        with fresh(app):
            async with client_of(app) as client:
                assert await statuses(client, 4, "/v1/x") == [200, 200, 200, 429]
