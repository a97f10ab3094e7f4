"""Decision about a request, and the status of its limits."""

import random
import time
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import partial
from typing import Literal, NamedTuple

from ratelimit_mw._internal.model.charge import Charge, Counter, period_key
from ratelimit_mw._internal.model.limits import REQUESTS, SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import ReservationKey
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.policy.policy import Policy

Reason = Literal["rate", "concurrency", "spending", "cost", "capacity", "unavailable", "blocked"]
"""Reason for a refusal.

`rate`, `concurrency` and `spending` are kinds of limit. `cost`: the cost never fits. `capacity`: a limit
that everyone shares refused. `unavailable`: the backend is away and the settings say to refuse. `blocked`:
the caller's plan or network is blocked."""

SLOT_HINT = (1.0, 3.0)
"""Seconds, from and to, before another try for a slot; spread so that callers don't return in step."""


class LimitStatus(NamedTuple):
    """One limit and how it stands after the decision."""

    counter: Counter
    status: Status
    """A `WindowStatus`, `SlotStatus` or `BudgetStatus`, as the limit is a window, slots or a budget."""

    @property
    def name(self) -> str:
        """Name of the limit, as figures call it: `60/minute`, `9 tokens/minute`, `slots`, `daily`.

        A limit in code has the name that it was declared with.
        """
        limit = self.counter.limit
        if self.counter.name:
            return self.counter.name
        if isinstance(limit, Window):
            return limit.name
        return "slots" if isinstance(limit, Slots) else limit.period

    @property
    def limit(self) -> int | Decimal:
        """Amount that the limit grants: units, slots, or money in its currency."""
        limit = self.counter.limit
        if isinstance(limit, Window):
            return limit.quota
        return limit.limit if isinstance(limit, Slots) else _money(limit.amount, limit)

    @property
    def remaining(self) -> int | Decimal:
        """Amount that is left: units, slots, or money in its currency; never below 0."""
        limit, status = self.counter.limit, self.status
        if isinstance(limit, Allowance) and isinstance(status, BudgetStatus):
            return _money(max(limit.amount - status.taken, 0), limit)
        if isinstance(limit, Slots) and isinstance(status, SlotStatus):
            return max(limit.limit - status.active, 0)
        if isinstance(limit, Window) and isinstance(status, WindowStatus):
            return max(limit.quota - status.used, 0)
        raise TypeError(f"{limit!r} has no status like {status!r}")

    @property
    def reset_after(self) -> float | None:
        """Seconds until `remaining` next grows: 0.0 for an unused window; None for slots and budgets."""
        return self.status.reset_after_us / SECOND if isinstance(self.status, WindowStatus) else None

    @property
    def window(self) -> tuple[Window, WindowStatus] | None:
        """The limit and its status where it is a window."""
        limit, status = self.counter.limit, self.status
        return (limit, status) if isinstance(limit, Window) and isinstance(status, WindowStatus) else None

    @property
    def slots(self) -> tuple[Slots, SlotStatus] | None:
        """The limit and its status where it is a set of slots."""
        limit, status = self.counter.limit, self.status
        return (limit, status) if isinstance(limit, Slots) and isinstance(status, SlotStatus) else None

    @property
    def budget(self) -> tuple[Allowance, BudgetStatus] | None:
        """The limit and its status where it is a budget."""
        limit, status = self.counter.limit, self.status
        return (limit, status) if isinstance(limit, Allowance) and isinstance(status, BudgetStatus) else None


class NearBudget(NamedTuple):
    """A budget that is used up as far as its `warn_at`."""

    allowance: Allowance
    left: int
    """Amount that is neither spent nor held, in micro-units of the currency (whole ones of `token`)."""
    period: ReservationKey
    """Period of the budget: its caller's partition, and its end."""


class Refusal(NamedTuple):
    """Reason of a refusal, and the time until the request may succeed."""

    reason: Reason
    limit: LimitStatus | None
    """Limit that refused; None where there was no decision."""
    retry_after_us: int | None
    """Microseconds until the request may succeed; None where waiting is no use."""

    @property
    def retry_after(self) -> float | None:
        """Seconds until the request may succeed; None where waiting is no use."""
        return None if self.retry_after_us is None else self.retry_after_us / SECOND


class Decision(NamedTuple):
    """Answer to a request or to `Limiter.acquire`. A handler finds it as `get_lease(request).decision`.

    `limit`, `remaining` and `reset_after` describe one window of the caller, the one that the headers
    `X-RateLimit-*` tell of; each is None where the caller has no window. All limits are in `limits`.
    """

    allowed: bool
    """Whether the request is let through."""
    now_us: int
    """Time of the decision by the backend's clock, in microseconds since 1970."""
    cost: int = 1
    """Request units that each window was asked for."""
    price_micros: int = 0
    """Estimate in micro-units of the caller's currency (whole ones of `token`); 0 without one."""
    limits: tuple[LimitStatus, ...] = ()
    """Every limit that decided, the caller's own first. Empty where nothing limits or nothing is known."""
    refusal: Refusal | None = None
    """Reason of the refusal, also where shadow mode lets the request through; None for an admission."""
    shadow: bool = False
    """Whether a refusal is only reported, and the request let through."""
    policy: Literal["shared", "local", "allow", "deny"] = "shared"
    """Decider: the backend (`shared`), or the settings' `on_failure` while the backend is away."""
    costs: tuple[int, ...] | None = None
    """Units that the request needs of each of `limits`; None where that is `cost` of every window."""

    @property
    def limit(self) -> int | None:
        """Units that the caller's nearest window grants."""
        nearest = self.nearest()
        return None if nearest is None else nearest[0].quota

    @property
    def remaining(self) -> int | None:
        """Units left in the caller's nearest window."""
        nearest = self.nearest()
        return None if nearest is None else max(nearest[0].quota - nearest[1].used, 0)

    @property
    def reset_after(self) -> float | None:
        """Seconds until `remaining` next grows."""
        nearest = self.nearest()
        return None if nearest is None else nearest[1].reset_after_us / SECOND

    @property
    def retry_after(self) -> float | None:
        """Seconds until a refused request may succeed; None for an admission, or where waiting is no use."""
        return None if self.refusal is None else self.refusal.retry_after

    def cost_of(self, limit_status: LimitStatus) -> int:
        """Units that the request needs of the window of one of `limits`."""
        if self.costs is None:
            return self.cost
        return next(cost for each, cost in zip(self.limits, self.costs, strict=True) if each is limit_status)

    def windows(self, unit: str = REQUESTS) -> Iterator[tuple[Window, WindowStatus]]:
        """The caller's own windows that count requests, or a metered unit, those of the plan first."""
        for limit_status in self._own_of(unit):
            if limit_status.window is not None:
                yield limit_status.window

    def named_windows(self, unit: str = REQUESTS) -> Iterator[tuple[str, Window, WindowStatus]]:
        """The caller's own windows that count a unit, with the name of a limit in code, else ""."""
        for limit_status in self._own_of(unit):
            if limit_status.window is not None:
                yield limit_status.counter.name, *limit_status.window

    def _own_of(self, unit: str) -> Iterator[LimitStatus]:
        """The caller's own windows that count a unit."""
        for limit_status in self.limits:
            window = limit_status.window
            if window is not None and limit_status.counter.owner == "caller" and window[0].counts == unit:
                yield limit_status

    def units(self) -> list[str]:
        """Metered units that the caller's own windows count, in their order."""
        windows = [each.window for each in self.limits if each.counter.owner == "caller"]
        counted = [window[0].counted for window in windows if window is not None]
        return [unit for unit in dict.fromkeys(counted) if unit != REQUESTS]

    def nearest(self, unit: str = REQUESTS) -> tuple[Window, WindowStatus] | None:
        """The caller's own window that `X-RateLimit-*` describe; None where there is none.

        That is the one that refused, or else the one under which the fewest more requests of this cost fit;
        of equals the longer. Of a metered `unit` it is that of `X-RateLimit-*-Unit`.
        """
        if self.refusal is not None and self.refusal.reason == "rate" and self.refusal.limit is not None:
            window = self.refusal.limit.window
            is_own = self.refusal.limit.counter.owner == "caller"
            if window is not None and is_own and window[0].counts == unit:
                return window
        windows = [
            (*each.window, self.cost_of(each)) for each in self._own_of(unit) if each.window is not None
        ]
        nearest = min(windows, key=lambda each: _left(each[0], each[1].used, each[2]), default=None)
        return None if nearest is None else nearest[:2]

    def warnings(self) -> Iterator[NearBudget]:
        """The budgets that have reached their `warn_at`."""
        for limit_status in self.limits:
            if limit_status.budget is None:
                continue
            limit, status = limit_status.budget
            # In whole numbers, and as the settings wrote the share: money is never a float.
            if limit.warn_at is not None and status.taken >= Decimal(repr(limit.warn_at)) * limit.amount:
                left = max(limit.amount - status.taken, 0)
                yield NearBudget(limit, left, period_key(limit_status.counter, self.now_us))


def _money(micros: int, allowance: Allowance) -> Decimal:
    """Return an amount of a budget as money in its currency."""
    return Decimal(format_amount(micros, allowance.currency))


def _left(window: Window, used: int, cost: int) -> tuple[int, int]:
    """Return a sort key that is smallest for the window that `X-RateLimit-*` describe."""
    return max(window.quota - used, 0) // cost, -window.length


def decision_of(
    policy: Policy,
    charge: Charge,
    outcome: Outcome,
    price: int,
    unsatisfiable: Counter | None,
    *,
    by: Literal["shared", "local"] = "shared",
) -> Decision:
    """Make the decision that a backend's answer means under a policy.

    `unsatisfiable` is a limit that can't ever admit the request.
    """
    limit_statuses = tuple(map(_limit_status, zip(charge.counters, charge.statuses(outcome), strict=True)))
    costs = None if charge.costs is None else tuple([max(cost, 1) for cost in charge.costs])
    refusal = None
    if unsatisfiable is not None:
        refusal = Refusal("cost", next(s for s in limit_statuses if s.counter == unsatisfiable), None)
    elif not outcome.admitted:
        refusal = refusal_of(limit_statuses, price, outcome.now)
    shadow = policy.shadow
    if refusal is not None and policy.shadowed:
        refusing = (
            [refusal.limit] if unsatisfiable is not None else [s for s in limit_statuses if s.status.refuses]
        )
        # If others refuse as well, `Policy.enforced` says so, which is asked next.
        shadow = shadow or any([s is not None and s.counter.scope in policy.shadowed for s in refusing])
    allowed, now = refusal is None or shadow, outcome.now
    return Decision(allowed, now, charge.cost, price, limit_statuses, refusal, shadow, by, costs)


def blocked(*, shadow: bool) -> Decision:
    """Make the decision about a request of a blocked caller, of whom nothing is counted."""
    return Decision(shadow, time.time_ns() // 1000, refusal=Refusal("blocked", None, None), shadow=shadow)


def without_charge(decision: Decision, charge: Charge) -> Decision:
    """Return an admission with its limits as they stand once its charge is given back."""
    limits = []
    for place, limit_status in enumerate(decision.limits):
        status = limit_status.status
        if isinstance(status, WindowStatus):
            used = max(status.used - charge.cost_at(place), 0)
            status = WindowStatus(used, status.reset_after_us if used else 0, 0)
        elif isinstance(status, SlotStatus):
            status = SlotStatus(max(status.active - 1, 0), is_full=False)
        else:
            status = status._replace(held=max(status.held - decision.price_micros, 0))
        limits.append(limit_status._replace(status=status))
    return decision._replace(limits=tuple(limits))


_limit_status = partial(tuple.__new__, LimitStatus)  # one for each limit of a request: no Python in between


def refusal_of(limit_statuses: Iterable[LimitStatus], price: int, now: int) -> Refusal:
    """Return the refusal: the limit that is named, and the wait for all limits that refuse.

    The caller's own limits come before shared ones, and among those the longest wait names the code.
    """
    waits = [(s, _wait(s, price, now)) for s in limit_statuses if s.status.refuses]
    longest = max(wait for _, wait in waits)
    limit_status, _ = max(waits, key=lambda each: (each[0].counter.owner != "everyone", each[1]))
    return Refusal(_reason(limit_status), limit_status, longest)


def known_wait(limit_status: LimitStatus, price: int, now: int) -> int | None:
    """Microseconds until a limit that refuses admits; None where it may be at any moment."""
    if isinstance(limit_status.status, WindowStatus):
        return limit_status.status.retry_after_us
    if limit_status.budget is not None:
        limit, status = limit_status.budget
        if status.spent + price > limit.amount:
            return period_key(limit_status.counter, now).ends - now
    # A slot may be free soon, and so may what others' estimates hold of a budget.
    return None


def _wait(limit_status: LimitStatus, price: int, now: int) -> int:
    """Microseconds until a limit that refuses may admit: true for windows, a hint for slots."""
    known = known_wait(limit_status, price, now)
    if known is not None:
        return known
    return int(random.uniform(*SLOT_HINT) * SECOND)  # noqa: S311 - spreads callers, keeps no secret


def _reason(limit_status: LimitStatus) -> Reason:
    if limit_status.counter.owner == "everyone":
        return "capacity"
    limit = limit_status.counter.limit
    if isinstance(limit, Window):
        return "rate"
    return "concurrency" if isinstance(limit, Slots) else "spending"
