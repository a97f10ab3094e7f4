"""Apps of each framework with three routes: `/v1/x`, `/p/{id}` and `/f/{rest}`, which answer `ran`.

Each handler settles its lease, so that it needs one.
"""

from typing import Any

import django
from blacksheep import Application
from blacksheep import Request as BlackSheepRequest
from blacksheep.server.routing import Router as BlackSheepRouter
from django.conf import settings as django_settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path as django_path
from fastapi import FastAPI
from litestar import Litestar, get
from litestar import Request as LitestarRequest
from quart import Quart
from quart import request as quart_request
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ratelimit_mw import get_lease

RAN = "ran"


async def settle(request: Any) -> None:
    """Use the lease of a request of any framework, which all show their scope."""
    await get_lease(request).settle("0")


async def starlette_endpoint(request: Request) -> PlainTextResponse:
    """Answer that it ran."""
    await settle(request)
    return PlainTextResponse(RAN)


def starlette_app() -> Starlette:
    """An app of Starlette's."""
    paths = ("/v1/x", "/p/{id}", "/f/{rest:path}")
    return Starlette(routes=[Route(path, starlette_endpoint) for path in paths])


def fastapi_app() -> FastAPI:
    """An app of FastAPI's."""
    app = FastAPI()
    for path in ("/v1/x", "/p/{id}", "/f/{rest:path}"):
        app.add_api_route(path, starlette_endpoint, response_model=None)
    return app


def litestar_app() -> Any:
    """An app of Litestar's."""

    @get("/v1/x")
    async def x(request: LitestarRequest[Any, Any, Any]) -> str:
        await settle(request)
        return RAN

    @get("/p/{id:str}")
    async def p(request: LitestarRequest[Any, Any, Any]) -> str:
        await settle(request)
        return RAN

    @get("/f/{rest:path}")
    async def f(request: LitestarRequest[Any, Any, Any]) -> str:
        await settle(request)
        return RAN

    return Litestar([x, p, f], logging_config=None)


def quart_app(*, strict_slashes: bool = True) -> Quart:
    """An app of Quart's."""
    app = Quart("framework")
    app.url_map.strict_slashes = strict_slashes

    async def endpoint(**_: str) -> str:
        await settle(quart_request)
        return RAN

    for path in ("/v1/x", "/p/<id>", "/f/<path:rest>"):
        app.add_url_rule(path, path, endpoint)
    return app


def blacksheep_app() -> Application:
    """An app of BlackSheep's; it is started by `start`."""
    app = Application(router=BlackSheepRouter())

    async def endpoint(request: BlackSheepRequest) -> str:
        await settle(request)
        return RAN

    for path in ("/v1/x", "/p/{id}", "/f/{path:rest}"):
        app.router.add_get(path, endpoint)
    return app


async def django_view(request: HttpRequest, **_: str) -> HttpResponse:
    """Answer that it ran."""
    await settle(request)
    return HttpResponse(RAN)


urlpatterns = [django_path(path, django_view) for path in ("v1/x", "p/<str:id>", "f/<path:rest>")]


def django_app() -> Any:
    """An app of Django's."""
    if not django_settings.configured:
        django_settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of a test")
        django.setup()
    return get_asgi_application()


APPS = {
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "litestar": litestar_app,
    "quart": quart_app,
    "quart, lax": lambda: quart_app(strict_slashes=False),
    "blacksheep": blacksheep_app,
    "django": django_app,
}


async def start(app: Any) -> None:
    """Start an app as its lifespan would."""
    if isinstance(app, Application) and not app.started:
        await app.start()  # type: ignore[no-untyped-call]
