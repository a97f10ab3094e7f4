"""`ratelimit-mw show` and `ratelimit-mw reset`: what is counted of a caller, seen and cleared."""

import asyncio
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from ratelimit_mw._internal.asgi.app_routes import Mounted
from ratelimit_mw._internal.cli.apps import marked_in
from ratelimit_mw._internal.cli.callers import (
    NamedCaller,
    block_of,
    facts_of,
    find_callers,
    has_known_partition,
    without_placeholder,
)
from ratelimit_mw._internal.cli.names import Caller, is_name
from ratelimit_mw._internal.cli.output import (
    CommandError,
    UsageError,
    console,
    print_facts,
    print_json,
    print_table,
)
from ratelimit_mw._internal.cli.recording import PATIENCE, record
from ratelimit_mw._internal.cli.texts import SHARED_BY, limit_json, owner_json, source_of
from ratelimit_mw._internal.limiter.inspect_caller import forget, overview, shared_overview
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.charge import period_key
from ratelimit_mw._internal.model.limit_text import amount_text, limit_text
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.settings import Settings

T = TypeVar("T")


class Cleared(NamedTuple):
    """Number of counters of a caller that were cleared, and of those among them that had counted anything."""

    partition: str
    counters: int
    in_use: int


def show(settings: Settings, named: NamedCaller, mounted: Mounted | None = None, *, as_json: bool) -> None:
    """Print how everything stands that is counted of a caller; of nobody: what all callers share.

    Raises `CommandError` and `BackendError`.
    """
    limiter, limits = patient_limiter(settings), marked_in(mounted)
    limiter.marked.update(limits)
    found = run_with(limiter, _look(limiter, named))
    if as_json:
        callers = [
            {**_caller_json(settings, *each), "blocked": _block(limiter, named, each[0])} for each in found
        ]
        print_json({"callers": callers})
        return
    for index, (caller, decision) in enumerate(found):
        if index:
            console.print()
        _print(settings, caller, decision, _block(limiter, named, caller))


def reset(settings: Settings, named: NamedCaller, mounted: Mounted | None = None, *, as_json: bool) -> None:
    """Clear everything that is counted of a caller. Raises `CommandError` and `BackendError`."""
    if named.is_nobody:
        raise UsageError("reset needs a caller: give CALLER, --key, --address or --account")
    limiter, limits = patient_limiter(settings), marked_in(mounted)
    limiter.marked.update(limits)
    cleared = run_with(limiter, _clear(limiter, named))
    asyncio.run(_record(settings, cleared))
    if as_json:
        print_json({"cleared": [each._asdict() for each in cleared]})
        return
    for each in cleared:
        # As of a caller that was mistyped, or under a namespace that no app counts in.
        unused = "" if each.in_use else "; none of them had counted anything"
        console.print(f"{each.partition}: {_cleared_text(each.counters)}{unused}")


def patient_limiter(settings: Settings) -> Limiter:
    """A limiter that waits for its backend as long as a person would. Raises `CommandError` without one."""
    check_shared(settings)
    timeout = max(settings.backend.timeout, PATIENCE)
    backend = settings.backend.model_copy(update={"timeout": timeout})
    return Limiter(settings.model_copy(update={"backend": backend}))


def check_shared(settings: Settings) -> None:
    """Raise `CommandError` for a backend that no command can look into."""
    if not settings.backend.is_shared:
        raise CommandError(
            f"{settings.source}: backend.url is memory://, so counts are in the memory of each process, and "
            "no command can read them; set RATELIMIT_BACKEND__URL here if the app's environment has it"
        )


def run_with(limiter: Limiter, question: Coroutine[None, None, T]) -> T:
    """Run a question to a limiter's backend, and close the limiter."""

    async def run() -> T:
        try:
            return await question
        finally:
            await limiter.close()

    return asyncio.run(run())


async def _look(limiter: Limiter, named: NamedCaller) -> list[tuple[Caller | None, Decision]]:
    if named.is_nobody:
        return [(None, await shared_overview(limiter))]
    callers = await find_callers(limiter, named)
    return [(caller, await overview(limiter, _counted(caller))) for caller in callers]


async def _clear(limiter: Limiter, named: NamedCaller) -> list[Cleared]:
    identities = [_counted(caller) for caller in await find_callers(limiter, named)]
    cleared = []
    for identity in identities:
        before = await overview(limiter, identity)
        in_use = sum(limit_status.remaining < limit_status.limit for limit_status in before.limits)
        cleared.append(Cleared(identity.partition, await forget(limiter, identity), in_use))
    return cleared


async def _record(settings: Settings, cleared: Sequence[Cleared]) -> None:
    names = [each.partition for each in cleared]
    await record(settings, "reset", names, _cleared_text(sum(each.counters for each in cleared)))


def _cleared_text(counters: int) -> str:
    return f"{counters} counter{'' if counters == 1 else 's'} cleared"


def _counted(caller: Caller) -> Identity:
    if not has_known_partition(caller):
        raise CommandError("this caller is counted by its address: name the address with --address")
    return without_placeholder(caller)


def _caller_json(settings: Settings, caller: Caller | None, decision: Decision) -> dict[str, Any]:
    identity = caller.identity if caller else None
    return {
        "partition": identity.partition if identity else None,
        "label": caller.label if caller else None,
        "api_key_hash": identity.api_key_hash if identity else None,
        "account": identity.account if identity else None,
        "plan": identity.plan if identity else None,
        "limits": [
            {
                **limit_json(limit_status.counter.limit),
                **_status_json(limit_status, decision.now_us),
                "owner": owner_json(limit_status.counter),
                "from": source_of(settings, identity or _NOBODY, limit_status.counter),
            }
            for limit_status in decision.limits
        ],
    }


def _status_json(limit_status: LimitStatus, now: int) -> dict[str, Any]:
    if limit_status.window is not None:
        window, rate = limit_status.window
        remaining = max(window.quota - rate.used, 0)
        return {"used": rate.used, "remaining": remaining, "reset_after": rate.reset_after_us / SECOND}
    if limit_status.slots is not None:
        slots, status = limit_status.slots
        return {"active": status.active, "remaining": max(slots.limit - status.active, 0)}
    if limit_status.budget is not None:
        budget, (spent, held, _) = limit_status.budget
        amounts = {"spent": spent, "held": held, "remaining": max(budget.amount - spent - held, 0)}
        texts = {name: format_amount(amount, budget.currency) for name, amount in amounts.items()}
        return {**texts, "reset": period_key(limit_status.counter, now).ends // SECOND}
    raise TypeError(f"{limit_status} is a limit of no known kind")


def _block(limiter: Limiter, named: NamedCaller, caller: Caller | None) -> str | None:
    """The setting by which every request of a caller is refused; None where none does."""
    address = named.address if named.address and not is_name(named.address) else None
    return None if caller is None else block_of(limiter, caller.identity, address)


def _print(settings: Settings, caller: Caller | None, decision: Decision, blocked: str | None) -> None:
    if caller is None:
        print_facts([("caller", "all of them together")])
    else:
        refused = [("blocked", f"every request is refused with 403 ({blocked})")] if blocked else []
        print_facts([*facts_of(caller), *refused])
    console.print()
    if not decision.limits:
        console.print("no limits")
        return
    identity = caller.identity if caller else _NOBODY
    columns = ("limit", "used", "held", "left", "next reset", "counted for", "from")
    rows = []
    for limit_status in decision.limits:
        counter = limit_status.counter
        source = source_of(settings, identity, counter)
        cells = _status_row(limit_status, decision.now_us)
        rows.append((limit_text(counter.limit), *cells, SHARED_BY[counter.owner], source))
    print_table(columns, rows)


def _status_row(limit_status: LimitStatus, now: int) -> tuple[object, ...]:
    """Used, held, left and next reset."""
    if limit_status.window is not None:
        window, rate = limit_status.window
        reset = f"in {-(-rate.reset_after_us // SECOND)} s" if rate.used else "-"
        return rate.used, "-", max(window.quota - rate.used, 0), reset
    if limit_status.slots is not None:
        slots, status = limit_status.slots
        return "-", status.active, max(slots.limit - status.active, 0), "-"
    if limit_status.budget is not None:
        budget, (spent, held, _) = limit_status.budget
        left = max(budget.amount - spent - held, 0)
        ends = datetime.fromtimestamp(period_key(limit_status.counter, now).ends // SECOND, UTC)
        amounts = [amount_text(amount, budget.currency) for amount in (spent, held, left)]
        return *amounts, ends.strftime("%Y-%m-%d %H:%M UTC")
    raise TypeError(f"{limit_status} is a limit of no known kind")


_NOBODY = Identity("", "")
"""For limits that all callers share, which come from no plan."""
