"""Checks of the `[[routes]]`: rules that never apply, or apply to more than they seem to."""

import re
from collections.abc import Iterator, Sequence

from starlette.routing import PARAM_REGEX

from ratelimit_mw._internal.policy.routing import RouteTable
from ratelimit_mw._internal.policy.sample_paths import samples
from ratelimit_mw._internal.settings import RouteSettings, Settings
from ratelimit_mw._internal.settings.errors import nearest_name
from ratelimit_mw._internal.settings.findings import Finding

NAMED = 5
"""Rules that are named as coming first; of the others only their number is told."""
OTHER_METHOD = "OTHER"
"""Stands for every method that no rule lists."""

_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")


def route_findings(settings: Settings) -> Iterator[Finding]:
    """Everything about the routes, in the order of the file."""
    table = RouteTable(settings.routes)
    for index, route in enumerate(settings.routes):
        yield from _misread(rule_name(settings.routes, index), route)
        yield from _never_reached(settings.routes, table, index)


def rule_name(routes: Sequence[RouteSettings], index: int) -> str:
    """A rule as messages name it, such as `routes[2] (GET /v1/predictions)`."""
    route = routes[index]
    methods = f"{', '.join(sorted(route.methods))} " if route.methods else ""
    return f"routes[{index}] ({methods}{route.path})"


def _misread(name: str, route: RouteSettings) -> Iterator[Finding]:
    literal = PARAM_REGEX.sub("", route.path)
    if "{" in literal or "}" in literal:
        text = f"{name}: a brace outside of a parameter such as {{id}} is matched as a plain character."
        yield Finding("unmatched-braces", text)
    if _ENCODED.search(literal) or "?" in literal or "#" in literal:
        text = f"{name}: this path never matches: a request's path is compared decoded, and without query."
        yield Finding("undecoded-path", text)
    for method in sorted((route.methods or frozenset()) - set(_METHODS)):
        nearest = nearest_name(method, _METHODS)
        if nearest:  # else it is one of an app's own
            text = f"{name}: {method!r} is not a method that clients use; did you mean {nearest!r}?"
            yield Finding("unknown-method", text)


def _never_reached(routes: Sequence[RouteSettings], table: RouteTable, index: int) -> Iterator[Finding]:
    """A rule that earlier ones take every request from, by all its methods or by some that it lists."""
    route, paths = routes[index], samples(routes[index].path)
    if not paths:
        return
    # What takes a method that no rule lists takes every other one, too.
    methods = sorted(route.methods) if route.methods else [OTHER_METHOD]
    earlier: dict[str, set[int]] = {}
    for method in methods:
        found = {table.match(method, path) for path in paths}
        if index not in found:
            earlier[method] = {rule for rule in found if rule is not None}
    rules = sorted(set().union(*earlier.values()))
    if not rules:
        return
    some = "" if len(earlier) == len(methods) else f" for {', '.join(earlier)}"
    name = rule_name(routes, index)
    exempt = [rule for rule in rules if routes[rule].exempt]
    if exempt and not route.exempt:
        earlier_ones = _rule_names(routes, exempt)
        text = f"{name} never applies{some}: its requests match {earlier_ones} first, and are exempt."
        yield Finding("exempt-covers-route", text)
    else:
        text = f"{name} never applies{some}: its requests match {_rule_names(routes, rules)} first."
        yield Finding("shadowed-route", text)


def _rule_names(routes: Sequence[RouteSettings], indexes: Sequence[int]) -> str:
    named = [rule_name(routes, index) for index in indexes[:NAMED]]
    return " and ".join([*named, f"{len(indexes) - NAMED} more"] if len(indexes) > NAMED else named)
