"""Metered units in the memory backend: estimates that lapse, and records by which each charge settles once.

The rules are those of `lua/meters.lua`.
"""

from collections.abc import Callable, Iterator
from functools import partial

from ratelimit_mw._internal.backends.memory.bounded_store import Store, StoredState
from ratelimit_mw._internal.backends.memory.counts import CounterRef, Name, WindowLog
from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.metered import Meter, Units
from ratelimit_mw._internal.model.reservation import Reservation

RECORD_LIFE = 86_400 * SECOND
"""Microseconds that a record lives beyond its longest window where nobody settles it, and after a renewal."""


class OpenEstimates(StoredState):
    """Estimates of one meter that lapse with their lease: when, when they were charged, and how much."""

    __slots__ = ("by_id", "soonest")

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[bytes, tuple[int, int, int]] = {}
        self.soonest = 0
        """None lapses before."""

    def is_dead(self, now: int) -> bool:
        """Whether nothing is open."""
        return not self.by_id

    def put(self, lease_id: bytes, lapses: int, at: int, cost: int) -> None:
        """Let an estimate lapse at a time."""
        self.soonest = min(self.soonest, lapses) if self.by_id else lapses
        self.by_id[lease_id] = (lapses, at, cost)

    def take_lapsed(self, now: int) -> list[tuple[int, int]]:
        """Forget the estimates that have lapsed: when each was charged, and how much."""
        if not self.by_id or self.soonest > now:
            return []
        lapsed = [lease_id for lease_id, (lapses, _, _) in self.by_id.items() if lapses <= now]
        taken = [self.by_id.pop(lease_id)[1:] for lease_id in lapsed]
        self.soonest = min([lapses for lapses, _, _ in self.by_id.values()], default=0)
        return taken


class MeterEntry:
    """Amounts that one charge counts under one meter."""

    __slots__ = ("base", "extra", "extra_at", "is_settled")

    def __init__(self, base: int) -> None:
        self.base = base
        """Counted at the time of the admission."""
        self.extra = 0
        """Counted at `extra_at`: what was used above the estimate."""
        self.extra_at = 0
        self.is_settled = False


class MeterRecord(StoredState):
    """Amounts that one charge counts under all its meters."""

    __slots__ = ("at", "dies", "entries", "never_lapses")

    def __init__(self, at: int, estimates: tuple[int, ...], dies: int) -> None:
        super().__init__()
        self.at = at
        self.entries = [MeterEntry(estimate) for estimate in estimates]
        self.never_lapses = False
        """Whether its estimates last until they are settled, and don't lapse."""
        self.dies = dies

    def is_dead(self, now: int) -> bool:
        """Whether it can no longer be settled."""
        return self.dies <= now


class Meters:
    """All metered units of one memory backend. Whoever calls holds its lock."""

    def __init__(self, logs_of: Callable[[int], Store[Name, WindowLog]], most: int) -> None:
        """`logs_of` finds the windows of one length."""
        self._logs_of = logs_of
        self._open: Store[Name, OpenEstimates] = Store(most, rotates=True)
        self.records: Store[bytes, MeterRecord] = Store(most, rotates=True)

    def lapse(self, meters: tuple[Meter, ...], now: int) -> None:
        """Give back the estimates whose lease was not renewed in time."""
        for meter in meters:
            estimates = self._open.find(_open_name(meter))
            for at, cost in [] if estimates is None else estimates.take_lapsed(now):
                self._give_back(meter, now, at, cost)

    def open(self, reservation: Reservation, now: int) -> None:
        """Make the record of a charge that was just admitted; its estimates lapse with its lease."""
        record = MeterRecord(now, reservation.estimates, now + _longest(reservation) + RECORD_LIFE)
        self.records.add(reservation.id, record, now)
        for meter, estimate in zip(reservation.meters, reservation.estimates, strict=True):
            if estimate:
                self._put(meter, reservation, record, estimate, now)

    def renew(self, reservation: Reservation, now: int) -> None:
        """Let the estimates last for a lease from now, but for those that have lapsed or are settled."""
        record = self.records.find(reservation.id)
        if record is None:
            return
        record.dies = max(record.dies, now + RECORD_LIFE)
        if record.never_lapses:
            return
        self.lapse(reservation.meters, now)
        for meter, entry in zip(reservation.meters, record.entries, strict=True):
            estimates = self._open.get(_open_name(meter))
            if estimates is not None and reservation.id in estimates.by_id:
                self._put(meter, reservation, record, entry.base, now)

    def hold_estimates(self, reservation: Reservation, now: int) -> None:
        """Let the estimates last until they are settled."""
        record = self.records.find(reservation.id)
        if record is None or record.never_lapses:
            return
        for meter, entry in zip(reservation.meters, record.entries, strict=True):
            if not entry.is_settled:
                self._hold_on(meter, reservation, record, entry, now)
        record.never_lapses = True

    def settle(self, reservation: Reservation, units: Units, now: int, *, replace: bool) -> Settlement:
        """Put what was used in place of the estimates, once."""
        record = self.records.find(reservation.id)
        if record is None or record.is_dead(now):
            return Settlement.UNKNOWN
        met = set()
        for meter, entry in zip(reservation.meters, record.entries, strict=True):
            amount = units.get(meter.unit)
            if amount is not None:
                met.add(self._settle(meter, reservation, record, entry, amount, now, replace=replace))
        if all([entry.is_settled for entry in record.entries]):
            dies = now + _longest(reservation)
            # Of a settle that changes nothing, a clock that was set back shortens no life.
            record.dies = dies if Settlement.SETTLED in met else max(record.dies, dies)
        order = (Settlement.DIFFERENT, Settlement.SETTLED, Settlement.REPEATED)
        return next((each for each in order if each in met), Settlement.UNKNOWN)

    def finish(self, reservation: Reservation, action: EstimateAction, now: int) -> None:
        """End a charge: what is not settled is counted as estimated, or given back."""
        record = self.records.forget(reservation.id)
        if record is None:
            return
        for meter, entry in zip(reservation.meters, record.entries, strict=True):
            if not entry.is_settled:
                self._hold_on(meter, reservation, record, entry, now)
                if action is EstimateAction.GIVE_BACK:
                    self._give_back(meter, now, record.at, entry.base)

    def forget(self, meters: tuple[Meter, ...]) -> None:
        """Forget what is open, where windows were forgotten."""
        for meter in meters:
            self._open.forget(_open_name(meter))

    def _settle(  # noqa: PLR0913 - one entry of one record
        self,
        meter: Meter,
        reservation: Reservation,
        record: MeterRecord,
        entry: MeterEntry,
        amount: int,
        now: int,
        *,
        replace: bool,
    ) -> Settlement:
        if entry.is_settled:
            if entry.base + entry.extra == amount:
                return Settlement.REPEATED
            if not replace:
                return Settlement.DIFFERENT
            self._give_back(meter, now, entry.extra_at, entry.extra)
        else:
            self._hold_on(meter, reservation, record, entry, now)
        entry.is_settled, entry.extra, entry.extra_at = True, max(amount - entry.base, 0), now
        if amount < entry.base:
            self._give_back(meter, now, record.at, entry.base - amount)
            entry.base = amount
        for log, ref in self._windows(meter) if entry.extra else ():
            log.add(ref, now, entry.extra)
            if not log.is_stored:
                ref.store.add(ref.name, log, now)
        return Settlement.SETTLED

    def _hold_on(
        self, meter: Meter, reservation: Reservation, record: MeterRecord, entry: MeterEntry, now: int
    ) -> None:
        """Let an estimate lapse no more; one that has lapsed was given back, and counts nothing."""
        self.lapse((meter,), now)
        if entry.base and not record.never_lapses:
            estimates = self._open.get(_open_name(meter))
            if estimates is None or estimates.by_id.pop(reservation.id, None) is None:
                entry.base = 0

    def _put(
        self, meter: Meter, reservation: Reservation, record: MeterRecord, estimate: int, now: int
    ) -> None:
        estimates = self._open.get(_open_name(meter))
        if estimates is None:
            estimates = OpenEstimates()
            self._open.add(_open_name(meter), estimates, now)
        estimates.put(reservation.id, now + int(reservation.lease_seconds * SECOND), record.at, estimate)

    def _give_back(self, meter: Meter, now: int, at: int, cost: int) -> None:
        for log, ref in self._windows(meter) if cost else ():
            log.give_back(ref, now, at, cost)

    def _windows(self, meter: Meter) -> Iterator[tuple[WindowLog, CounterRef]]:
        for window in meter.windows:
            logs = self._logs_of(window.length)
            ref = CounterRef(logs, meter[:2], window, partial(WindowLog, window.length))
            yield logs.find(meter[:2]) or WindowLog(window.length), ref


def _open_name(meter: Meter) -> Name:
    return meter.partition, meter.open_scope


def _longest(reservation: Reservation) -> int:
    return max([window.length for meter in reservation.meters for window in meter.windows])
