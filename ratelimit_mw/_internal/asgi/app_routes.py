"""A real app with its settings, and which rule of these each of its routes falls under."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware
from ratelimit_mw._internal.asgi.route_walk import ANY, MAX_LAYERS, AppRoute, routes_of
from ratelimit_mw._internal.checks.routes import OTHER_METHOD
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.policy.loose_paths import route_table
from ratelimit_mw._internal.policy.routing import RouteTable
from ratelimit_mw._internal.policy.sample_paths import samples
from ratelimit_mw._internal.settings import Settings


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
        elif routes_of(app) is not None:
            return Mounted(app, settings or _added(app))
        app = getattr(app, "app", None)
    raise LookupError("no routes of Starlette or FastAPI can be found in it")


def cover(routes: Iterable[AppRoute], settings: Settings) -> Iterator[Covered]:
    """Yield the route rules that each route falls under, with its methods grouped by those rules."""
    table = route_table(settings)
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
