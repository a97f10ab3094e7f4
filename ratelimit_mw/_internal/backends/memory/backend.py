"""The embedded backend: counts in this process, with the same answers as the script on Redis."""

from collections.abc import Callable, Sequence
from functools import partial
from time import time_ns

from ratelimit_mw._internal.backends.memory.bounded_store import Store
from ratelimit_mw._internal.backends.memory.budgets import (
    BudgetState,
    Record,
    close,
    hold_estimate,
    open_record,
    renew_estimate,
    settle,
)
from ratelimit_mw._internal.backends.memory.counts import CounterRef, Name, SlotSet, WindowLog
from ratelimit_mw._internal.backends.memory.meters import Meters
from ratelimit_mw._internal.backends.memory.prepared import PreparedCharge
from ratelimit_mw._internal.model.backend import (
    BackendError,
    EstimateAction,
    Known,
    Load,
    OperationRefusedError,
    Settlement,
    UnderWay,
)
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter, period_key
from ratelimit_mw._internal.model.limits import Slots, Window
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.periods import period_at
from ratelimit_mw._internal.model.reservation import Reservation, ReservationKey
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.leaf import Lock, Numbers

MAX_WINDOWS = 200_000
"""Windows remembered per length, days and months of budgets; beyond it a caller not seen lately is
forgotten. Also how many charges that were never settled nor ended are remembered."""
SPARE_SLOTS = 4_000
"""Slot sets that are kept though nobody holds a slot, so that callers who come one at a time find theirs."""


def wall_clock() -> int:
    """Microseconds since 1970, by this machine's clock."""
    now = time_ns()
    return now // 1000


class MemoryBackend:
    """Windows, slots and budgets of one process; nothing to install, nothing shared."""

    def __init__(self, *, clock: Clock = wall_clock, max_windows: int = MAX_WINDOWS) -> None:
        self.clock = clock
        self.call_observers: list[Callable[[float], None]] = []
        self._max_windows = max_windows
        renew_after_fork(self)
        self.lock: Lock = Lock()  # one limiter serves the event loops of several threads
        # Windows by length, days and months apart: those not used for longest are also the first to die.
        self._logs: dict[int, Store[Name, WindowLog]] = {}
        self._days: Store[Name, BudgetState] = Store(max_windows)
        self._months: Store[Name, BudgetState] = Store(max_windows)
        self.slots: Store[ReservationKey, SlotSet] = Store(rotates=True, spare=min(SPARE_SLOTS, max_windows))
        self._records: Store[bytes, Record] = Store(max_windows, rotates=True)
        self._meters = Meters(self._logs_of, max_windows)

    load: Load = Load()
    is_away = False

    def take_over(self) -> None:
        """Nothing is ever owed."""

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds."""
        self.lock = Lock()

    async def open(self) -> None:
        """There is nothing to connect to."""

    async def close(self) -> None:
        """There is nothing to close; counts stay as long as the object."""

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        return self.decide(charge, lease_id, price)

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        return self.ask(charge, lease_id, price)

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere."""
        return self.decide(charge, lease_id, price)

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        return self.decide(charge, None, price)

    def decide(self, charge: Charge, lease_id: bytes | None, price: int) -> Outcome:
        """The decision, charged where there is a lease id to charge it to."""
        if not (charge.cost >= 1 and price >= 0):  # NaN compares false with everything
            text = f"a cost must be at least 1 and a price at least 0, not {charge.cost!r} and {price!r}"
            raise OperationRefusedError(text)
        self.lock.acquire()
        try:
            now, known = self.clock(), charge.prepared  # by another backend perhaps
            prepared = known if isinstance(known, PreparedCharge) else None
            if prepared is None or prepared.owner is not self or not prepared.since <= now < prepared.until:
                prepared = charge.prepared = self._prepare(charge, now)
            if charge.ahead:
                return prepared.take_ahead(charge, now)
            if charge.meters:
                if not min(charge.estimates) >= 0:
                    raise OperationRefusedError(
                        f"an estimate must be at least 0, not {min(charge.estimates)!r}"
                    )
                self._meters.lapse(charge.meters, now)
            outcome = prepared.decide(charge, now, lease_id, price)
            reservation = outcome.reservation
            if reservation.meters:
                self._meters.open(reservation, now)
            if reservation.periods:
                ends = max([held.ends for held in reservation.periods])
                record = open_record(self._periods(reservation), price, now, reservation.lease_seconds, ends)
                self._records.add(reservation.id, record, now)
            return outcome
        finally:
            self.lock.release()

    def recall(self, counter: Counter, entries: Sequence[tuple[int, int]], *, anew: bool) -> None:
        """Take over what a window counted elsewhere, as times and costs, where nothing is counted yet.

        Or, `anew`, in place of what is.
        """
        limit = counter.limit
        if not isinstance(limit, Window):
            return
        with self.lock:
            logs, key = self._logs_of(limit.length), (counter.partition, counter.scope)
            if anew:
                logs.forget(key)
            if entries and key not in logs:
                log = WindowLog(limit.length)
                ref = CounterRef(logs, key, limit, partial(WindowLog, limit.length))
                for at, cost in entries:
                    log.charge(Numbers(), ref, at, b"", cost, 0)
                logs.add(key, log, self.clock())

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Let the slots last `seconds` from now; false where one of them was lost before."""
        with self.lock:
            return self._renew(reservation, self.clock(), seconds)

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many reservations, each for its own time; whether each one was still held."""
        with self.lock:
            now = self.clock()
            return [self._renew(reservation, now, seconds) for reservation, seconds in renewals]

    def _renew(self, reservation: Reservation, now: int, seconds: float) -> bool:
        if reservation.meters:
            self._meters.renew(reservation, now)
        record = self._records.find(reservation.id) if reservation.has_price else None
        if record is not None:
            renew_estimate(record, self._periods(reservation), now, reservation.lease_seconds)
        slots = [self.slots.find(held) for held in reservation.slots]
        return all([s is not None and s.renew(reservation.id, now, seconds) for s in slots])

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        self.lock.acquire()
        try:
            for held in reservation.slots:
                try:
                    slots = self.slots[held]
                except KeyError:  # everything in it had expired
                    continue
                slots.leases.pop(reservation.id, 0)
            if reservation.periods and action is not EstimateAction.UNTOUCHED:
                record = self._records.forget(reservation.id)
                if record is not None:
                    close(record, self._periods(reservation), action)
            if reservation.meters and action is not EstimateAction.UNTOUCHED:
                self._meters.finish(reservation, action, self.clock())
        finally:
            self.lock.release()
        return _DONE

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> Known[Settlement]:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        if not amount >= 0:
            raise OperationRefusedError(f"an amount must be at least 0, not {amount!r}")
        with self.lock:
            now, record = self.clock(), self._records.find(reservation.id)
            if record is None or record.is_dead(now):
                return Known(Settlement.UNKNOWN)
            return Known(settle(record, self._periods(reservation), amount, now, replace=replace))

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> Known[Settlement]:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        with self.lock:
            return Known(self._meters.settle(reservation, checked(units), self.clock(), replace=replace))

    def give_back(self, charge: Charge, reservation: Reservation, times: Sequence[int]) -> None:
        """Undo an admitted charge: windows by its time, the rest by its reservation."""
        with self.lock:
            now = self.clock()
            for place, counter in enumerate(charge.counters) if times[0] else ():
                limit, name = counter.limit, (counter.partition, counter.scope)
                if isinstance(limit, Window) and not limit.is_metered:
                    logs = self._logs_of(limit.length)
                    log = logs.find(name)
                    if log is not None:
                        ref = CounterRef(logs, name, limit, partial(WindowLog, limit.length))
                        log.give_back(ref, now, times[0], charge.cost_at(place))
        self.finish(reservation, EstimateAction.GIVE_BACK)

    def hold_estimate(self, reservation: Reservation) -> UnderWay[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        with self.lock:
            if reservation.meters:
                self._meters.hold_estimates(reservation, self.clock())
            record = self._records.find(reservation.id) if reservation.has_price else None
            if record is not None:
                hold_estimate(record, self._periods(reservation))
        return _DONE

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        with self.lock:
            now = self.clock()
            self._meters.forget(charge.meters)
            for counter in charge.counters:
                key = (counter.partition, counter.scope)
                if isinstance(counter.limit, Window):
                    self._logs_of(counter.limit.length).forget(key)
                elif isinstance(counter.limit, Slots):
                    self.slots.forget(ReservationKey(*key))
                else:
                    period = period_key(counter, now)
                    self._books_of(period).forget(_name(period))

    def _prepare(self, charge: Charge, now: int) -> PreparedCharge:
        """Find the counters of a charge, which stay the same until a period of it ends."""
        refs, periods, since, until = list[CounterRef](), list[ReservationKey](), 0, 1 << 62
        slots = iter(charge.slots)  # the very keys of reservations: nothing is compared to find them
        for place, counter in enumerate(charge.counters):
            limit, name = counter.limit, (counter.partition, counter.scope)
            if isinstance(limit, Window):
                logs, cost = self._logs_of(limit.length), charge.cost_at(place)
                refs.append(CounterRef(logs, name, limit, partial(WindowLog, limit.length), cost))
            elif isinstance(limit, Slots):
                refs.append(CounterRef(self.slots, next(slots), limit, SlotSet))
            else:
                held = period_key(counter, now)
                period = period_at(limit.period, limit.timezone, now)
                since, until = max(since, period.start), min(until, period.end)
                periods.append(held)
                refs.append(
                    CounterRef(self._books_of(held), _name(held), limit, partial(BudgetState, held.ends))
                )
        return PreparedCharge(self, refs, tuple(periods), since, until)

    def _logs_of(self, length: int) -> Store[Name, WindowLog]:
        logs = self._logs.get(length)
        if logs is None:
            logs = self._logs[length] = Store(self._max_windows)
        return logs

    def _books_of(self, period: ReservationKey) -> Store[Name, BudgetState]:
        return self._days if period.scope.count("-") > 1 else self._months

    def _periods(self, reservation: Reservation) -> list[BudgetState]:
        """The budget states of a reservation, made anew where forgotten ones can still be settled."""
        now, budgets = self.clock(), []
        for period in reservation.periods:
            store, name = self._books_of(period), _name(period)
            budget = store.get(name)  # what happens to a lease later is no use of its period
            if budget is None:
                budget = BudgetState(period.ends)
                if not budget.is_dead(now):
                    store.add(name, budget, now)
            budgets.append(budget)
        return budgets


def checked(units: Units) -> Units:
    """Amounts that can be charged. Raises `OperationRefusedError` for any other."""
    try:
        return check_amounts(units)
    except ValueError as error:
        raise OperationRefusedError(str(error)) from None


_DONE = Known(None)


def _name(held: ReservationKey) -> Name:
    return held[:2]
