"""`ratelimit-mw routes`: which rule every route of a real app falls under."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.convertors import CONVERTOR_TYPES, Convertor
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket as StarletteSocket

from ratelimit_mw import Limiter, RateLimitMiddleware, SettingsError
from ratelimit_mw._internal.asgi.app_routes import Mounted, cover, find_app
from ratelimit_mw._internal.asgi.route_walk import app_routes
from ratelimit_mw._internal.cli.commands import run
from tests.support.apps import ROOT
from tests.support.asgi import settings_of

RULES = """
    [[routes]]
    path = "/health"
    exempt = true
    [[routes]]
    path = "/v1/predictions"
    methods = ["POST"]
    cost = 10
    [[routes]]
    path = "/v1/{rest:path}"
    requests = ["10/second"]
    [[routes]]
    path = "/files/{name}"
    [[routes]]
    path = "/nobody"
"""


async def ok(_request: Request) -> PlainTextResponse:
    """Answer."""
    return PlainTextResponse("ok")


async def socket(_socket: StarletteSocket) -> None:
    """Serve a WebSocket."""


async def foreign(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve as an app of no framework."""


def starlette_app() -> Starlette:
    """An app with one of everything that Starlette routes."""
    deep = Mount("/deep", routes=[Route("/{x:int}", ok, methods=["PUT"])])
    return Starlette(
        routes=[
            Route("/health", ok),
            Route("/v1/predictions", ok, methods=["GET", "POST"]),
            WebSocketRoute("/v1/socket", socket),
            Mount("/files", app=Starlette(routes=[Route("/{a}", ok), deep])),
            Mount("/static", app=StaticFiles(directory=ROOT)),
            Mount("/foreign", app=foreign),
            Host("api.example.com", app=Starlette(routes=[Route("/hosted", ok)])),
            Mount("/wrapped", app=RateLimitMiddleware(Starlette(routes=[Route("/inner", ok)]))),
        ]
    )


def table(app: Any) -> list[tuple[str, str, tuple[int | None, ...]]]:
    """Methods, path and rules of each route of an app, under `RULES`."""
    covered = cover(app_routes(app), settings_of(RULES))
    return [(",".join(each.methods), each.route.path, each.rules) for each in covered]


def test_every_route_of_a_starlette_app_is_covered() -> None:
    """Routes, sockets, mounted apps and hosts: each with the rule that the middleware would apply."""
    assert table(starlette_app()) == [
        ("GET,HEAD", "/health", (0,)),
        ("GET,HEAD", "/v1/predictions", (2,)),
        ("POST", "/v1/predictions", (1,)),
        ("GET", "/v1/socket", (2,)),
        ("GET,HEAD", "/files/{a}", (3,)),
        ("PUT", "/files/deep/{x:int}", (None,)),
        ("*", "/static/{rest:path}", (None,)),
        ("*", "/foreign/{rest:path}", (None,)),
        ("GET,HEAD", "/hosted", (None,)),
        ("GET,HEAD", "/wrapped/inner", (None,)),
    ]


def test_every_route_of_a_fastapi_app_is_covered() -> None:
    """Included routers with prefixes, in one another, and what they include that is not FastAPI's."""
    inner, outer, app = APIRouter(prefix="/predictions"), APIRouter(), FastAPI(openapi_url=None)

    @inner.post("")
    async def predict() -> None: ...

    @inner.get("/{number}")
    async def look(number: int) -> None: ...

    @outer.websocket("/socket")
    async def talk(websocket: WebSocket) -> None: ...

    outer.include_router(inner)
    outer.mount("/sub", Starlette(routes=[Route("/x", ok)]))
    app.include_router(outer, prefix="/v1")

    @app.get("/health")
    async def health() -> None: ...

    assert sorted(table(app)) == [
        ("GET", "/health", (0,)),
        ("GET", "/v1/predictions/{number}", (2,)),
        ("GET", "/v1/socket", (2,)),
        ("GET,HEAD", "/v1/sub/x", (2,)),
        ("POST", "/v1/predictions", (1,)),
    ]


def test_what_depends_on_the_path_names_every_rule() -> None:
    """A route that is wider than a rule falls under several."""
    app = Starlette(routes=[Route("/{rest:path}", ok)])
    rules = '[[routes]]\npath = "/"\n[[routes]]\npath = "/{x}"'
    (found,) = cover(app_routes(app), settings_of(rules))
    assert found.rules == (0, 1, None)


def test_convertors_of_the_apps_own_are_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter with a convertor of the app's own claims no rule, since its matches are not known here."""

    class Word(Convertor[str]):
        regex = "[a-z]+"

        def convert(self, value: str) -> str:
            return value

        def to_string(self, value: str) -> str:
            return value

    monkeypatch.setitem(CONVERTOR_TYPES, "word", Word())
    (found,) = cover(app_routes(Starlette(routes=[Route("/{x:word}", ok)])), settings_of(RULES))
    assert found.rules == ()


def test_settings_are_those_of_the_app(tmp_path: Path) -> None:
    """Whichever way the middleware is mounted, its own settings are used; without it there are none."""
    settings = settings_of(RULES)
    file = tmp_path / "ratelimit.toml"
    file.write_text(RULES)
    for options in ({"settings": settings}, {"limiter": Limiter(settings)}, {"settings": file}):
        app = Starlette(routes=[Route("/", ok)], middleware=[Middleware(RateLimitMiddleware, **options)])
        assert _rules(find_app(app)) == settings.routes
        wrapped = RateLimitMiddleware(Starlette(routes=[Route("/", ok)]), **options)
        assert _rules(find_app(wrapped)) == settings.routes
    assert find_app(starlette_app()).settings is None
    with pytest.raises(LookupError):
        find_app(foreign)
    with pytest.raises(SettingsError):
        find_app(RateLimitMiddleware(starlette_app(), tmp_path / "nothing.toml"))


def test_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """People get a table and what is odd, programs get everything."""
    assert run(["routes", "tests.unit.test_app_routes:app", "--app-dir", str(ROOT)]) == 0
    shown = capsys.readouterr().out
    assert "[1] POST /v1/predictions" in shown
    assert "routes[4] (/nobody) matches no route of the app" in shown
    assert run(["routes", "tests.unit.test_app_routes:app", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mounted"]
    assert report["unused_rules"] == [4]
    health = next(route for route in report["routes"] if route["path"] == "/health")
    assert (health["methods"], health["rules"][0]["exempt"]) == (["GET", "HEAD"], True)
    posted = next(route for route in report["routes"] if route["methods"] == ["POST"])
    assert (posted["rules"][0]["index"], posted["rules"][0]["cost"]) == (1, 10)
    assert [limit["kind"] for limit in report["plans"]["default"]] == ["rate", "concurrency"]


def test_command_says_where_nothing_is_mounted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app without the middleware is shown under the settings named, with a warning."""
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    assert run(["routes", "tests.unit.test_app_routes:starlette_app"]) == 0
    assert "no RateLimitMiddleware is mounted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.unit.test_app_routes:nothing", "nothing"),
        ("no_such_module:app", "no_such_module"),
        ("tests.unit.test_app_routes", "tests.unit.test_app_routes"),
        ("tests.unit.test_app_routes:foreign", "no routes"),
    ],
)
def test_command_says_in_a_line_what_it_cannot_show(
    name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that leads nowhere is one line and status 1."""
    assert run(["routes", name]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def _rules(mounted: Mounted) -> Any:
    return mounted.settings and mounted.settings.routes


app = RateLimitMiddleware(starlette_app(), settings_of(RULES))
