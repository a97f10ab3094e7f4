"""What was decided about a request, and how its limits stand."""

import random
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import partial
from typing import Literal, NamedTuple

from ratelimit_mw._internal.model.charge import Charge, Counter, Outcome, ReservationKey, place_of
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.policy.policy import Policy

Reason = Literal["rate", "concurrency", "spending", "cost", "capacity", "unavailable"]
"""Why a request was refused: by which kind of limit; by a cost that never fits; by a limit that everyone
shares; because the backend is away and the settings say to refuse."""

SLOT_HINT = (1.0, 3.0)
"""When to try again for a slot, in seconds: from, to; spread so that callers don't return in step."""


class LimitStatus(NamedTuple):
    """One limit and how it stands after the decision."""

    counter: Counter
    status: Status
    """A `WindowStatus`, `SlotStatus` or `BudgetStatus`, as the limit is a window, slots or a budget."""

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
    """What is neither spent nor held, in units of the currency."""
    period: ReservationKey
    """Which caller's, and when it ends."""


class Refusal(NamedTuple):
    """Why a request was refused, and when to try again."""

    reason: Reason
    standing: LimitStatus | None
    """The limit that refused; None where there was no decision."""
    retry_after: int | None
    """Microseconds; None where waiting is no use."""


class Decision(NamedTuple):
    """The answer to a charge. A handler finds it in `request.state.ratelimit.decision`."""

    allowed: bool
    now: int
    """When it was decided, by the backend's clock, in microseconds since 1970."""
    cost: int = 1
    price: int = 0
    standings: tuple[LimitStatus, ...] = ()
    """The limits that decided, the caller's own first. Empty where nothing limits or nothing is known."""
    refusal: Refusal | None = None
    shadow: bool = False
    """Whether a refusal is only reported, and the request let through."""
    policy: Literal["shared", "local", "allow", "deny"] = "shared"
    """Who decided: the backend, or what the settings say while it is away."""

    def windows(self) -> Iterator[tuple[Window, WindowStatus]]:
        """The caller's own windows, those of the plan first."""
        for standing in self.standings:
            window = standing.window
            if window is not None and standing.counter.owner == "caller":
                yield window

    def nearest(self) -> tuple[Window, WindowStatus] | None:
        """The caller's own window that `X-RateLimit-*` describe; None where there is none.

        That is the one that refused, or else the one under which the fewest more requests of this cost fit;
        of equals the longer.
        """
        if self.refusal is not None and self.refusal.reason == "rate" and self.refusal.standing is not None:
            window = self.refusal.standing.window
            if window is not None and self.refusal.standing.counter.owner == "caller":
                return window
        return min(self.windows(), key=lambda each: _left(each[0], each[1].used, self.cost), default=None)

    def warnings(self) -> Iterator[NearBudget]:
        """The budgets that have reached their `warn_at`."""
        for standing in self.standings:
            if standing.budget is None:
                continue
            limit, status = standing.budget
            # In whole numbers, and as the settings wrote the share: money is never a float.
            if limit.warn_at is not None and status.taken >= Decimal(repr(limit.warn_at)) * limit.amount:
                left = max(limit.amount - status.taken, 0)
                yield NearBudget(limit, left, place_of(standing.counter, self.now))


def _left(window: Window, used: int, cost: int) -> tuple[int, int]:
    """What is smallest for the window that `X-RateLimit-*` describe."""
    return max(window.quota - used, 0) // cost, -window.length


def decision_of(
    policy: Policy,
    charge: Charge,
    outcome: Outcome,
    price: int,
    never: Counter | None,
    *,
    by: Literal["shared", "local"] = "shared",
) -> Decision:
    """What a backend's answer means under a policy; `never` is a limit that can't ever admit the request."""
    standings = tuple(map(_limit_status, zip(charge.counters, charge.statuses(outcome), strict=True)))
    refusal = None
    if never is not None:
        refusal = Refusal("cost", next(s for s in standings if s.counter == never), None)
    elif not outcome.admitted:
        refusal = refusal_of(standings, price, outcome.now)
    allowed = refusal is None or policy.shadow
    return Decision(allowed, outcome.now, charge.cost, price, standings, refusal, policy.shadow, by)


_limit_status = partial(tuple.__new__, LimitStatus)  # one for each limit of a request: no Python in between


def refusal_of(standings: Iterable[LimitStatus], price: int, now: int) -> Refusal:
    """Which of the limits that refuse is named, and how long to wait for them all.

    The caller's own come before shared ones, and among those the longest wait names the code.
    """
    waits = [(s, _wait(s, price, now)) for s in standings if s.status.refuses]
    longest = max(wait for _, wait in waits)
    standing, _ = max(waits, key=lambda each: (each[0].counter.owner != "everyone", each[1]))
    return Refusal(_reason(standing), standing, longest)


def _wait(standing: LimitStatus, price: int, now: int) -> int:
    """Microseconds until a limit that refuses may admit: true for windows, a hint for slots."""
    if isinstance(standing.status, WindowStatus):
        return standing.status.retry_after
    if standing.budget is not None:
        limit, status = standing.budget
        if status.spent + price > limit.amount:
            return place_of(standing.counter, now).ends - now
    # A slot may be free soon, and so may what others' estimates hold of a budget.
    return int(random.uniform(*SLOT_HINT) * SECOND)  # noqa: S311 - spreads callers, keeps no secret


def _reason(standing: LimitStatus) -> Reason:
    if standing.counter.owner == "everyone":
        return "capacity"
    limit = standing.counter.limit
    if isinstance(limit, Window):
        return "rate"
    return "concurrency" if isinstance(limit, Slots) else "spending"
