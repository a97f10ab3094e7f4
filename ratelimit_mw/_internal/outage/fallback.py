"""Decisions while the backend is away: by this process, on its own, at a share of each limit.

They start from the counts last known of a caller and not from zero. The backend is told of the admissions
when it is back (`reconcile.py`).
"""

import math
from dataclasses import replace
from decimal import Decimal
from typing import NamedTuple

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend, wall_clock
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter, period_key
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, new_lease_id
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.outage.reconcile import OutageReconciler
from ratelimit_mw._internal.policy.decision import Decision, Refusal, decision_of
from ratelimit_mw._internal.policy.policy import Policies, Policy
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.forks import renew_after_fork

RETRY_UNAVAILABLE = SECOND
"""Microseconds until a refused caller may try again, where the settings say to refuse."""
MAX_KNOWN = 10_000
"""Windows and budgets of which it is remembered how they stood; the one remembered first goes first."""
STEPS = 10
"""In so many steps what was counted elsewhere leaves its window: the time of each unit is not known here."""


class _Known(NamedTuple):
    """Status of a limit in the shared backend, and the time of that status."""

    status: Status
    at: int


class LocalPolicy:
    """Decides about charges as the settings say: in this process alone, or all alike."""

    def __init__(self, shared: Backend, *, clock: Clock = wall_clock) -> None:
        self._clock = clock
        self._local = MemoryBackend(clock=clock)
        self._known: dict[tuple[str, str, int], _Known] = {}
        self.reconciler: OutageReconciler = OutageReconciler(shared, self._local, clock, self.remember)
        """Store of the reservations that are made here."""
        self._seeded: dict[tuple[str, str, int], int] = {}
        """Timestamp of the snapshot that each local window was seeded from."""
        self._recalled: set[str] = set()
        self._priced: dict[str, Charge] = {}
        """The latest charge with budgets of each caller."""
        self._asked_at = 0
        self.decisions: dict[str, int] = {"local": 0, "allow": 0, "deny": 0}
        """Number of decisions by each policy."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Count anew."""
        self.decisions.update(dict.fromkeys(self.decisions, 0))

    def answer(
        self, policy: Policy, charge: Charge, price: int, *, share: float, was_asked: bool = False
    ) -> tuple[Decision, Reservation]:
        """Decide as the settings say about a request that the backend didn't decide about.

        `was_asked` tells that the backend is there, and refused this request alone. That may go on for as
        long as the server does, so that nothing is admitted uncounted then.
        """
        on_failure = policy.on_failure_priced if charge.allowances else policy.on_failure
        if on_failure == "allow" and was_asked:
            on_failure = "local"
        self.decisions[on_failure] += 1
        if on_failure == "local":
            outcome = self.decide(charge, price, share)
            return decision_of(policy, charge, outcome, price, None, by="local"), outcome.reservation
        now = self._clock()
        if on_failure == "allow":
            return Decision(True, now, charge.cost, price, policy="allow"), NO_RESERVATION
        refusal = Refusal("unavailable", None, RETRY_UNAVAILABLE)
        denied = Decision(policy.shadow, now, charge.cost, price, (), refusal, policy.shadow, "deny")
        return denied, NO_RESERVATION

    def look(
        self, policy: Policy, charge: Charge, price: int, unsatisfiable: Counter, *, share: float
    ) -> Decision:
        """The refusal of a request that can't ever fit into `unsatisfiable`, with the figures known here."""
        self.decisions["local"] += 1
        outcome = self.decide(charge, price, share, only_look=True)
        return decision_of(policy, charge, outcome, price, unsatisfiable, by="local")

    def recall(self, policies: Policies, partition: str) -> None:
        """Start from what was last known of a caller on each of its routes; once a second: outages end."""
        now = self._clock()
        if not self._asked_at <= now < self._asked_at + SECOND:
            self._recalled.clear()
            self._asked_at = now
        if partition in self._recalled or len(self._recalled) >= MAX_KNOWN:
            return
        self._recalled.add(partition)
        priced = self._priced.get(partition)
        if priced is not None and priced.last is not None:
            self.remember(priced, priced.last, since=priced.last.now)
        for policy in policies.for_partition(partition):
            ahead = () if policy.ahead is None else policy.ahead.charges
            for charge in (policy.charge, policy.priced_charge, *ahead):
                last = charge.last
                if last is not None:
                    self.remember(charge, last, since=last.now)

    def note_budgets(self, charge: Charge) -> None:
        """Remember where a caller's budgets stand: in `last` of this charge."""
        partition = charge.own_partition
        if partition not in self._priced:
            evict_oldest(self._priced, MAX_KNOWN)
        self._priced[partition] = charge

    def decide(self, charge: Charge, price: int, share: float, *, only_look: bool = False) -> Outcome:
        """Decide about a charge at a share of its limits; the figures are told of the real limits."""
        part = Decimal(repr(share))  # as the settings wrote it: 0.07 of 100 is 7, and not a bit more
        counters = [self._at_share(charge, place, part) for place in range(len(charge.counters))]
        local = Charge(counters, charge.cost, lease_seconds=charge.lease_seconds, estimates=charge.units)
        with self.reconciler.lock:  # so that nobody forgets here what was admitted and is not yet owed
            outcome = self._local.decide(local, None if only_look else new_lease_id(), price)
            reservation = outcome.reservation
            if reservation.meters:  # as the shared backend will know them
                reservation = reservation.with_keys(
                    reservation.slots, reservation.periods, charge.meters, reservation.estimates
                )
            if outcome.admitted and not only_look:
                self.reconciler.add(charge, reservation, price)
        limits = zip(charge.counters, local.counters, local.statuses(outcome), strict=True)
        statuses = [_as_real(*each) for each in limits]
        return Outcome.from_statuses(outcome.admitted, outcome.now, statuses, reservation)

    def remember(self, charge: Charge, outcome: Outcome, since: int | None = None) -> None:
        """Remember how the windows and budgets of `charge` stand in the shared backend.

        What is known of a limit from `since` on is kept.
        """
        for counter, status in zip(charge.counters, charge.statuses(outcome), strict=True):
            if not isinstance(counter.limit, Slots):
                key = _key(counter)
                known = self._known.get(key)
                if since is not None and known is not None and known.at >= since:
                    continue
                if key not in self._known:
                    evict_oldest(self._known, MAX_KNOWN)
                self._known[key] = _Known(status, outcome.now)

    def _at_share(self, charge: Charge, index: int, share: Decimal) -> Counter:
        counter = charge.counters[index]
        limit: Limit = counter.limit
        if isinstance(limit, Slots):
            return replace(counter, limit=replace(limit, limit=_local_part(limit.limit, limit.whole, share)))
        known = self._known.get(_key(counter))
        last = charge.last
        if last is not None and (known is None or last.now >= known.at):
            known = _Known(last.status(index, limit), last.now)
        if isinstance(limit, Window):
            local = replace(counter, limit=replace(limit, quota=_local_part(limit.quota, limit.whole, share)))
            if known is not None and isinstance(known.status, WindowStatus):
                entries = _entries(limit, known.status, known.at, share, self._clock())
                self._seed(local, counter, known.at, entries)
            return local
        left = limit.amount
        if (
            known is not None
            and isinstance(known.status, BudgetStatus)
            and period_key(counter, known.at) == period_key(counter, self._clock())
        ):
            left = max(left - known.status.taken, 0)
        return replace(counter, limit=replace(limit, amount=math.ceil(left * share)))

    def _seed(self, local: Counter, counter: Counter, known_at: int, entries: list[tuple[int, int]]) -> None:
        """Let a window begin here with what was counted elsewhere; anew where more is known than before."""
        key = _key(counter)
        is_news = self._seeded.get(key, -1) < known_at
        if is_news:
            evict_oldest(self._seeded, MAX_KNOWN)
            self._seeded[key] = known_at
            if unsynced := self.reconciler.unsynced(
                counter
            ):  # admitted here, and not yet among what is known
                entries = [*entries, (self._clock(), unsynced)]
        self._local.recall(local, entries, anew=is_news)


def _local_part(granted: int, whole: int, share: Decimal) -> int:
    """The part of a limit that is granted here; of a shared one, a plan's share of what is granted to all."""
    if not whole:
        return math.ceil(granted * share)
    return max(math.ceil(whole * share) * granted // whole, 1)


def _key(counter: Counter) -> tuple[str, str, int]:
    limit = counter.limit
    if isinstance(limit, Allowance):
        return counter.partition, limit.currency, 1 if limit.period == "daily" else 31
    return counter.partition, counter.scope, limit.seconds if isinstance(limit, Window) else 0


def _entries(
    window: Window, status: WindowStatus, known_at: int, share: Decimal, now: int
) -> list[tuple[int, int]]:
    """Make the entries, times and costs, of a window that stood so at `known_at`: this share of what was left
    is left.

    What it had counted is taken to have come evenly since the oldest, whose time is known.
    """
    quota = window.whole or window.quota  # what is counted is counted for all
    counted = math.ceil(quota * share) - math.ceil(max(quota - status.used, 0) * share)
    oldest, horizon = known_at + status.reset_after_us - window.length, now - window.length
    steps = min(STEPS, counted)
    entries = []
    for step in range(steps):
        time = oldest + (known_at - oldest) * step // max(steps - 1, 1)
        cost = counted * (step + 1) // steps - counted * step // steps
        if time > horizon:
            entries.append((min(time, now), cost))
    return entries


def _as_real(counter: Counter, local: Counter, status: Status) -> Status:
    """Status of the real limit, of which as much is left as of the one that counts here."""
    real, here = counter.limit, local.limit
    if isinstance(status, WindowStatus) and isinstance(real, Window) and isinstance(here, Window):
        return status._replace(used=status.used + real.quota - here.quota)
    if isinstance(status, SlotStatus) and isinstance(real, Slots) and isinstance(here, Slots):
        return status._replace(active=status.active + real.limit - here.limit)
    if isinstance(status, BudgetStatus) and isinstance(real, Allowance) and isinstance(here, Allowance):
        return status._replace(spent=status.spent + real.amount - here.amount)
    return status
