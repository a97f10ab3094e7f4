"""Match of a request with the route rules for apps whose router reads paths less strictly than Starlette's.

Such a router runs a route for a trailing slash, for double slashes, for letters of the other case, or for a
slash that is encoded within a segment. With `paths = "loose"` its rule holds for all of these.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from starlette.routing import PARAM_REGEX

from ratelimit_mw._internal.policy.routing import RouteTable, route_path
from ratelimit_mw._internal.settings import RouteSettings, Settings

_SLASHES = re.compile("/{2,}")
_DOTTED = str.maketrans("\u0130\u0131", "ii")
"""Letters that regular expressions take for an `i` of the other case, and `casefold` does not."""
_ENCODED_SLASH = b"%2f"
_SLASH_IN_SEGMENT = "\0"
"""Character in place of a slash that was encoded: any parameter of one segment matches it."""


def route_table(settings: Settings) -> RouteTable:
    """Return the route rules, to be matched as the settings say."""
    return LooseRouteTable(settings.routes) if settings.paths == "loose" else RouteTable(settings.routes)


def loosened(path: str) -> str:
    """Return the form that all spellings of a path have in common."""
    form = _SLASHES.sub("/", path).translate(_DOTTED).casefold()
    return form.rstrip("/") or "/"


class LooseRouteTable(RouteTable):
    """The route rules, each for every spelling of its path.

    Of two rules for one path the one with the request's own spelling holds. An exempt rule holds for its own
    spelling alone: another spelling may be a route of its own, which would then be limited by nothing.
    """

    def __init__(self, routes: Sequence[RouteSettings]) -> None:
        super().__init__(routes)
        self._forms = [_loosened_pattern(route.path) for route in routes]
        self._indexes = [index for index, route in enumerate(routes) if not route.exempt]
        limited = [routes[index].model_copy(update={"path": self._forms[index]}) for index in self._indexes]
        self._limited = RouteTable(limited, re.IGNORECASE)

    def match(self, method: str, path: str) -> int | None:
        """Index of the first rule that matches, or None. A WebSocket handshake is a `GET`."""
        return self._first(super().match(method, path), self._loose(method, path))

    def of_scope(self, scope: Mapping[str, Any]) -> int | None:
        """Index of the rule that holds for an `http` or `websocket` scope, or None."""
        method = scope.get("method", "GET")
        index = self.match(method, route_path(scope))
        raw = scope.get("raw_path") or b""
        if _ENCODED_SLASH not in raw.lower():
            return index
        segments = raw.partition(b"?")[0].decode("latin-1").split("/")
        path = "/".join([unquote(segment).replace("/", _SLASH_IN_SEGMENT) for segment in segments])
        return self._first(index, self._loose(method, route_path({**scope, "path": path})))

    def _loose(self, method: str, path: str) -> int | None:
        form = loosened(path)
        # With a slash at its end, too: the rest of `/files/{rest:path}` may be nothing.
        found = [self._limited.match(method, each) for each in (form, f"{form.rstrip('/')}/")]
        return min((self._indexes[index] for index in found if index is not None), default=None)

    def _first(self, exact: int | None, loose: int | None) -> int | None:
        if exact is None or loose is None:
            return loose if exact is None else exact
        return exact if self._forms[exact] == self._forms[loose] else min(exact, loose)


def _loosened_pattern(pattern: str) -> str:
    """Return a pattern with the text around its parameters as `loosened` has it."""
    parts = PARAM_REGEX.split(pattern)
    texts = [_SLASHES.sub("/", text).translate(_DOTTED).casefold() for text in parts[0::3]]
    kinds = [kind or "" for kind in parts[2::3]]
    made = texts[0]
    for name, kind, text in zip(parts[1::3], kinds, texts[1:], strict=True):
        made += f"{{{name}{kind}}}{text}"
    return made.rstrip("/") or "/"
