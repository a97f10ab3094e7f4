"""Budgets in memory: days and months of a caller, and the records of charges that they hold for."""

from ratelimit_mw._internal.backends.memory.bounded_store import StoredState
from ratelimit_mw._internal.backends.memory.counts import _NEVER, CountedState, CounterRef
from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.periods import KEPT_AFTER_END
from ratelimit_mw._internal.runtime.leaf import Numbers


class BudgetState(CountedState):
    """Amounts of one period: what is spent, and what is held for charges not yet settled.

    Estimates are held until they lapse: those that do in the same part of a lease, together. One under time 0
    never does.
    """

    __slots__ = ("_next", "_open", "ends", "held", "lapsed", "spent")

    def __init__(self, ends: int) -> None:
        self.is_stored = self.is_used = False
        self.ends = ends
        self.spent = 0
        self.held = 0
        self.lapsed = 0
        """Time, in microseconds, up to which held estimates have lapsed."""
        self._open: dict[int, int] = {}
        self._next = _NEVER

    def is_dead(self, now: int) -> bool:
        """Whether the period can no longer be settled."""
        return self.ends + KEPT_AFTER_END <= now

    def admits(self, ref: CounterRef, now: int, cost: int, price: int) -> bool:
        """Whether `price` more fits."""
        if self._next <= now:
            self.lapse(now)
        return self.spent + self.held + price <= ref.quota

    def charge(self, row: Numbers, ref: CounterRef, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Hold `price`, until `lapse_at` says how long."""
        self.held += price
        row.append(self.spent)
        row.append(self.held)
        row.append(0)

    def append_status(self, row: Numbers, ref: CounterRef, now: int, cost: int, price: int) -> None:
        """Append the amounts spent and held, and whether too little is left for `price`."""
        row.append(self.spent)
        row.append(self.held)
        row.append(1 if self.spent + self.held + price > ref.quota else 0)

    def lapse(self, now: int) -> None:
        """Hold nothing any more of what has lapsed by now."""
        for at in [at for at in self._open if at <= now]:
            self.held -= self._open.pop(at)
            self.lapsed = max(self.lapsed, at)
        self._next = min(self._open, default=_NEVER)

    def lapse_at(self, at: int, amount: int) -> None:
        """Let an amount that is held lapse at a time."""
        if at > self.lapsed:
            self._open[at] = self._open.get(at, 0) + amount
            self._next = min(self._next, at)

    def give_back(self, at: int, amount: int) -> None:
        """Hold an amount no more that would have lapsed at a time, and has not."""
        if at:
            found = self._open.pop(at, 0)
            amount = min(amount, found)
            if found > amount:
                self._open[at] = found - amount
        self.held = max(self.held - amount, 0)

    def shift(self, amount: int, before: int, at: int) -> None:
        """Let what would have lapsed at one time lapse at another; -1 where it has lapsed."""
        self.give_back(before, amount)
        if at >= 0:
            self.held += amount
            self.lapse_at(at, amount)


class Record(StoredState):
    """Amount held for one charge, and the amount that the charge settled at (None: not yet)."""

    __slots__ = ("dies", "estimate", "lapses", "settled")

    def __init__(self, estimate: int, ends: int) -> None:
        """`ends` is the end of the longest of its periods."""
        self.is_stored = self.is_used = False
        self.estimate = estimate
        self.settled: int | None = None
        self.lapses = 0
        """Time, in microseconds, when the estimate lapses: 0 for never, -1 once it has."""
        self.dies = ends + KEPT_AFTER_END

    def is_dead(self, now: int) -> bool:
        """Whether it can no longer be settled."""
        return self.dies <= now


LAPSE_STEPS = 32
"""Parts of a lease, to whose end an estimate lasts: so few times are told apart that a budget stays small."""


def lapse_of(budgets: list[BudgetState], now: int, seconds: float) -> int:
    """Return the time, in microseconds, when an estimate that is held or renewed now lapses.

    The time lies after every lapse that the budgets of the estimate have seen.
    """
    length = int(seconds * SECOND)
    step = max(length // LAPSE_STEPS, 1)
    lapses = -(-(now + length) // step) * step
    return max([lapses] + [budget.lapsed + 1 for budget in budgets])


def open_record(budgets: list[BudgetState], price: int, now: int, seconds: float, ends: int) -> Record:
    """Make the record of a charge that was just admitted, whose estimate lapses with its lease."""
    record = Record(price, ends)
    if price:
        record.lapses = lapse_of(budgets, now, seconds)
        for budget in budgets:
            budget.lapse_at(record.lapses, price)
    return record


def renew_estimate(record: Record, budgets: list[BudgetState], now: int, seconds: float) -> None:
    """Let an estimate last for a lease from now, unless it has lapsed, is kept anyway, or was settled."""
    if record.settled is not None or record.lapses <= 0:
        return
    for budget in budgets:
        budget.lapse(now)
    has_lapsed = any(record.lapses <= budget.lapsed for budget in budgets)
    at = -1 if has_lapsed else lapse_of(budgets, now, seconds)
    for budget in budgets:
        budget.shift(record.estimate, record.lapses, at)
    record.lapses = at


def hold_estimate(record: Record, budgets: list[BudgetState]) -> None:
    """Hold an estimate until it is settled, also one that has lapsed."""
    if record.settled is None and record.lapses:
        for budget in budgets:
            budget.shift(record.estimate, record.lapses, 0)
        record.lapses = 0


SETTLED = 86_400 * SECOND
"""Microseconds after which a settled amount can no longer be replaced."""


def settle(record: Record, budgets: list[BudgetState], amount: int, now: int, *, replace: bool) -> Settlement:
    """Put `amount` in place of a record's estimate, once."""
    if record.settled == amount:
        return Settlement.REPEATED
    if record.settled is not None and not replace:
        return Settlement.DIFFERENT
    for budget in budgets:
        if record.settled is None:
            budget.give_back(record.lapses, record.estimate)
        budget.spent = max(budget.spent + amount - (record.settled or 0), 0)
    record.settled = amount
    record.dies = min(record.dies, now + SETTLED)
    return Settlement.SETTLED


def close(record: Record, budgets: list[BudgetState], action: EstimateAction) -> None:
    """Move or give back what an unsettled record holds, once its request has ended."""
    if record.settled is not None:
        return
    for budget in budgets:
        budget.give_back(record.lapses, record.estimate)
        if action is EstimateAction.KEEP:
            budget.spent += record.estimate
