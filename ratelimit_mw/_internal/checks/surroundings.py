"""The start-up checks that need the process and the app: how many workers, which middleware around which.

Pure but for `worker_findings` and the defaults of `server_findings`, which are about this process.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ratelimit_mw._internal.checks.plain import is_shared
from ratelimit_mw._internal.checks.processes import processes_serving
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding

MAX_LAYERS = 50
"""Middleware around an app beyond which nothing is looked for."""

_WORKERS = re.compile(r"(?:--workers|-w)(?:=(?P<joined>\d+))?|-w(?P<short>\d+)")
_TRUST = "--forwarded-allow-ips"
_OF_ROUTERS = ("routes", "router", "url_map", "add_route")
"""Attributes that mark an app of a framework as a router, or as having one."""
_ROUTERS = frozenset({"django", "litestar", "blacksheep"})
"""Frameworks whose apps may show nothing of the kind."""


def server_findings(
    settings: Settings,
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """Yield findings from the server's command line and environment; by default from this process's own."""
    arguments = sys.argv if arguments is None else arguments
    environment = os.environ if environment is None else environment
    if not sys.platform.startswith("linux"):  # elsewhere `worker_findings` can't see what runs
        yield from _memory_with_workers(settings, worker_count(arguments, environment))
    if "*" in trusted_by_server(arguments, environment).split(","):
        text = (
            "the server trusts every peer's X-Forwarded-For (--forwarded-allow-ips *) and takes its "
            "left-most address, which any client can write: callers can choose the address that they are "
            "counted by."
        )
        yield Finding("server-trusts-everyone", text)
    named = environment.get("RATELIMIT_SETTINGS")
    if named and settings.file is not None and os.path.realpath(named) != os.path.realpath(settings.file):
        text = (
            f"RATELIMIT_SETTINGS names {named}, but the app's code names {settings.file}, which is in force. "
            "Leave the file out of the code, or the variable out of the environment."
        )
        yield Finding("settings-named-twice", text)


def worker_findings(settings: Settings) -> Iterator[Finding]:
    """Yield findings from the processes that serve with this one, once they run."""
    yield from _memory_with_workers(settings, processes_serving() or 1)


def _memory_with_workers(settings: Settings, workers: int) -> Iterator[Finding]:
    if not is_shared(settings) and workers > 1:
        text = (
            f"backend.url is memory://, and {workers} or more workers run: each worker counts alone, so "
            "callers get each limit that many times. Run one worker, or use Redis or Valkey."
        )
        yield Finding("memory-with-workers", text)


def worker_count(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return the number of processes that serve this app, as far as can be told; 1 by default.

    Reads the option of uvicorn, gunicorn, hypercorn and granian, which wins, and their environment variables.
    If another process started this one, there are at least as many processes as this one's own number. For
    systems on which `processes_serving` can't look.
    """
    for position, argument in enumerate(arguments):
        found = _WORKERS.fullmatch(argument)
        if found:
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            number = found["joined"] or found["short"] or following
            return int(number) if number.isascii() and number.isdigit() else 1
    for name in ("GRANIAN_WORKERS", "WEB_CONCURRENCY"):
        concurrency = environment.get(name, "")
        if concurrency.isascii() and concurrency.isdigit():
            return int(concurrency)
    multiprocessing = sys.modules.get("multiprocessing")  # whose children have it loaded
    if multiprocessing is None or multiprocessing.parent_process() is None or "--reload" in arguments:
        return 1
    number = multiprocessing.current_process().name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else 1


def trusted_by_server(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the peers whose `X-Forwarded-For` the server itself reads.

    Its option names them, else `FORWARDED_ALLOW_IPS`.
    """
    for position, argument in enumerate(arguments):
        if argument == _TRUST and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{_TRUST}="):
            return argument.partition("=")[2]
    return environment.get("FORWARDED_ALLOW_IPS", "")


def mounting_findings(app: Any, ours: type, settings: Settings) -> Iterator[Finding]:
    """Yield findings about an app that `ours` is mounted around."""
    yield from app_findings(app, ours)
    yield from router_findings(app, settings)


def app_findings(app: Any, ours: type) -> Iterator[Finding]:
    """Yield findings about the middleware that lies inside ours, whose class is `ours`."""
    for inner in _inside(app):
        if issubclass(inner, ours):
            yield mounted_twice()
        if inner.__name__ == "CORSMiddleware":
            text = (
                "CORSMiddleware is inside RateLimitMiddleware: browsers can't read refusals, which have no "
                "CORS headers, and preflights are counted. Add CORSMiddleware last, so that it is outside."
            )
            yield Finding("cors-inside", text)


def router_findings(app: Any, settings: Settings) -> Iterator[Finding]:
    """Routers inside the app, of other frameworks than Starlette, that rules for routes are written for."""
    if not settings.routes or settings.paths == "loose":
        return
    for name in dict.fromkeys(_other_routers(app)):
        text = (
            f"the app inside has a router of its own ({name}), which may accept more spellings of a path (a "
            "trailing or a double slash, other case) than Starlette's router and [[routes]] do: such a "
            'request counts under its plan alone. paths = "loose" lets the rules match those spellings, too.'
        )
        yield Finding("other-router", text)


def _other_routers(app: Any) -> Iterator[str]:
    """Names of the classes of such routers, as far as an app shows what it is made of."""
    waiting = [app]
    for _ in range(MAX_LAYERS):
        if not waiting:
            return
        inner = waiting.pop()
        modules = {each.__module__.partition(".")[0] for each in type(inner).__mro__}
        has_routes = any(hasattr(inner, name) for name in _OF_ROUTERS)
        if "starlette" not in modules and (has_routes or modules & _ROUTERS):
            yield f"{type(inner).__module__}.{type(inner).__qualname__}"
            continue
        routes = getattr(inner, "routes", None)
        mounted = [getattr(each, "app", None) for each in routes] if isinstance(routes, list) else []
        # What wraps a function, such as a route's endpoint, has no routes of its own.
        found = (getattr(inner, "middleware_stack", None), getattr(inner, "app", None), *mounted)
        waiting += [each for each in found if each is not None]


def mounted_twice() -> Finding:
    """Return the finding for a request that passed the middleware a second time."""
    text = "RateLimitMiddleware is mounted twice around the same app: each request is charged twice. "
    text += "Keep the outer one."
    return Finding("mounted-twice", text)


def _inside(app: Any) -> Iterator[type]:
    """The classes of the middleware around an app, the outermost first."""
    for _ in range(MAX_LAYERS):
        if app is None:
            return
        yield type(app)
        # Starlette builds its stack at the first call: until then this list is all there is of it.
        if getattr(app, "middleware_stack", None) is None:
            for middleware in getattr(app, "user_middleware", ()):
                if isinstance(middleware.cls, type):
                    yield middleware.cls
        app = getattr(app, "middleware_stack", None) or getattr(app, "app", None)
