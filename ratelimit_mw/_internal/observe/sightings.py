"""Addresses that requests come from and routes that they go to, counted only while an operator looks at them.

Addresses and routes are counted of callers whose page is open. All requests are counted by the app's own
route and by method while a dashboard is open.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from ratelimit_mw._internal.observe.decision_counts import outcome_of
from ratelimit_mw._internal.policy.client_address import Scope
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.lookup import LookupEntry

ROUTES = "routes"
"""Stands among the watched callers while somebody looks at all routes."""
MOST = 60
"""Addresses and routes of all watched callers that are counted from one report to the next."""
MOST_ROUTES = 1_000
"""Outcomes of the app's routes that are counted from one report to the next."""
LONGEST = 200
"""Characters of a path."""
ADDRESS, ROUTE = "address", "route"
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
"""Methods that are told apart; a client may invent any number of others."""
SEPARATOR = "\n"
"""Stands in front of the route and of the rule in the name of a count."""


class Routes(Protocol):
    """Routes of an app."""

    @property
    def is_known(self) -> bool:
        """Whether the app shows its routes."""

    def find(self, scope: Scope, /) -> str | None:
        """Return the pattern of a request's route; None where the app has none for it."""


class Watch(Protocol):
    """Takes note of requests while somebody looks."""

    def __call__(self, found: LookupEntry, scope: Scope, decision: Decision, routes: Routes, /) -> None:
        """Take note of a request that was decided about."""

    def count(self, found: LookupEntry, scope: Scope, decision: Decision, routes: Routes, /) -> None:
        """Take note of one more decision about a request that is known already."""


class Sightings:
    """Counts where requests of watched callers come from and go to, and all requests by route and method."""

    def __init__(self, address_of: Callable[[Scope], str], switch: Callable[[Watch | None], None]) -> None:
        """`switch` is given what each request is to be shown to; None while nobody looks."""
        self._address_of = address_of
        self._switch = switch
        self._watched: frozenset[str] = frozenset()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._routes: Counter[tuple[str, str, str]] = Counter()

    def watch(self, callers: Iterable[str]) -> None:
        """Count these callers from now on, and no others; by route, if `ROUTES` is among them."""
        self._watched = frozenset(callers)
        self._switch(self if self._watched else None)

    def __call__(self, found: LookupEntry, scope: Scope, decision: Decision, routes: Routes) -> None:
        """Count a request."""
        self.count(found, scope, decision, routes)
        caller = found.identity.partition
        if caller not in self._watched:
            return
        rule = found.policy.route
        path = scope["path"] if rule is None else rule.path
        route = f"{scope.get('method', 'GET')} {path[:LONGEST]}"
        for each in ((caller, ADDRESS, self._address_of(scope)), (caller, ROUTE, route)):
            if each in self._counts or len(self._counts) < MOST:
                self._counts[each] += 1

    def count(self, found: LookupEntry, scope: Scope, decision: Decision, routes: Routes) -> None:
        """Count a decision by route and method, if somebody looks at the routes."""
        if ROUTES not in self._watched:
            return
        rule = found.policy.route
        if not routes.is_known:
            path = "(any path)" if rule is None else rule.path
        else:
            path = routes.find(scope) or "(no route)"
        own = "" if rule is None else rule_name(rule.methods, rule.path)
        each = (outcome_of(decision), f"{_method(scope)} {path}"[:LONGEST], own[:LONGEST])
        if each in self._routes or len(self._routes) < MOST_ROUTES:
            self._routes[each] += 1

    def take(self) -> dict[str, int]:
        """Return the counts of watched callers since the last call, by the name that `sightings_of` reads."""
        counts, self._counts = self._counts, Counter()
        # A copy, since another thread's request may still be counting there.
        return {json.dumps(each, separators=(",", ":")): number for each, number in [*counts.items()]}

    def take_routes(self) -> dict[str, int]:
        """Return the counts of routes since the last call, by outcome and the name that `route_of` reads."""
        counts, self._routes = self._routes, Counter()
        return {_name(*each): number for each, number in [*counts.items()]}


def sightings_of(caller: str, several: Iterable[Mapping[str, int]]) -> tuple[Counter[str], Counter[str]]:
    """Return the addresses and the routes of a caller, each with its requests, from several counts."""
    found: dict[str, Counter[str]] = {ADDRESS: Counter(), ROUTE: Counter()}
    for counts in several:
        for name, number in counts.items():
            try:
                said = json.loads(name)
            except (ValueError, RecursionError):
                continue
            if isinstance(said, list) and len(said) == 3 and all(isinstance(each, str) for each in said):
                whose, kind, text = said
                if whose == caller and kind in found:
                    found[kind][text.encode("utf-8", "replace").decode()] += number
    return found[ADDRESS], found[ROUTE]


def rule_name(methods: Iterable[str] | None, path: str) -> str:
    """Return the name of a rule in figures: its methods and path; empty for requests without one."""
    return " ".join(filter(None, (",".join(sorted(methods or ())), path)))


def route_of(name: str) -> tuple[str, str] | None:
    """Return the app's route and the rule, from a count's name without its outcome; None for a rule alone."""
    if not name.startswith(SEPARATOR):
        return None
    route, _, rule = name[1:].partition(SEPARATOR)
    return route, rule


def _name(outcome: str, route: str, rule: str) -> str:
    route = route.replace(SEPARATOR, " ")
    return f"{outcome} {SEPARATOR}{route}{SEPARATOR}{rule}".encode("utf-8", "replace").decode()


def _method(scope: Scope) -> str:
    if scope["type"] == "websocket":
        return "WebSocket"
    method: str = scope["method"]
    return method if method in METHODS else "(other)"
