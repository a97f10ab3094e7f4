"""Headline for the person on call: one sentence about the fleet, the backend or the callers.

The order is fixed. Without news of the workers, no statement about the backend holds. Without the backend, no
statement about callers holds. Limits that do their job are not an alarm.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from ratelimit_mw._internal.fleet.snapshot import (
    CallerFigures,
    Headline,
    Outcomes,
    PlanFigures,
    Snapshot,
    WorkerFigures,
)
from ratelimit_mw._internal.settings import Settings

DISAGREE_SECONDS = 5.0
"""Seconds for which workers may go by different settings: a change takes two."""
MANY = 30
"""Refusals in a minute below which nothing is an alarm."""
MOST = 0.5
"""Share of a caller's requests, or of everybody's, from which on refusals are an alarm."""
MUCH_OF_PLAN = 0.3
"""Share of a plan's requests from which on refusals are an alarm.

Several of the plan's callers must be refused at this share, too.
"""
CALLERS_OF_PLAN = 3
CAPACITY = 0.1
"""Share of all requests that limits shared by all may refuse."""
HABIT = 2.0
"""Times its usual refusals a minute that a caller may be refused."""

_KINDS = {
    "rate": "request rate",
    "concurrency": "requests at once",
    "spending": "budget",
    "cost": "cost above the limit",
    "capacity": "shared limit",
    "unavailable": "backend away",
    "blocked": "blocked",
}


class Outage(NamedTuple):
    """Facts known about a backend that is away."""

    since: float
    """Time at which this process first missed it, in seconds since 1970."""
    reason: str
    decided: int
    """Requests that this process has decided without it since then."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Facts for the headline that a snapshot doesn't contain."""

    settings: Settings
    outage: Outage | None = None
    disagree_since: float | None = None
    """Time from which on workers have gone by different settings."""
    habits: Mapping[str, float] | None = None
    """Refusals a minute that callers are used to, by their names."""


def headline_of(snapshot: Snapshot, known: Circumstances) -> Headline:
    """The one thing to know first."""
    found = _of_fleet(snapshot, known) if known.outage is None else _of_outage(known.outage, snapshot, known)
    return found or _of_refusals(snapshot, known)


def worst_callers(callers: Iterable[CallerFigures], number: int) -> list[CallerFigures]:
    """Return the callers with the most refusals, at most `number` of them; each has at least one refusal."""
    refused = [caller for caller in callers if caller.outcomes.all_refused]
    return sorted(refused, key=lambda each: (-each.outcomes.all_refused, each.caller))[:number]


def outage_text(settings: Settings, workers: int) -> str:
    """Describe the effect on requests while the backend is away, as the settings define it."""
    usual = settings.backend.on_failure
    others: dict[str, list[str]] = {}
    for name, plan in settings.plans.items():
        if plan.on_failure not in (None, usual):
            others.setdefault(str(plan.on_failure), []).append(name)
    share = settings.backend.local_share
    text = _policy_text(usual, workers, share)
    for policy, plans in others.items():
        text += f" Of plan {', '.join(plans)}: {_policy_text(policy, workers, share)}"
    return text


def _policy_text(policy: str, workers: int, share: float) -> str:
    if policy == "deny":
        return "Requests are refused with 503."
    if policy == "allow":
        return "Every request is let through, and none is counted."
    times = workers * share
    if times <= 1:
        return "Each worker counts alone."
    return f"Each worker counts alone: up to {ceil(times) if share == 1 else f'{times:g}'} times each limit."


def _of_fleet(snapshot: Snapshot, known: Circumstances) -> Headline | None:
    workers = snapshot.workers
    if not workers:
        return _nobody_reports(known.settings)
    silent = [worker for worker in workers if worker.is_silent]
    if silent:
        last = snapshot.now - min(worker.seen for worker in silent)
        number = _count(len(silent), "worker")
        if len(silent) == len(workers):
            more = "All figures on this page are old. Are the workers up, and can they reach the backend?"
            return Headline("alarm", "silent", f"No news from {number} since", more, since=last)
        names = ", ".join(f"{worker.host} {worker.pid}" for worker in silent[:3])
        title = f"No news from {len(silent)} of {_count(len(workers), 'worker')} since"
        return Headline(
            "alarm", "some-silent", title, f"Silent: {names}. The other workers report.", since=last
        )
    away = [worker for worker in workers if not worker.backend_up]
    if away:
        title = f"{len(away)} of {_count(len(workers), 'worker')} cannot reach the backend"
        names = ", ".join(f"{worker.host} {worker.pid}" for worker in away[:3])
        return Headline(
            "alarm", "backend-partly", title, f"{names}. {outage_text(known.settings, len(away))}"
        )
    since = known.disagree_since
    if since is not None and snapshot.now - since >= DISAGREE_SECONDS:
        title = "Workers use different settings since"
        more = (
            f"{_versions(workers)}. The file was not deployed everywhere, or some workers ignore a change "
            "that has mistakes: see their logs."
        )
        return Headline("alarm", "settings", title, more, since=since)
    return None


def _nobody_reports(settings: Settings) -> Headline:
    namespace = settings.backend.namespace
    more = f"Is the app running, and do its settings name this backend and the namespace {namespace}?"
    return Headline("notice", "no-workers", "No worker reports", more)


def _of_outage(outage: Outage, snapshot: Snapshot, known: Circumstances) -> Headline:
    decided = (
        f"This worker has decided {_count(outage.decided, 'request')} in the outage. "
        if outage.decided
        else ""
    )
    more = (
        f"{outage_text(known.settings, len(snapshot.workers))} {decided}"
        f"The backend is asked again all the time; the last error: {outage.reason}"
    )
    return Headline("alarm", "backend", "The backend is away since", more, since=outage.since)


def _of_refusals(snapshot: Snapshot, known: Circumstances) -> Headline:
    minute = _sum(plan.outcomes for plan in snapshot.plans)
    worst = worst_callers(snapshot.callers, 1)
    if not minute.all_refused:
        return Headline("calm", "calm", "Nobody is being refused", "")
    if not worst:
        title = f"{_count(minute.all_refused, 'request')} of the last minute were refused"
        return Headline("notice", "refusals", title, _reasons(minute))
    caller = worst[0]
    return (
        _of_everybody(snapshot, minute)
        or _of_plan(snapshot)
        or _of_caller(caller, minute, known)
        or _quiet(caller, minute)
    )


def _of_everybody(snapshot: Snapshot, minute: Outcomes) -> Headline | None:
    refused, share = minute.all_refused, minute.all_refused / minute.all_requests
    capacity = minute.refused.get("capacity", 0)
    callers = [caller for caller in snapshot.callers if _mostly_refused(caller.outcomes)]
    if capacity >= MANY and capacity >= CAPACITY * minute.all_requests:
        more = (
            f"{_of_all(capacity, minute)} were refused by limits that all callers share. The callers that "
            "use most of these limits are the first ones under “Busiest”."
        )
        return Headline("alarm", "capacity", "The service is at its own limits", more)
    if refused >= MANY and share >= MOST and len(callers) >= CALLERS_OF_PLAN:
        is_most = 2 * len(callers) >= len(snapshot.callers)
        if is_most:
            more = (
                f"{_of_all(refused, minute)} were refused ({_reasons(minute)}). Most requests of "
                f"{len(callers)} of {len(snapshot.callers)} callers were refused. Was something deployed?"
            )
            return Headline("alarm", "everybody", "Most requests of nearly everybody are refused", more)
    return None


def _of_plan(snapshot: Snapshot) -> Headline | None:
    for plan in sorted(snapshot.plans, key=lambda each: -each.outcomes.all_refused):
        outcomes = plan.outcomes
        callers = [
            caller for caller in snapshot.callers
            if caller.plan == plan.plan and _mostly_refused(caller.outcomes, MUCH_OF_PLAN)
        ]  # fmt: skip
        if (
            outcomes.all_refused >= MANY
            and outcomes.all_refused >= MUCH_OF_PLAN * outcomes.all_requests
            and len(callers) >= CALLERS_OF_PLAN
        ):
            return _plan_headline(plan, len(callers))
    return None


def _plan_headline(plan: PlanFigures, callers: int) -> Headline:
    more = (
        f"{_of_all(plan.outcomes.all_refused, plan.outcomes)} were refused on this plan "
        f"({_reasons(plan.outcomes)}), of {callers} callers."
    )
    return Headline("alarm", "plan", f"Many callers of plan {plan.plan} are refused", more, plan=plan.plan)


def _of_caller(caller: CallerFigures, minute: Outcomes, known: Circumstances) -> Headline | None:
    refused = caller.outcomes.all_refused
    usual = (known.habits or {}).get(caller.caller, 0.0)
    if refused < MANY or not _mostly_refused(caller.outcomes) or refused <= HABIT * usual:
        return None
    habit = f" Usually it has {usual:.0f} refusals a minute." if usual >= 1 else ""
    return _caller_headline("alarm", caller, minute, habit)


def _quiet(caller: CallerFigures, minute: Outcomes) -> Headline:
    return _caller_headline("notice", caller, minute, " The limits work as intended.")


def _caller_headline(
    level: Literal["alarm", "notice"], caller: CallerFigures, minute: Outcomes, more: str
) -> Headline:
    refused = caller.outcomes.all_refused
    share = _percent(refused / max(minute.all_refused, refused))
    verb = "was" if refused == 1 else "were"
    text = (
        f"{refused:,} of its {_count(caller.outcomes.all_requests, 'request')} in the last minute "
        f"{verb} refused ({_reasons(caller.outcomes)}): {share} of all refusals. "
        f"Its plan is {caller.plan or 'unknown'}.{more}"
    )
    return Headline(level, "caller", "is refused most", text, caller.caller, caller.plan)


def _mostly_refused(outcomes: Outcomes, share: float = MOST) -> bool:
    return outcomes.all_refused > 0 and outcomes.all_refused >= share * outcomes.all_requests


def _versions(workers: Sequence[WorkerFigures]) -> str:
    numbers: dict[str, int] = {}
    for worker in workers:
        numbers[worker.version] = numbers.get(worker.version, 0) + 1
    return ", ".join(
        f"{version} in {_count(number, 'worker')}" for version, number in sorted(numbers.items())
    )


def _reasons(outcomes: Outcomes) -> str:
    found = sorted(((number, name) for name, number in outcomes.refused.items() if number), reverse=True)
    return ", ".join(_KINDS.get(name, name) for _, name in found)


def _of_all(number: int, outcomes: Outcomes) -> str:
    return f"{number:,} of {_count(outcomes.all_requests, 'request')} in the last minute"


def _percent(share: float) -> str:
    return f"{share:.0%}" if 0.005 <= share <= 0.995 or share == 1 else "<1%" if share < 0.5 else ">99%"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _sum(several: Iterable[Outcomes]) -> Outcomes:
    admitted, shadow, refused = 0, 0, dict[str, int]()
    for outcomes in several:
        admitted, shadow = admitted + outcomes.admitted, shadow + outcomes.shadow
        for reason, number in outcomes.refused.items():
            refused[reason] = refused.get(reason, 0) + number
    return Outcomes(admitted, shadow, refused)
