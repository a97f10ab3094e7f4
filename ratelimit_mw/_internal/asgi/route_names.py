"""Patterns of the app's own routes, for figures: `/items/{id}` for every item."""

from typing import Any, NamedTuple

from ratelimit_mw._internal.asgi.route_walk import ANY, AppRoute, app_routes, app_with_routes
from ratelimit_mw._internal.policy.client_address import Scope
from ratelimit_mw._internal.policy.routing import RouteTable, route_path


class _Entry(NamedTuple):
    path: str
    methods: frozenset[str] | None


class RouteNames:
    """Finds the pattern of the route that an app has for a request."""

    def __init__(self, app: Any) -> None:
        """Read the routes of an app, as they are now. Routes that can't be read are left out."""
        app = app_with_routes(app)
        self.is_known: bool = app is not None
        """Whether the app shows its routes."""
        self._entries: dict[str, list[_Entry]] = {"http": [], "websocket": []}
        for route in () if app is None else app_routes(app):
            for kind in self._entries if route.kind == "app" else (route.kind,):
                self._entries[kind] += _readable(route)
        self._tables = {kind: RouteTable(entries) for kind, entries in self._entries.items()}

    def find(self, scope: Scope) -> str | None:
        """Return the pattern of a request's route; None where the app has none for it."""
        kind = scope["type"]
        index = self._tables[kind].match(scope.get("method", "GET"), route_path(scope))
        return None if index is None else self._entries[kind][index].path


def _readable(route: AppRoute) -> list[_Entry]:
    entry = _Entry(route.path, None if route.methods == (ANY,) else frozenset(route.methods))
    try:
        RouteTable([entry])
    except (ValueError, KeyError, AssertionError):
        return []
    return [entry]
