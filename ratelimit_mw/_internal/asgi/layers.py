"""The middleware inside an app: added to it, around it, or around one of the apps mounted in it."""

from collections.abc import Iterator
from typing import Any

from starlette.applications import Starlette

from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware

MAX_PARTS = 10_000
"""Parts of an app among which a middleware is looked for."""
_INNER = ("app", "asgi_app", "middleware_stack", "router", "asgi_handler")
"""Attributes by which apps and middleware of Starlette, FastAPI, Quart and Litestar keep what is inside."""


def middleware_in(app: Any) -> Iterator[RateLimitMiddleware]:
    """Yield every `RateLimitMiddleware` in an app, from the outside to the inside.

    An app of Starlette's or FastAPI's that has served no request yet makes its middleware now.
    """
    waiting, seen = [app], set[int]()
    while waiting and len(seen) < MAX_PARTS:
        part = waiting.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, RateLimitMiddleware):
            yield part
        if isinstance(part, Starlette) and part.middleware_stack is None:
            part.middleware_stack = part.build_middleware_stack()
        waiting += [getattr(part, name, None) for name in _INNER]
        routes = getattr(part, "routes", None)
        waiting += routes if isinstance(routes, list | tuple) else ()
