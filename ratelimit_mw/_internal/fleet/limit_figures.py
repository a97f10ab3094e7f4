"""Status of callers' limits, and the pace at which their budgets burn."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from functools import partial
from heapq import nlargest
from itertools import islice
from typing import TYPE_CHECKING

from ratelimit_mw._internal.fleet.snapshot import LimitFigures
from ratelimit_mw._internal.limiter.inspect_caller import charges_of, limits_by_caller, look, with_rates
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.charge import Charge, Counter, period_key
from ratelimit_mw._internal.model.limit_text import limit_text
from ratelimit_mw._internal.model.limits import SECOND, Allowance
from ratelimit_mw._internal.model.money import TOKEN, format_amount
from ratelimit_mw._internal.model.status import BudgetStatus
from ratelimit_mw._internal.policy.counters import PLAN_SCOPE, route_scope
from ratelimit_mw._internal.policy.decision import LimitStatus
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.settings import RouteSettings

if TYPE_CHECKING:
    from ratelimit_mw._internal.live.rules import Rules

MAX_KEPT = 500
"""Callers and budgets remembered from one look to the next."""
TOGETHER = 2
"""Callers asked for at once: few enough for a turn of the event loop, if each has a hundred limits."""
PACE_SECONDS = 60.0
"""Seconds over which a budget's pace is measured: at most these, and at least `PACE_AFTER`."""
PACE_AFTER = 3.0


class LimitFiguresReader:
    """Asks how callers stand. Costs their limits nothing."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._rules: Rules | None = None
        self._charges: dict[tuple[object, ...], tuple[Charge, ...]] = {}
        self._scopes: Mapping[str, str] = {}
        self._spent: OrderedDict[tuple[str, str], deque[tuple[float, int]]] = OrderedDict()

    async def read(
        self, identities: Iterable[Identity], most: int | None = None
    ) -> list[tuple[LimitFigures, ...]]:
        """The limits of each of them; none of a plan that is gone. Raises `BackendError`.

        If there are more than `most`, those that are used up most.
        """
        await self._go_by_rules()
        found: list[tuple[LimitFigures, ...]] = []
        waiting = iter(identities)
        while some := tuple(islice(waiting, TOGETHER)):
            found += await asyncio.gather(*[self._of(identity, most) for identity in some])
        return found

    async def _go_by_rules(self) -> None:
        rules = self._limiter.engine.live.rules
        if self._rules is not rules or len(self._charges) > MAX_KEPT:
            self._rules, self._charges = rules, {}
            self._scopes = await threads.call(partial(_scopes, rules.settings.routes))

    async def _of(self, identity: Identity, most: int | None) -> tuple[LimitFigures, ...]:
        if identity.plan not in self._limiter.settings.plans:
            return ()
        limits = limits_by_caller(self._limiter)
        key = (identity.partition, identity.plan, identity.address, limits)
        charges = self._charges.get(key)
        if charges is None:  # of thousands of routes, it takes a while
            rated = await with_rates(limits, identity)
            charges = self._charges[key] = await threads.call(
                partial(charges_of, self._limiter, identity, rated)
            )
        found: list[LimitFigures] = []
        for charge in charges:
            decision = await look(self._limiter, [charge])
            found += [self._figures(limit_status, decision.now_us) for limit_status in decision.limits]
            if most is not None and len(found) > most:
                indexes = nlargest(most, range(len(found)), key=lambda each: found[each].share)
                found = [found[each] for each in sorted(indexes)]
            await asyncio.sleep(0)  # a turn of the event loop for each
        return tuple(found)

    def _figures(self, limit_status: LimitStatus, now: int) -> LimitFigures:
        scope = self._scope(limit_status)
        if limit_status.window is not None:
            window, (used, reset_after, _) = limit_status.window
            reset = round(reset_after / SECOND, 3) if used else None
            texts = (str(used), str(window.quota))
            share = round(used / window.quota, 4)
            return LimitFigures(
                window.name, "window", scope, used, window.quota, 0, share, reset, None, *texts, None
            )
        if limit_status.slots is not None:
            slots, (active, _) = limit_status.slots
            texts, share = (str(active), str(slots.limit)), round(active / slots.limit, 4)
            return LimitFigures(
                limit_text(slots), "slots", scope, active, slots.limit, 0, share, None, None, *texts, None
            )
        if limit_status.budget is not None:
            return self._spending(limit_status, *limit_status.budget, scope, now)
        raise TypeError(f"{limit_status} is a limit of no known kind")

    def _spending(
        self, limit_status: LimitStatus, limit: Allowance, status: BudgetStatus, scope: str, now: int
    ) -> LimitFigures:
        spent, held, currency = status.spent, status.held, limit.currency
        unit = 1 if currency == TOKEN else 1_000_000
        reset = round((period_key(limit_status.counter, now).ends - now) / SECOND, 3)
        return LimitFigures(
            name=limit_text(limit),
            kind="spending",
            scope=scope,
            used=spent / unit,
            limit=limit.amount / unit,
            held=held / unit,
            share=round(status.taken / limit.amount, 4) if limit.amount else 1.0,
            reset_after=reset,
            currency=currency,
            used_text=format_amount(spent, currency),
            limit_text=format_amount(limit.amount, currency),
            forecast=self._forecast(limit_status.counter, limit, status.taken, now / SECOND, reset),
        )

    def _forecast(
        self, counter: Counter, limit: Allowance, amount: int, now: float, reset: float
    ) -> float | None:
        """Seconds until the budget is burnt at the pace since the first look within a minute."""
        key = (counter.partition, f"{limit.currency} {limit.period}")
        looks = self._spent.setdefault(key, deque())
        self._spent.move_to_end(key)
        if len(self._spent) > MAX_KEPT:
            self._spent.popitem(last=False)
        looks.append((now, amount))
        while looks[0][0] < now - PACE_SECONDS:
            looks.popleft()
        since, before = looks[0]
        if now - since < PACE_AFTER or amount <= before:
            return None
        left = max(limit.amount - amount, 0) * (now - since) / (amount - before)
        return round(left, 1) if left < reset else None

    def _scope(self, limit_status: LimitStatus) -> str:
        counter = limit_status.counter
        if counter.owner == "address":
            return "address"
        if counter.name:
            return f"limit {counter.name}"
        scope, _, _ = counter.scope.partition(":")
        return "plan" if scope == PLAN_SCOPE else self._scopes.get(counter.scope, "route")


def _scopes(routes: Iterable[RouteSettings]) -> dict[str, str]:
    """The scopes of routes' own limits, each with the words for its route."""
    return {
        route_scope(route): " ".join(["route", *sorted(route.methods or ()), route.path])
        for route in threads.in_pieces(routes)
    }
