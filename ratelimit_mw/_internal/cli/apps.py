"""Apps that commands import, and the limits that these declare in code."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uvicorn.importer import ImportFromStringError, import_from_string

from ratelimit_mw._internal.asgi.app_routes import Mounted, find_app
from ratelimit_mw._internal.asgi.marked_routes import MarkedRoutes
from ratelimit_mw._internal.checks.code_limits import code_limit_findings
from ratelimit_mw._internal.cli.output import CommandError
from ratelimit_mw._internal.policy.by import HeaderValue, PathPart, Whose
from ratelimit_mw._internal.policy.code_limits import Limit, declared
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding
from ratelimit_mw._internal.settings.tables import LimitSettings

_BY = {
    Whose.CALLER: "each caller",
    Whose.ADDRESS: "each address",
    Whose.EVERYONE: "all callers together",
}


def import_app(name: str, folder: str) -> Mounted:
    """Import an app such as `main:app`; a function without parameters is called. Raises `CommandError`."""
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        app = import_from_string(name)
    except ImportFromStringError as error:
        raise CommandError(str(error)) from error
    if inspect.isfunction(app) and not inspect.signature(app).parameters:
        app = app()
    try:
        return find_app(app)
    except LookupError as error:
        raise CommandError(f"{name}: {error}") from error


def limits_in(mounted: Mounted) -> list[Limit]:
    """Return the limits that an app declares, on its routes or elsewhere, each name once."""
    found = {limit.name: limit for limit in sorted({*declared, *MarkedRoutes(mounted.app).limits}, key=repr)}
    return list(found.values())


def marked_in(mounted: Mounted | None) -> list[Limit]:
    """Return the limits in code on an app's routes; none without an app."""
    return [] if mounted is None else list(MarkedRoutes(mounted.app).limits)


def findings_of(mounted: Mounted, settings: Settings) -> list[Finding]:
    """Return what the start-up checks find about limits in code."""
    marked = MarkedRoutes(mounted.app)
    return [*marked.findings, *code_limit_findings(settings, {*declared, *marked.limits})]


def code_limit_text(limit: Limit, settings: Settings) -> str:
    """Return a limit in code in words, as the settings leave it: its name, amounts, and whose count it is."""
    said = settings.limits.get(limit.name, LimitSettings())
    if said.off:
        return f"{limit.name}: off"
    amounts = _amounts(limit, said)
    failures = "" if limit.count == "all" else " failures" if limit.count == "failures" else " some answers"
    shadow = limit.shadow if said.shadow is None else said.shadow
    only = ", shadow" if shadow else ""
    return f"{limit.name}: {', '.join(amounts)}{failures} for {by_text(limit)}{only}"


def by_text(limit: Limit) -> str:
    """Return in words whose count a limit is."""
    if isinstance(limit.by, Whose):
        return _BY[limit.by]
    if isinstance(limit.by, PathPart):
        return f"each {limit.by.name} in the path"
    if isinstance(limit.by, HeaderValue):
        return f"each {limit.by.name} header"
    return f"each key of {getattr(limit.by, '__name__', 'a function')}"


def code_limit_json(limit: Limit, settings: Settings) -> dict[str, Any]:
    """Return a limit in code for programs, as the settings leave it."""
    said = settings.limits.get(limit.name, LimitSettings())
    rates = limit.rates if said.requests is None else said.requests
    slots = said.concurrent or limit.concurrent
    return {
        "name": limit.name,
        "by": by_text(limit),
        "requests": [rate.text for rate in rates],
        "unit": limit.unit,
        "concurrent": None if slots is None else slots.limit,
        "cost": None if callable(limit.cost) else limit.cost,
        "count": limit.count if isinstance(limit.count, str) else "function",
        "shadow": bool(limit.shadow if said.shadow is None else said.shadow),
        "off": said.off,
        "from": f"limits.{limit.name}" if limit.name in settings.limits else "code",
    }


def names_text(limits: Iterable[Limit], settings: Settings) -> str:
    """Return several limits in code in words, or a dash for none."""
    return "; ".join(code_limit_text(limit, settings) for limit in limits) or "-"


def _amounts(limit: Limit, said: LimitSettings) -> list[str]:
    rates = limit.rates if said.requests is None else said.requests
    unit = "" if limit.unit == "requests" else f" {limit.unit}"
    slots = said.concurrent or limit.concurrent
    amounts = [f"{rate.text}{unit}" for rate in rates] + ([f"{slots.limit} at once"] if slots else [])
    return amounts or ["rates by caller"]
