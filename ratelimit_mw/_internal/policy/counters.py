"""Counters of a request: where each limit of a plan, a route and the application is counted."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import Limit, Slots, Window
from ratelimit_mw._internal.policy.identity import Identity, address_partition
from ratelimit_mw._internal.settings import PlanSettings, RouteSettings, Settings

PLAN_SCOPE = "p"
"""Scope of what a plan limits. Not the plan's name: changing plans keeps what was counted."""
TOTAL_SCOPE = "t"
"""Scope of what a route limits of all callers together."""
APPLICATION_SCOPE = "app"
"""Scope of what `[application]` limits, but for metered units: these have scopes of their own."""


def plan_of(settings: Settings, identity: Identity) -> PlanSettings:
    """Return the plan of a caller, with the limits that its key has in place of the plan's."""
    plan, key = settings.plans[identity.plan], identity.limits
    if key is None:
        return plan
    own = {
        name: value
        for name in ("requests", "units", "concurrent", "spending")
        if (value := getattr(key, name)) is not None
    }
    return plan.model_copy(update=own)


def route_counters(
    settings: Settings, identity: Identity, plan: PlanSettings, rule: RouteSettings
) -> Iterator[Counter]:
    """Yield the limits of a caller under a route rule: its own first, those that everyone shares last."""
    if plan.blocked:
        return
    caller, scope = identity.partition, route_scope(rule)
    limits: list[Limit] = [*plan.requests, *_slots(plan.concurrent, rule)]
    if plan.spending is not None:
        limits += plan.spending.budget.allowances
    yield from (Counter(caller, PLAN_SCOPE, limit) for limit in limits)
    yield from _unit_counters(caller, PLAN_SCOPE, plan.units)
    yield from (Counter(caller, scope, window) for window in rule.requests)
    if identity.address is not None:
        address = address_partition(identity.address)
        yield from (Counter(address, "a", window, "address") for window in settings.identity.per_address)
    yield from shared_counters(settings, rule, plan.application_share)


def shared_counters(settings: Settings, rule: RouteSettings, share: float = 1.0) -> Iterator[Counter]:
    """Yield the limits that all callers share under a route rule, at the share of them that a plan may use.

    Whatever the share is, the count is one.
    """
    total, application = f"t:{route_scope(rule)[2:]}", settings.application
    yield from (Counter(total, TOTAL_SCOPE, window.at_share(share), "everyone") for window in rule.total)
    slots = _slots(application.concurrent, rule)
    yield from (
        Counter("app", APPLICATION_SCOPE, limit.at_share(share), "everyone") for limit in application.requests
    )
    yield from (Counter("app", APPLICATION_SCOPE, limit.at_share(share), "everyone") for limit in slots)
    units = {
        unit: tuple([each.at_share(share) for each in rates]) for unit, rates in application.units.items()
    }
    yield from _unit_counters("app", "app", units, "everyone")


def shared_scopes_ahead(settings: Settings, rule: RouteSettings) -> list[str]:
    """Return the scopes of the limits of all callers that workers take units ahead of, under a route rule."""
    said = {TOTAL_SCOPE: rule.total_prefetch, APPLICATION_SCOPE: settings.application.prefetch}
    return [scope for scope, is_ahead in said.items() if is_ahead]


def _slots(slots: Slots | None, rule: RouteSettings) -> tuple[Slots, ...]:
    return (slots,) if slots is not None and rule.slot else ()


def _unit_counters(
    partition: str,
    scope: str,
    units: Mapping[str, tuple[Window, ...]],
    owner: Literal["caller", "everyone"] = "caller",
) -> Iterator[Counter]:
    """The counters of metered units, each unit in a scope of its own."""
    for unit, windows in units.items():
        yield from (Counter(partition, f"{scope}:{unit}", window, owner) for window in windows)


def route_scope(route: RouteSettings) -> str:
    """Return the scope of a route's own limits: by its path and methods, not by its place in the file."""
    methods = "*" if route.methods is None else ",".join(sorted(route.methods))
    return f"r:{hashlib.sha256(f'{methods} {route.path}'.encode()).hexdigest()[:16]}"
