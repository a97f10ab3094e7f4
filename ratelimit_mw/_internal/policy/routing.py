"""Match of a request with the route rules of the settings: the first one, in file order, counts.

Starlette's own pattern decides every match. The index in front of it only chooses the patterns that are worth
asking, so that a look-up costs the same with one rule and with a thousand.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from starlette.convertors import (
    CONVERTOR_TYPES,
    FloatConvertor,
    IntegerConvertor,
    StringConvertor,
    UUIDConvertor,
)
from starlette.routing import PARAM_REGEX, compile_path

_ONE_SEGMENT = {kind.regex for kind in (StringConvertor, IntegerConvertor, FloatConvertor, UUIDConvertor)}
"""Expressions of parameters that never reach past a slash.

Any other expression, such as that of `path` or of an application's own convertor, is taken to reach to the
end."""

_NO_METHOD = "\0"
"""A method that no rule lists."""


def route_path(scope: Mapping[str, Any]) -> str:
    """The path that routes are matched against: `path` without `root_path`, as Starlette reads it."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    if not root_path or not path.startswith(root_path):
        return path
    rest = path[len(root_path) :]
    return rest if not rest or rest[0] == "/" else path


class HasRoute(Protocol):
    """A rule for a path, such as one of the settings or a route of the app."""

    @property
    def path(self) -> str:
        """Pattern of its paths."""

    @property
    def methods(self) -> frozenset[str] | None:
        """The methods that it is for; None for all."""


class RouteTable:
    """Route rules, indexed once.

    Patterns are Starlette's and must start with a slash (ValueError). As in Starlette, a rule for
    `GET` holds for `HEAD` too, and methods are compared as they are sent.
    """

    def __init__(self, routes: Sequence[HasRoute], flags: int = 0) -> None:
        """`flags` are those of `re`, for the patterns of the rules."""
        self._none = len(routes)
        self.has_rules: bool = bool(routes)
        self._methods: set[str] = set()
        self._index = _Node()
        self._depth = 0
        for pattern in _patterns(routes, flags):
            self._methods.update(pattern.by_method)
            self._depth = max(self._depth, self._index.add(pattern))
        self.literal: dict[str, tuple[dict[str, int | None], int | None]] = {
            route.path: self._by_method(route.path) for route in routes if not PARAM_REGEX.search(route.path)
        }
        """Paths that are patterns as they stand, with the answer for each method and for all others."""

    def match(self, method: str, path: str) -> int | None:
        """Index of the first rule that matches, or None. A WebSocket handshake is a `GET`."""
        if not self._none:
            return None
        literal = self.literal.get(path)
        if literal is not None:
            by_method, other = literal
            return by_method.get(method, other)
        return self._search(method, path)

    @property
    def parts(self) -> list[object]:
        """All that it has many of, each before what it is made of."""
        return list(self._index.nodes()) + list(self.literal.values())

    def of_scope(self, scope: Mapping[str, Any]) -> int | None:
        """Index of the rule that holds for an `http` or `websocket` scope, or None."""
        return self.match(scope.get("method", "GET"), route_path(scope)) if self._none else None

    def _by_method(self, path: str) -> tuple[dict[str, int | None], int | None]:
        """The answer for each method that any rule lists, and the one for all other methods."""
        by_method = {}
        for method in self._methods:
            by_method[method] = self._search(method, path)
        return by_method, self._search(_NO_METHOD, path)

    def _search(self, method: str, path: str) -> int | None:
        candidates: list[_Pattern] = []
        self._index.collect(path.split("/", self._depth), 0, path, candidates)
        if path.endswith("\n"):
            # The `$` that ends Starlette's patterns also matches before a final newline.
            line = path[:-1]
            self._index.collect(line.split("/", self._depth), 0, line, candidates)
        best = none = self._none
        for pattern in reversed(candidates):  # catch-alls last: most often they need not be asked
            index = pattern.by_method.get(method, pattern.other)
            if index < best and pattern.matches(path):
                best = index
        return best if best < none else None


class _Pattern(NamedTuple):
    """All rules of one pattern, whatever its parameters are called."""

    segments: tuple[tuple[str, ...], ...]
    """For each segment the text around its parameters: `("v1",)` is `v1`, `("", ".json")` is `{x}.json`."""
    tail: tuple[str, str] | None
    """Text around a parameter that may reach past a slash: before it in its segment, after it to the end.

    The parameter stands for one more segment and all that follow. None without such a parameter."""
    matches: Callable[[str], object]
    by_method: dict[str, int]
    other: int


_Pieces = tuple[str, str]


@dataclass(slots=True)
class _Node:
    """Patterns that agree up to some segment, told apart by the text of the next one."""

    ends: list[_Pattern] = field(default_factory=list)
    literals: dict[str, "_Node"] = field(default_factory=dict)
    has_parameters: bool = False
    """Whether any of the following three is filled."""
    anything: "_Node | None" = None
    """Patterns whose next segment is one parameter and nothing else."""
    mixed: dict[tuple[int, int], dict[_Pieces, "_Node"]] = field(default_factory=dict)
    """Patterns with text around parameters in the next segment, by the lengths of that text."""
    tails: dict[tuple[int, int], dict[_Pieces, list[_Pattern]]] = field(default_factory=dict)

    def add(self, pattern: _Pattern) -> int:
        """Files a pattern. Returns how many segments it looks at."""
        node = self
        for segment in pattern.segments:
            node = node._child(segment)
        if pattern.tail is None:
            node.ends.append(pattern)
            return len(pattern.segments)
        before, after = pattern.tail
        node.has_parameters = True
        group = node.tails.setdefault((len(before), len(after)), {})
        group.setdefault(pattern.tail, []).append(pattern)
        return len(pattern.segments) + 1

    def nodes(self) -> Iterator["_Node"]:
        """Yield the node, and all below it."""
        yield self
        below = list(self.literals.values())
        for group in self.mixed.values():
            below += group.values()
        if self.anything is not None:
            below.append(self.anything)
        for node in below:
            yield from node.nodes()

    def _child(self, segment: tuple[str, ...]) -> "_Node":
        before, after = segment[0], segment[-1]
        if len(segment) == 1:
            return self.literals.setdefault(before, _Node())
        self.has_parameters = True
        if not before and not after:
            self.anything = self.anything or _Node()
            return self.anything
        group = self.mixed.setdefault((len(before), len(after)), {})
        return group.setdefault((before, after), _Node())

    def collect(self, segments: list[str], at: int, path: str, found: list[_Pattern]) -> None:
        """Adds every pattern that may match all of the path, and few others: `segments[at]` comes next."""
        node = self
        for position in range(at, len(segments)):
            segment = segments[position]
            if node.has_parameters:
                node.collect_open(segment, path, found)
                for child in node.parameter_children(segment):
                    child.collect(segments, position + 1, path, found)
            literal = node.literals.get(segment)
            if literal is None:
                return
            node = literal
        found += node.ends

    def collect_open(self, segment: str, path: str, found: list[_Pattern]) -> None:
        """Adds the patterns that may match from this segment to the end of the path."""
        for (before, after), group in self.tails.items():
            found += group.get((segment[:before], path[len(path) - after :]), ())

    def parameter_children(self, segment: str) -> list["_Node"]:
        """Return the nodes of the patterns whose parameters may stand for this segment."""
        nodes = [] if self.anything is None else [self.anything]
        for (before, after), group in self.mixed.items():
            child = group.get((segment[:before], segment[len(segment) - after :]))
            if child is not None:
                nodes.append(child)
        return nodes


def _patterns(routes: Sequence[HasRoute], flags: int) -> list[_Pattern]:
    """One entry for each distinct pattern, in order of its first rule."""
    rules: dict[tuple[str | None, ...], list[int]] = {}
    for index, route in enumerate(routes):
        if not route.path.startswith("/"):
            raise ValueError(f"a route's path must start with a slash, not {route.path!r}")
        parts = PARAM_REGEX.split(route.path)
        del parts[1::3]  # the parameters' names
        rules.setdefault(tuple(parts), []).append(index)
    return [_pattern(routes, indexes, flags) for indexes in rules.values()]


def _pattern(routes: Sequence[HasRoute], indexes: list[int], flags: int) -> _Pattern:
    by_method: dict[str, int] = {}
    other = len(routes)
    for index in indexes:
        methods = routes[index].methods
        if methods is None:
            other = index
            break  # nothing gets past it
        for method in methods | {"HEAD"} if "GET" in methods else methods:
            by_method.setdefault(method, index)
    path = routes[indexes[0]].path
    segments, tail = _segments(path)
    expression = compile_path(path)[0]
    if flags:
        expression = re.compile(expression.pattern, flags)
    return _Pattern(segments, tail, expression.match, by_method, other)


def _segments(path: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, str] | None]:
    """A pattern's `segments` and `tail`, as `_Pattern` holds them."""
    segments: list[tuple[str, ...]] = []
    pieces = [""]
    texts = PARAM_REGEX.split(path)
    for text, kind in zip(texts[0::3], [*texts[2::3], None], strict=True):
        head, *rest = text.split("/")
        pieces[-1] += head
        for part in rest:
            segments.append(tuple(pieces))
            pieces = [part]
        if kind is not None and CONVERTOR_TYPES[kind.lstrip(":")].regex not in _ONE_SEGMENT:
            return tuple(segments), (pieces[0], texts[-1])
        pieces.append("")
    return (*segments, tuple(pieces[:-1])), None
