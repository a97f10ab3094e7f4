"""Settings and limits in words and as JSON, the same in every command."""

from collections.abc import Mapping
from typing import Any

from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limit_text import limit_text
from ratelimit_mw._internal.model.limits import Limit, Slots, Window
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.outage.unsynced import unshared
from ratelimit_mw._internal.policy.counters import route_scope
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.settings import KeySettings, RouteSettings, Settings, SpendingSettings

SHARED_BY = {
    "caller": "this caller",
    "reported": "this caller",
    "address": "its address",
    "key": "its key",
    "everyone": "all callers",
}
"""Callers that draw on a counter, in words, by the counter's owner."""


def owner_json(counter: Counter) -> str:
    """Owner of a counter, as JSON has it: a limit that only reports is its caller's."""
    return "caller" if counter.owner == "reported" else counter.owner


def limit_json(limit: Limit) -> dict[str, Any]:
    """A limit with its kind and figures."""
    if isinstance(limit, Window):
        rate = {"kind": "rate", "policy": limit.text, "limit": limit.quota, "window": limit.seconds}
        if limit.whole:
            rate["of"] = limit.whole
        return {**rate, "unit": limit.counts} if limit.is_metered else rate
    if isinstance(limit, Slots):
        slots = {"kind": "concurrency", "limit": limit.limit, "unit": limit.unit}
        if limit.whole:
            slots["of"] = limit.whole
        return {**slots, "lease": limit.lease_seconds, "max_hold": limit.max_hold}
    return {
        "kind": "spending",
        "period": limit.period,
        "limit": format_amount(limit.amount, limit.currency),
        "currency": limit.currency,
        "timezone": limit.timezone,
    }


def rates_text(windows: tuple[Window, ...]) -> str:
    """Several rates, or a dash for none."""
    return ", ".join(window.text for window in windows) or "-"


def units_text(units: Mapping[str, tuple[Window, ...]]) -> str:
    """Rates of metered units, or a dash for none."""
    return ", ".join(window.name for windows in units.values() for window in windows) or "-"


def estimates_text(units: Mapping[str, int]) -> str:
    """Estimates of metered units, such as `2000 tokens`, or a dash for none."""
    return ", ".join(f"{amount} {unit}" for unit, amount in units.items()) or "-"


def spending_text(spending: SpendingSettings | None) -> str:
    """A budget in words, or a dash for none."""
    return ", ".join(map(limit_text, spending.budget.allowances)) if spending else "-"


def route_text(route: RouteSettings) -> str:
    """A route by its methods and path, such as `POST /v1/predictions`."""
    return f"{methods_text(route)} {route.path}" if route.methods else route.path


def methods_text(route: RouteSettings) -> str:
    """The methods that a route is for, or `any`."""
    return ", ".join(sorted(route.methods)) if route.methods else "any"


def source_of(settings: Settings, identity: Identity, counter: Counter) -> str:
    """The place in the settings that a caller's limit comes from, such as `plans.pro.requests`."""
    if counter.scope == "a":
        return "identity.per_address"
    if counter.name:
        return f"limits.{counter.name}" if counter.name in settings.limits else f"code: {counter.name}"
    if isinstance(counter.limit, Window | Slots) and counter.limit.whole:
        whole = source_of(settings, identity, unshared(counter))
        return f"{whole}, at plans.{identity.plan}.application_share"
    if counter.scope[:2] == "r:" or counter.scope == "t":
        name, digest = (
            ("total", counter.partition[2:]) if counter.scope == "t" else ("requests", counter.scope[2:])
        )
        scopes = [route_scope(route)[2:] for route in settings.routes]
        return f"routes[{scopes.index(digest)}].{name}"
    name = _name_of(counter.limit)
    unit = f".{counter.limit.counts}" if name == "units" and isinstance(counter.limit, Window) else ""
    if counter.partition == "app":
        return f"application.{name}{unit}"
    key = identity.limits
    if key is not None and getattr(key, name) is not None:
        return f"{source_of_key(settings, key)}.{name}{unit}"
    return f"plans.{identity.plan}.{name}{unit}"


def source_of_key(settings: Settings, key: KeySettings) -> str:
    """Return the place where a key is listed: `keys[3]` of the file, or `live` for a key of `keys set`."""
    return next((f"keys[{index}]" for index, each in enumerate(settings.keys) if each is key), "live")


def _name_of(limit: Limit) -> str:
    if isinstance(limit, Window):
        return "units" if limit.is_metered else "requests"
    return "concurrent" if isinstance(limit, Slots) else "spending"
