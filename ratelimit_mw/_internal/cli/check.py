"""`ratelimit-mw check`: load a file as the app would, and say what it means."""

import os
import re
from collections.abc import Mapping
from typing import Any

from ratelimit_mw._internal.asgi.app_routes import Mounted
from ratelimit_mw._internal.checks.plain import findings
from ratelimit_mw._internal.cli.apps import code_limit_json, code_limit_text, findings_of, limits_in
from ratelimit_mw._internal.cli.output import (
    DONE,
    REFUSED,
    console,
    print_error,
    print_facts,
    print_json,
    print_table,
    without_unused,
)
from ratelimit_mw._internal.cli.texts import (
    estimates_text,
    limit_json,
    methods_text,
    rates_text,
    spending_text,
    units_text,
)
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.limits import Slots, Window
from ratelimit_mw._internal.runtime.compiled import is_compiled
from ratelimit_mw._internal.settings import (
    PlanSettings,
    RouteSettings,
    Settings,
    SettingsError,
    SettingsProblem,
)
from ratelimit_mw._internal.settings.findings import Finding
from ratelimit_mw._internal.settings.locations import Location, located, locations_of
from ratelimit_mw._internal.settings.sources import read_file_bytes

_PATH = re.compile(r"routes\[\d+\]|(?:plans|backend|identity|operations|application)\.[A-Za-z0-9_-]+")
"""Pattern of the path that a finding's text names: the setting that the finding is about."""


_SHOWN = 10
"""Networks of a kind that are printed; of the others only their number is told."""


def check(file: str | None, mounted: Mounted | None = None, *, as_json: bool) -> int:
    """Print a summary of the settings, or every error; returns the exit status.

    Of an app, also what it declares in code, and where that and the settings don't fit together.
    """
    file = file or os.environ.get("RATELIMIT_SETTINGS") or None
    try:
        settings = Settings.load(file)
        Limiter(settings)
    except SettingsError as error:
        problems = located(error, _text(file), file or "").problems
        if as_json:
            print_json({"ok": False, "errors": list(map(_problem_json, problems))})
        else:
            for problem in problems:
                print_error(str(problem))
        return REFUSED
    if as_json:
        locations = locations_of(_text(file))
        print_json(_summary(settings, locations) | _app_json(mounted, settings, locations))
    else:
        _print_summary(settings)
        if mounted is not None:
            _print_app(mounted, settings)
    return DONE


def _app_json(
    mounted: Mounted | None, settings: Settings, locations: Mapping[str, Location]
) -> dict[str, Any]:
    """Limits in code, for programs; nothing without an app."""
    if mounted is None:
        return {}
    found = findings_of(mounted, settings)
    return {
        "code_limits": [code_limit_json(limit, settings) for limit in limits_in(mounted)],
        "code_warnings": [_warning_json(finding, settings.source, locations) for finding in found],
    }


def _print_app(mounted: Mounted, settings: Settings) -> None:
    """Limits in code, for people."""
    console.print()
    for limit in limits_in(mounted):
        console.print(f"in code       {code_limit_text(limit, settings)}", soft_wrap=True, markup=False)
    for finding in findings_of(mounted, settings):
        console.print(f"{finding.level}: {finding}", soft_wrap=True, markup=False)


def _text(file: str | None) -> str:
    """Return the text of a file, empty if no file is given or the file can't be read."""
    try:
        return "" if file is None else read_file_bytes(file).decode("utf-8-sig", errors="replace")
    except SettingsError:
        return ""


def _problem_json(problem: SettingsProblem) -> dict[str, Any]:
    """A problem as editors and CI systems mark it in the file."""
    line, column = problem.location or (None, None)
    values = problem._asdict()
    del values["location"]
    message = str(problem._replace(file="", location=None))
    return {**values, "line": line, "column": column, "severity": "error", "message": message}


def _warning_json(finding: Finding, source: str, locations: Mapping[str, Location]) -> dict[str, Any]:
    path = _PATH.search(finding.text)
    location = locations.get(path[0]) if path else None
    return {
        **finding._asdict(),
        "link": finding.link,
        "file": source,
        "line": location and location.line,
        "column": location and location.column,
        "severity": finding.level,
        "message": finding.text,
    }


def _summary(settings: Settings, locations: Mapping[str, Location]) -> dict[str, Any]:
    backend, identity = settings.backend, settings.identity
    return {
        "ok": True,
        "source": settings.source,
        "compiled": is_compiled(),
        "shadow": settings.shadow,
        "backend": {**backend.model_dump(exclude={"url"}), "url": backend.safe_url},
        "identity": {
            **identity.model_dump(mode="json", exclude={"hash_secret", "per_address"}),
            "hash_secret": bool(identity.hash_secret),
            "per_address": [limit_json(window) for window in identity.per_address],
        },
        "response": settings.response.model_dump(),
        "application": {
            **_limits(settings.application.requests, settings.application.concurrent),
            "units": _units(settings.application.units),
            "prefetch": settings.application.prefetch,
        },
        "plans": {name: _plan(plan) for name, plan in settings.plans.items()},
        "keys": len(settings.keys),
        "addresses": [{"network": str(each.network), "plan": each.plan} for each in settings.addresses],
        "routes": [_route(route) for route in settings.routes],
        "warnings": [_warning_json(finding, settings.source, locations) for finding in findings(settings)],
    }


def _limits(requests: Any, concurrent: Slots | None) -> dict[str, Any]:
    return {
        "requests": [limit_json(window) for window in requests],
        "concurrent": None if concurrent is None else limit_json(concurrent),
    }


def _units(units: Mapping[str, tuple[Window, ...]]) -> dict[str, Any]:
    return {unit: [limit_json(window) for window in windows] for unit, windows in units.items()}


def _plan(plan: PlanSettings) -> dict[str, Any]:
    allowances = plan.spending.budget.allowances if plan.spending else ()
    others = plan.model_dump(
        include={"shadow", "on_failure", "share", "prefetch", "blocked", "application_share"}
    )
    spending = [limit_json(allowance) for allowance in allowances]
    limits = _limits(plan.requests, plan.concurrent)
    return {**limits, "units": _units(plan.units), "spending": spending, **others}


def _route(route: RouteSettings) -> dict[str, Any]:
    return {
        "path": route.path,
        "methods": sorted(route.methods) if route.methods else None,
        "requests": [limit_json(window) for window in route.requests],
        "total": [limit_json(window) for window in route.total],
        "total_prefetch": route.total_prefetch,
        "price": None if route.price is None else str(route.price),
        **route.model_dump(include={"exempt", "cost", "units", "slot", "on_failure", "shadow"}),
    }


def _print_summary(settings: Settings) -> None:
    console.print(f"{settings.source}: good")
    console.print()
    print_facts(_facts(settings))
    console.print()
    plan_columns = ("plan", "requests", "units", "concurrent", "spending", "keys")
    plans = [_plan_row(settings, name) for name in settings.plans]
    print_table(*without_unused(plan_columns, plans, "units"))
    if settings.routes:
        console.print()
        columns = ("route", "path", "cost", "price", "units", "each caller", "all callers", "")
        print_table(*without_unused(columns, map(_route_row, settings.routes), "units"))
    found = findings(settings)
    if found:
        console.print()
    for finding in found:
        console.print(f"{finding.level}: {finding}", soft_wrap=True)


def _facts(settings: Settings) -> list[tuple[str, str]]:
    backend, identity, application = settings.backend, settings.identity, settings.application
    where = backend.safe_url
    if not where.startswith("memory:"):
        where += f", namespace {backend.namespace}"
    hashes = "hmac-sha256" if identity.hash_secret else "sha256, without a hash_secret"
    facts = [
        ("backend", where),
        ("backend away", f"{backend.on_failure}, after {backend.timeout:g} s without an answer"),
        ("API keys", f"{', '.join(identity.api_key_headers)}; {len(settings.keys)} listed; kept as {hashes}"),
        ("unknown keys", _unknown_keys(settings)),
        ("no key", f"plan {identity.anonymous_plan}, counted by address"),
        ("proxies", ", ".join(map(str, identity.trusted_proxies)) or "none trusted"),
    ]
    if settings.addresses:
        plans = ", ".join(f"{each.network} has plan {each.plan}" for each in settings.addresses[:_SHOWN])
        more = f" and {len(settings.addresses) - _SHOWN} more" if len(settings.addresses) > _SHOWN else ""
        facts.append(("networks", plans + more))
    if identity.blocked_networks:
        networks = ", ".join(map(str, identity.blocked_networks[:_SHOWN]))
        number = len(identity.blocked_networks)
        facts.append(("blocked", networks + (f" and {number - _SHOWN} more" if number > _SHOWN else "")))
    if identity.per_address:
        facts.append(("per address", rates_text(identity.per_address)))
    if application.requests or application.concurrent:
        facts.append(("all callers", f"{rates_text(application.requests)}; {_slots(application.concurrent)}"))
    if application.units:
        facts.append(("units of all", units_text(application.units)))
    if settings.shadow:
        facts.append(("shadow", "on: nothing is ever refused"))
    return facts


def _unknown_keys(settings: Settings) -> str:
    identity = settings.identity
    if identity.unknown_keys == "anonymous":
        return f"plan {identity.anonymous_plan}, counted by address"
    return f"plan {identity.default_plan}, counted by key"


def _plan_row(settings: Settings, name: str) -> tuple[object, ...]:
    plan = settings.plans[name]
    keys = sum(key.plan == name for key in settings.keys)
    notes = [note for note, holds in (("blocked", plan.blocked), ("shadow", plan.shadow)) if holds]
    if plan.application_share < 1:
        notes.append(f"{plan.application_share:g} of shared limits")
    return (
        f"{name} ({', '.join(notes)})" if notes else name,
        rates_text(plan.requests),
        units_text(plan.units),
        _slots(plan.concurrent),
        spending_text(plan.spending),
        keys or "-",
    )


def _route_row(route: RouteSettings) -> tuple[object, ...]:
    says = [] if route.slot or route.exempt else ["no slot"]
    says += ["exempt"] if route.exempt else []
    says += ["shadow"] if route.shadow else []
    says += [f"{route.on_failure} when backend is away"] if route.on_failure else []
    price = "-" if route.price is None else route.price
    cost = "-" if route.exempt else route.cost
    own, total = rates_text(route.requests), rates_text(route.total)
    units = estimates_text(route.units)
    return methods_text(route), route.path, cost, price, units, own, total, ", ".join(says)


def _slots(slots: Slots | None) -> str:
    return f"{slots.limit} at once" if slots else "-"
