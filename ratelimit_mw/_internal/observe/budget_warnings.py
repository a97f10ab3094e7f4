"""Tells the app, once per period, that a caller's budget has reached its `warn_at`."""

import asyncio

from ratelimit_mw._internal.model.backend import Backend, BackendError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Slots
from ratelimit_mw._internal.model.money import format_amount
from ratelimit_mw._internal.model.reservation import new_lease_id
from ratelimit_mw._internal.observe.events import BudgetWarning, Notifier
from ratelimit_mw._internal.policy.decision import Decision, NearBudget
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

MAX_REMEMBERED = 10_000
"""Periods that this process knows to be announced; forgetting one costs a question to the backend."""


class BudgetWarnings:
    """Announces budgets for one process; the backend sees to it that only one of all does."""

    def __init__(self, backend: Backend, notify: Notifier) -> None:
        self._backend = backend
        self._notify = notify
        self._seen: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave what is under way to the parent process."""
        leave_to_parent(*self._tasks)
        self._tasks.clear()

    def look(self, identity: Identity, decision: Decision) -> None:
        """Announce the budgets of a decision that are near their end. Waits for nothing."""
        for near in decision.warnings():
            period = (near.period.partition, near.period.scope)
            if period not in self._seen:
                if len(self._seen) >= MAX_REMEMBERED:
                    self._seen.clear()
                self._seen.add(period)
                announcing = self._announce(identity, near, decision.now_us)
                task = asyncio.get_running_loop().create_task(announcing, name="ratelimit_mw warning")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _announce(self, identity: Identity, near: NearBudget, now: int) -> None:
        partition, scope, ends = near.period
        # A single slot, held to the end of the period and never released: whoever gets it announces.
        once = Charge([Counter(partition, f"n:{scope}", Slots(1, lease_seconds=(ends - now) / SECOND))])
        try:
            outcome = await self._backend.acquire(once, new_lease_id())
        except BackendError:
            self._seen.discard((partition, scope))
            return
        if outcome.admitted:
            currency = near.allowance.currency
            self._notify(
                BudgetWarning(
                    identity=identity,
                    period=near.allowance.period,
                    currency=currency,
                    limit=format_amount(near.allowance.amount, currency),
                    remaining=format_amount(near.left, currency),
                    ends=ends // SECOND,
                )
            )
