"""The routes of a real app, and which rule of the settings each of their requests falls under.

Apps are read from outside, by what Starlette and FastAPI show of themselves: neither is called, and FastAPI
is not imported unless the app has done so.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.routing import Host, Mount, Route, WebSocketRoute

from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware
from ratelimit_mw._internal.checks.routes import OTHER_METHOD
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.policy.routing import RouteTable
from ratelimit_mw._internal.policy.sample_paths import samples
from ratelimit_mw._internal.settings import Settings

MAX_LAYERS = 50
"""Wrappers around an app beyond which no routes are looked for."""
ANY = "*"
"""Stands for every method, where an app takes them all."""

Kind = Literal["http", "websocket", "app"]


@dataclass(frozen=True, slots=True)
class AppRoute:
    """One route of the app."""

    path: str
    """Its pattern, with those of the mounts that it lies under."""
    methods: tuple[str, ...]
    """In order; `("*",)` where it takes all, `("GET",)` for a WebSocket."""
    kind: Kind = "http"
    """An `app` is mounted and has no routes of Starlette's to look at."""


@dataclass(frozen=True, slots=True)
class Covered:
    """A route, for some of its methods, and what it falls under."""

    route: AppRoute
    methods: tuple[str, ...]
    rules: tuple[int | None, ...]
    """Indexes into `settings.routes`; None for the plan alone. Several where it depends on the path; none
    where it can't be told, for a convertor of the app's own."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """An app with routes, and the settings it is limited by."""

    app: Any
    settings: Settings | None
    """None where no RateLimitMiddleware is mounted."""


def find_app(app: Any) -> Mounted:
    """The app with routes inside its wrappers, and the settings of the outermost RateLimitMiddleware.

    Raises `SettingsError` for settings that don't load, and LookupError where nothing has routes.
    """
    settings: Settings | None = None
    for _ in range(MAX_LAYERS):
        if isinstance(app, RateLimitMiddleware):
            if app.settings_error is not None:
                raise app.settings_error
            settings = settings or app.limiter.settings
        elif _routes_of(app) is not None:
            return Mounted(app, settings or _added(app))
        app = getattr(app, "app", None)
    raise LookupError("it has no routes that Starlette or FastAPI made")


def app_routes(app: Any) -> Iterator[AppRoute]:
    """Every route of an app, those of mounted apps in the place of the mount."""
    yield from _walk(_routes_of(app) or (), "")


def cover(routes: Iterable[AppRoute], settings: Settings) -> Iterator[Covered]:
    """Yield the route rules that each route falls under, with its methods grouped by those rules."""
    table = RouteTable(settings.routes)
    listed = sorted(set().union(*[rule.methods or () for rule in settings.routes]))
    for route in routes:
        # What takes every method may fall under another rule for each method that a rule lists.
        methods = [*listed, OTHER_METHOD] if route.methods == (ANY,) else route.methods
        groups: dict[tuple[int | None, ...], list[str]] = {}
        for method in methods:
            groups.setdefault(_rules(table, method, samples(route.path)), []).append(method)
        if len(groups) == 1:
            groups = {rules: list(route.methods) for rules in groups}
        for rules, names in groups.items():
            yield Covered(route, tuple(names), rules)


def _rules(table: RouteTable, method: str, paths: Sequence[str]) -> tuple[int | None, ...]:
    found = {table.match(method, path) for path in paths}
    return tuple(sorted(found, key=lambda rule: (rule is None, rule)))


def _added(app: Any) -> Settings | None:
    """The settings of the RateLimitMiddleware that `add_middleware` was given."""
    for middleware in getattr(app, "user_middleware", ()):
        if isinstance(middleware.cls, type) and issubclass(middleware.cls, RateLimitMiddleware):
            limiter = middleware.kwargs.get("limiter")
            if isinstance(limiter, Limiter):
                return limiter.settings
            given = middleware.args[0] if middleware.args else middleware.kwargs.get("settings")
            return given if isinstance(given, Settings) else Settings.load(given)
    return None


def _routes_of(app: Any) -> list[Any] | None:
    routes = getattr(app, "routes", None)
    return list(routes) if isinstance(routes, list | tuple) else None


def _walk(routes: Sequence[Any], prefix: str) -> Iterator[AppRoute]:
    for shown, route in _flat(routes):
        path = f"{prefix}{shown.path}" if isinstance(getattr(shown, "path", None), str) else prefix
        if isinstance(route, Route):
            yield AppRoute(path, tuple(sorted(shown.methods)) if shown.methods else (ANY,))
        elif isinstance(route, WebSocketRoute):
            yield AppRoute(path, ("GET",), "websocket")
        elif isinstance(route, Mount):
            yield from _mounted(shown.app, path)
        elif isinstance(route, Host):
            yield from _walk(_routes_of(shown) or (), prefix)
        elif (inner := _routes_of(route)) is not None:
            yield from _walk(inner, path + getattr(shown, "frontend_prefix", ""))
        else:
            yield _all_below(path)


def _mounted(app: Any, path: str) -> Iterator[AppRoute]:
    for _ in range(MAX_LAYERS):
        routes = _routes_of(app)
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
