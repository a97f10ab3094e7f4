"""Settings that have units taken ahead where none ever can be."""

from collections.abc import Iterator, Sequence

from ratelimit_mw._internal.cache.prefetch_state import SHARE
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding
from ratelimit_mw._internal.settings.tables import PlanSettings

_ALONE = "backend.url is memory://, so no backend has to be asked"


def prefetch_without_effect(settings: Settings) -> Iterator[Finding]:
    """Find each `prefetch` of a plan, of a route's total and of the application that does nothing."""
    takes_slots = all(route.slot or route.exempt for route in settings.routes)
    for name, plan in settings.plans.items():
        if plan.prefetch:
            yield from _note(f"[plans.{name}] prefetch", _why_not_own(settings, plan, takes_slots))
    application = settings.application
    if application.prefetch:
        reason = _why_not_shared(settings, application.requests, "[application] requests", 1)
        yield from _note("[application] prefetch", reason)
    for index, route in enumerate(settings.routes):
        if route.total_prefetch:
            reason = _why_not_shared(settings, route.total, "total", route.cost)
            yield from _note(f"routes[{index}].total_prefetch", reason)


def _note(where: str, reason: str) -> Iterator[Finding]:
    if reason:
        yield Finding("no-effect", f"{where} has no effect: {reason}.", "note")


def _why_not_own(settings: Settings, plan: PlanSettings, takes_slots: bool) -> str:
    """Return the reason why nothing can be taken ahead on any route; empty if something can."""
    application = settings.application
    if not settings.backend.is_shared:
        return _ALONE
    if plan.units:
        return "each request settles metered units of the plan"
    if (application.requests and not application.prefetch) or application.concurrent or application.units:
        return "each request draws on [application], which all callers share"
    return "each request takes a slot of the plan" if plan.concurrent and takes_slots else ""


def _why_not_shared(settings: Settings, windows: Sequence[Window], name: str, cost: int) -> str:
    """Return the reason why nothing can be taken ahead of these windows; empty if something can."""
    if not settings.backend.is_shared:
        return _ALONE
    if not windows:
        return f"{name} has no rate"
    smallest = min(windows, key=lambda window: window.quota)
    # A process has a `SHARE`-th of what it has spent in two windows in hand, and takes two at least.
    if smallest.quota < SHARE * cost:
        return f"{smallest.text} is too small, as fewer than {SHARE} requests fit into it"
    return ""
