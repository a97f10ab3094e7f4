"""Limits in code that requests meet, learnt from the app's own routes."""

from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from starlette.routing import Host, Match, compile_path
from starlette.types import Scope

from ratelimit_mw._internal.asgi.asked_limits import asked_as, asked_by, differs
from ratelimit_mw._internal.asgi.marks import Mark
from ratelimit_mw._internal.asgi.route_names import RouteNames
from ratelimit_mw._internal.asgi.route_walk import ANY, AppRoute, app_routes, app_with_routes
from ratelimit_mw._internal.live.rules import Rules
from ratelimit_mw._internal.model.limits import REQUESTS, Window
from ratelimit_mw._internal.policy.by import PathPart
from ratelimit_mw._internal.policy.code_limits import MAX_NAME, Limit, rates_of
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.policy.routing import RouteTable, route_path
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings.findings import Finding

if TYPE_CHECKING:
    from starlette.convertors import Convertor

    from ratelimit_mw._internal.policy.extended import AskedLimits, CodeLimits


MAX_HOSTS = 64
"""Kinds of hosts of which the routes are kept in hand."""


class MarkedRoute:
    """One route of the app, with its limits in code."""

    __slots__ = ("_pattern", "asked", "hosts", "is_plain", "limits", "methods", "parameters", "path")

    def __init__(self, route: AppRoute) -> None:
        """Raises what Starlette raises for a path that it can't read."""
        self.path: str = route.path
        self.methods: frozenset[str] | None = None if route.methods == (ANY,) else frozenset(route.methods)
        self.hosts: tuple[Host, ...] = route.hosts
        self.limits: tuple[Limit, ...] = tuple(limits_of(route))
        self._pattern, _, parameters = compile_path(route.path)
        self.parameters: Mapping[str, Convertor[Any]] = parameters
        self.is_plain: bool = not any(map(differs, self.limits))
        """Whether all requests meet the same limits, whatever they say."""
        self.asked: dict[CodeLimits, AskedLimits] = {}
        """Limits as all requests meet them, by the settings in force."""

    def read(self, path: str, name: str) -> str | None:
        """Return the parameter of a path as it stands there; None where the route has none of this name."""
        found = self._pattern.match(path)
        return None if found is None else found.groupdict().get(name)


_Table = tuple[RouteTable, list[MarkedRoute]]
"""Routes of one kind, and an index of them."""


class MarkedRoutes:
    """The limits in code of one app, by route."""

    def __init__(self, app: Any) -> None:
        """Read the routes of an app, as they are now."""
        self._made = Mark.made
        self.findings: list[Finding] = []
        """Findings about routes that can't be read, and about limits that never apply."""
        self._entries: dict[str, list[MarkedRoute]] = {"http": [], "websocket": []}
        self._app = app
        self._names: RouteNames | None = None
        app = app_with_routes(app)
        routes = [] if app is None else list(app_routes(app))
        self.has_limits: bool = any([route.marks for route in routes])
        """Whether any route has a limit in code."""
        if self.has_limits:
            for route in routes:
                self._add(route)
        # Starlette's have no hash.
        self._hosts = list({id(host): host for route in routes for host in route.hosts}.values())
        self._tables: dict[tuple[bool, ...], dict[str, _Table]] = {}
        """The routes by which of the routes by host match."""
        if self._made:
            self.findings += _unreadable(app, routes)

    @property
    def is_outdated(self) -> bool:
        """Whether a mark was made since, perhaps while they were read."""
        return self._made != Mark.made

    @property
    def limits(self) -> Iterator[Limit]:
        """Every limit on a route."""
        for entries in self._entries.values():
            for entry in entries:
                yield from entry.limits

    @property
    def names(self) -> RouteNames:
        """The patterns of all routes, read when they are first needed."""
        if self._names is None:
            self._names = RouteNames(self._app)
        return self._names

    def at(self, scope: Scope) -> MarkedRoute | None:
        """Find the route of a request; None where no limit in code is on it."""
        matching = tuple([host.matches(scope)[0] is Match.FULL for host in self._hosts])
        return self._find(matching, scope["type"], scope.get("method", "GET"), route_path(scope))

    def find(self, kind: str, method: str, path: str) -> MarkedRoute | None:
        """Find the route of a kind of connection, a method and a path; None where it has no limit in code.

        That is of any host.
        """
        return self._find((True,) * len(self._hosts), kind, method, path)

    def _find(self, matching: tuple[bool, ...], kind: str, method: str, path: str) -> MarkedRoute | None:
        tables = self._tables.get(matching)
        if tables is None:
            evict_oldest(self._tables, MAX_HOSTS)
            tables = self._tables[matching] = self._tables_of(matching)
        table, entries = tables[kind]
        index = table.match(method, path)
        if index is None:
            return None
        entry = entries[index]
        return entry if entry.limits else None

    def _tables_of(self, matching: tuple[bool, ...]) -> "dict[str, _Table]":
        """The routes of requests for which just these routes by host match."""
        others = {id(host) for host, is_met in zip(self._hosts, matching, strict=True) if not is_met}
        tables = {}
        for kind, entries in self._entries.items():
            met = [entry for entry in entries if others.isdisjoint(map(id, entry.hosts))]
            tables[kind] = (RouteTable(met), met)
        return tables

    def policy_of(
        self, policy: Policy, identity: Identity, scope: Scope, rules: Rules
    ) -> Policy | Awaitable[Policy]:
        """Return the policy of a request with the limits in code of its route, or what to await for it.

        Raises `HookError` for what a function of the app raises.
        """
        route = self.at(scope)
        if route is None or policy.is_decided:
            return policy
        asked = route.asked.get(rules.code_limits)
        if asked is None:
            if not route.is_plain:
                return _policy_of(route, policy, identity, scope, rules)
            met = [asked_as(limit, rules.code_limits) for limit in route.limits]
            asked = tuple([each for each in met if each is not None])
            route.asked = {rules.code_limits: asked}  # of the settings in force alone
        return rules.code_limits.extend(policy, asked) if asked else policy

    def _add(self, route: AppRoute) -> None:
        try:
            entry = MarkedRoute(route)
            RouteTable([entry])
        except (ValueError, KeyError, AssertionError) as error:
            if route.marks:
                text = f"{route.path}: its limits in code don't apply, since its path can't be read: {error}"
                self.findings.append(Finding("limits-not-learnt", text))
            return
        for limit in entry.limits:
            if isinstance(limit.by, PathPart) and limit.by.name not in entry.parameters:
                text = (
                    f"limit {limit.name} never applies on {route.path}: it counts by the path parameter "
                    f"{limit.by.name!r}, which this path does not have."
                )
                self.findings.append(Finding("limits-not-learnt", text))
        kinds: Iterable[str] = self._entries if route.kind == "app" else (route.kind,)
        for kind in kinds:
            self._entries[kind].append(entry)


async def _policy_of(
    route: MarkedRoute, policy: Policy, identity: Identity, scope: Scope, rules: Rules
) -> Policy:
    """Return a policy with the limits of its route that this request meets."""
    asked = []
    for limit in route.limits:
        met = await asked_by(limit, scope, identity, rules, partial(route.read, route_path(scope)))
        if met is not None:
            asked.append(met)
    return rules.code_limits.extend(policy, tuple(asked)) if asked else policy


def limits_of(route: AppRoute) -> Iterator[Limit]:
    """Yield the limits of a route, each once; rates as one limit that is named by methods and path.

    Of two rates with one window length, as two routers around a route may have them, the stricter one holds.
    """
    rates = dict[int, Window]()
    limits = list[Limit]()
    for mark in route.marks:
        for limit in mark.limits:
            if isinstance(limit, Limit):
                limits.append(limit)
            else:
                (rate,) = rates_of(limit, REQUESTS, "limited")
                rates[rate.length] = min(rate, rates.get(rate.length, rate), key=attrgetter("quota"))
    yield from dict.fromkeys(limits)
    if rates:
        name = f"{','.join(route.methods)} {route.path}"[:MAX_NAME]
        yield Limit(name, *[rate.text for rate in rates.values()])


def _unreadable(app: Any, routes: Sequence[AppRoute]) -> Iterator[Finding]:
    """Findings about what may have marks that nobody can see."""
    if app is None:
        text = "no routes of Starlette or FastAPI can be found in the app: limits in code don't apply."
        yield Finding("limits-not-learnt", text)
    for route in routes:
        if route.kind == "app":
            text = (
                f"no routes of Starlette or FastAPI can be found in the app at {route.path}: limits in code "
                "don't apply there."
            )
            yield Finding("limits-not-learnt", text, "note")
