"""Keeps the slots and estimates of this process's live leases: one timer renews them all.

It looks through the leases six times in the shortest `lease`, and renews those that are due until its next
look, many in one operation and spread over that time. So thousands of slots are neither renewed each on its
own nor all in one moment, in which requests would have to wait.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from math import inf
from time import monotonic
from weakref import WeakValueDictionary

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, ReservationStore
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.observe.events import Notifier, SlotLost

logger = logging.getLogger("ratelimit_mw")

RENEWALS_PER_LEASE = 3
"""So that two renewals in a row may fail before a slot is lost."""
_RENEW_AFTER = 1 / RENEWALS_PER_LEASE
"""Share of a lease after which it is renewed."""
LOOKS_PER_LEASE = 2 * RENEWALS_PER_LEASE
AT_ONCE = 128
"""Leases in one operation: neither this process nor the server takes a millisecond for it."""


class Renewals:
    """The live leases of one event loop. Created inside that loop."""

    def __init__(self, notify: Notifier) -> None:
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self.leases: dict[bytes, Lease] = {}
        """Leases with slots that are renewed, by id."""
        self._slotless: WeakValueDictionary[bytes, Lease] = WeakValueDictionary()
        """Leases that have an estimate alone.

        The estimate of a lease that is dropped without an end lapses."""
        self.covers: float = inf
        """Shortest lease in seconds that the timer comes in time for; infinite where there is none."""
        self._timer: asyncio.TimerHandle | None = None
        self._next_look = -inf
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost: int = 0
        """Number of slots that were lost before they could be renewed."""

    def __len__(self) -> int:
        return len(self.leases) + len(self._slotless)

    def live(self) -> list[Lease]:
        """List all that are renewed."""
        slotless = [each() for each in self._slotless.valuerefs()]
        return [*self.leases.values(), *[lease for lease in slotless if lease is not None]]

    def add(self, lease: Lease) -> None:
        """Renew this lease until it is removed, its slots until it is time to give them up."""
        reservation, now = lease.reservation, monotonic()
        lease.renew_at = now + reservation.lease_seconds * _RENEW_AFTER
        lease.renewals = self
        if reservation.slots:
            self.leases[reservation.id] = lease
        else:
            self._slotless[reservation.id] = lease
        if reservation.lease_seconds < self.covers:
            self._schedule(reservation.lease_seconds)
        if lease.give_up_at is not None and lease.give_up_at <= self._next_look:
            self._loop.call_later(lease.give_up_at - now, self._give_up, lease)

    def remove(self, lease: Lease) -> bool:
        """Stop renewing; whether it was still being renewed."""
        lease_id = lease.reservation.id
        return (self.leases.pop(lease_id, None) or self._slotless.pop(lease_id, None)) is not None

    def _renews(self, lease: Lease) -> bool:
        return (self.leases.get(lease.reservation.id) or self._slotless.get(lease.reservation.id)) is lease

    async def renew(self, lease: Lease, seconds: float) -> bool:
        """Renew a lease now, for `seconds`; false where it was lost before. Raises `BackendError`."""
        left = _seconds(lease, seconds)
        kept = left > 0 and await lease.backend.renew(_held(lease), left)
        if not kept:
            self._report_lost(lease)
        return kept

    def close(self) -> None:
        """Stop renewing anything."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.covers = None, inf
        for task in self._tasks:
            task.cancel()

    def _schedule(self, covers: float) -> None:
        """Look through the leases in time for those of `covers` seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self.covers = covers
        self._timer = self._loop.call_later(covers / LOOKS_PER_LEASE, self._look)
        self._next_look = monotonic() + covers / LOOKS_PER_LEASE

    def _look(self) -> None:
        self._timer = None
        if not len(self):
            self.covers, self._next_look = inf, -inf
            return
        self._schedule(self.covers)
        now, until = monotonic(), self._next_look
        due: list[Lease] = []
        for lease in self.live():
            if lease.renew_at <= until:
                due.append(lease)
            if lease.give_up_at is not None and lease.give_up_at <= until and not lease.is_lost:
                self._loop.call_later(lease.give_up_at - now, self._give_up, lease)
        if due:
            self._start(self._renew_due(due, until - now))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work, name="ratelimit_mw renewals")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew_due(self, due: list[Lease], seconds: float) -> None:
        """Renew leases, spread evenly over so many seconds."""
        start, parts = self._loop.time(), -(-len(due) // AT_ONCE)
        size = -(-len(due) // parts)
        for part in range(parts):
            if part:  # one turn of the loop at least, however late it is
                await asyncio.sleep(start + seconds * part / parts - self._loop.time())
            leases = due[part * size : part * size + size]
            now = monotonic()
            by_backend: dict[ReservationStore, list[Lease]] = {}
            for lease in leases:
                # Else it was renewed or has ended meanwhile, or was detached: that would cut its ttl short.
                if self._renews(lease) and lease.renew_at <= now + seconds:
                    lease.renew_at = now + lease.reservation.lease_seconds / RENEWALS_PER_LEASE
                    by_backend.setdefault(lease.backend, []).append(lease)
            for backend, held in by_backend.items():
                self._start(self._renew_all(backend, held))

    async def _renew_all(self, backend: ReservationStore, leases: Sequence[Lease]) -> None:
        seconds = [_seconds(lease, lease.reservation.lease_seconds) for lease in leases]
        renewals = [(lease, _held(lease), left) for lease, left in zip(leases, seconds, strict=True)]
        renewals = [each for each in renewals if each[2] > 0]  # the others are just being given up
        answers = await backend.renew_all([each[1:] for each in renewals])
        for (lease, _, _), kept in zip(renewals, answers, strict=True):
            if isinstance(kept, BackendError):
                lease.renew_at = 0.0  # at the next look again, until the lease is over
            elif not kept and self._renews(lease) and lease.reservation.slots:
                self._report_lost(lease)
                self._leave_slots(lease)

    def _report_lost(self, lease: Lease) -> None:
        self.lost += 1
        for each in lease.same_job or (lease,):
            each.is_lost = True
        text = "slot lost: lease %s was not renewed in time; its work goes on, but is not counted"
        logger.warning(text, lease.id, extra={"ratelimit": {"event": "slot_lost", "lease": lease.id}})
        self._notify(SlotLost(lease.id))

    def _give_up(self, lease: Lease) -> None:
        if not self._renews(lease) or lease.is_lost or not lease.reservation.slots:
            return  # it has ended, or goes on elsewhere
        for each in lease.same_job or (lease,):
            each.is_lost = True
        self._leave_slots(lease)
        lease.backend.finish(lease.reservation, EstimateAction.UNTOUCHED)
        text = "slot freed: lease %s was held for max_hold; its work goes on, but is not counted"
        logger.warning(text, lease.id, extra={"ratelimit": {"event": "slot_freed", "lease": lease.id}})
        self._notify(SlotLost(lease.id))

    def _leave_slots(self, lease: Lease) -> None:
        """Renew the slots of a lease no more: only its estimate, where its work goes on here."""
        self.remove(lease)
        if not lease.is_detached and lease.reservation.has_estimate:
            self._slotless[lease.reservation.id] = lease


def _held(lease: Lease) -> Reservation:
    """Return the part of a reservation to renew: no lost slots, and no estimate that is kept anyway."""
    reservation = lease.reservation
    if lease.is_lost:
        reservation = reservation.with_keys(
            (), reservation.periods, reservation.meters, reservation.estimates
        )
    return (
        reservation.with_keys(reservation.slots, (), (), ())
        if lease.is_detached and reservation.has_estimate
        else reservation
    )


def _seconds(lease: Lease, seconds: float) -> float:
    """For how long to renew the slots of a lease: never beyond the time to give them up."""
    if lease.give_up_at is None or lease.is_lost or not lease.reservation.slots:
        return seconds
    return min(seconds, lease.give_up_at - monotonic())
