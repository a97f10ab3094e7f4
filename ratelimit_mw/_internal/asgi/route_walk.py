"""The routes of a real app, read from outside, by what Starlette and FastAPI show of themselves.

Neither is called, and FastAPI is not imported unless the app has done so.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from starlette.routing import Host, Mount, Route, WebSocketRoute

from ratelimit_mw._internal.asgi.marks import Mark, marks_of, marks_on

MAX_LAYERS = 50
"""Wrappers around an app beyond which no routes are looked for."""
ANY = "*"
"""Stands for every method, where an app takes them all."""
CLASS_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Methods of HTTP that a class as endpoint, such as Starlette's HTTPEndpoint, may answer apart."""

Kind = Literal["http", "websocket", "app"]


class AppRoute(NamedTuple):
    """One route of the app."""

    path: str
    """Its pattern, with those of the mounts that it lies under."""
    methods: tuple[str, ...]
    """In order; `("*",)` where it takes all, `("GET",)` for a WebSocket."""
    kind: Kind = "http"
    """An `app` is mounted and has no routes of Starlette's to look at."""
    marks: tuple[Mark, ...] = ()
    """Limits in code that are on it: on its endpoint, and on what FastAPI's dependencies it has."""
    hosts: tuple[Host, ...] = ()
    """Routes by host that it lies under: all of them have to match a request."""


def app_routes(app: Any) -> Iterator[AppRoute]:
    """Every route of an app, those of mounted apps in the place of the mount."""
    yield from _walk(routes_of(app) or (), "")


def routes_of(app: Any) -> list[Any] | None:
    """Return the routes of an app or a router; None where it shows none."""
    routes = getattr(app, "routes", None)
    return list(routes) if isinstance(routes, list | tuple) else None


def app_with_routes(app: Any) -> Any:
    """The app with routes inside its wrappers; None where nothing shows any."""
    for _ in range(MAX_LAYERS):
        if app is None or routes_of(app) is not None:
            return app
        app = getattr(app, "app", None)
    return None


def _walk(routes: Sequence[Any], prefix: str) -> Iterator[AppRoute]:
    for shown, route in _flat(routes):
        path = f"{prefix}{shown.path}" if isinstance(getattr(shown, "path", None), str) else prefix
        if isinstance(route, Route):
            yield from _answered(shown, path)
        elif isinstance(route, WebSocketRoute):
            connecting = marks_on(getattr(shown.endpoint, "on_connect", None))
            yield AppRoute(path, ("GET",), "websocket", (*marks_of(shown), *connecting))
        elif isinstance(route, Mount):
            yield from _mounted(shown.app, path)
        elif isinstance(route, Host):
            for below in _mounted(shown.app, prefix):
                yield below._replace(hosts=(route, *below.hosts))
        elif (inner := routes_of(route)) is not None:
            yield from _walk(inner, path + getattr(shown, "frontend_prefix", ""))
        else:
            yield _all_below(path)


def _answered(route: Any, path: str) -> Iterator[AppRoute]:
    """One route. A class as endpoint has one for each method that is marked, and one for the others."""
    marks = marks_of(route)
    methods = set(route.methods or ())
    if isinstance(route.endpoint, type):
        for method in CLASS_METHODS:
            # Without a method of its own for HEAD, Starlette's class answers that by the one for GET.
            is_both = method == "GET" and not hasattr(route.endpoint, "head")
            names = [name for name in (method, *["HEAD"] * is_both) if not methods or name in methods]
            own = marks_on(getattr(route.endpoint, method.lower(), None))
            if own and names:
                yield AppRoute(path, tuple(names), marks=(*marks, *own))
    yield AppRoute(path, tuple(sorted(methods)) or (ANY,), marks=marks)


def _mounted(app: Any, path: str) -> Iterator[AppRoute]:
    for _ in range(MAX_LAYERS):
        routes = routes_of(app)
        if routes is not None:
            yield from _walk(routes, path)
            return
        app = getattr(app, "app", None)
    yield _all_below(path)


def _all_below(path: str) -> AppRoute:
    return AppRoute(f"{path.rstrip('/')}/{{rest:path}}", (ANY,), "app")


def _flat(routes: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each route as requests meet it, and as it was made: FastAPI's routers give theirs another path."""
    flatten: Callable[[Sequence[Any]], Iterable[Any]] | None
    flatten = getattr(sys.modules.get("fastapi.routing"), "iter_route_contexts", None)
    for route in routes if flatten is None else flatten(routes):
        yield route, getattr(route, "original_route", route)
