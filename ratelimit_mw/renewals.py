"""Keeps the slots of this process's live leases: one timer renews them all, together."""

import asyncio
import logging
import time
from math import inf
from typing import TYPE_CHECKING

from ratelimit_mw.charge import BackendError, Money
from ratelimit_mw.compiled import core
from ratelimit_mw.events import Notifier, SlotLost
from ratelimit_mw.lease import Lease

logger = logging.getLogger("ratelimit_mw")

RENEWALS_PER_LEASE = 3
"""So that two renewals in a row may fail before a slot is lost."""


class RenewalsState:
    """What is looked at for each lease."""

    leases: dict[bytes, Lease]
    """Those that are renewed, by id."""
    covers: float
    """The timer comes in time for leases of so many seconds or more; infinite where there is none."""


if core is not None and not TYPE_CHECKING:
    RenewalsState = core.RenewalsState


class Renewals(RenewalsState):
    """The live leases of one event loop. Created inside that loop."""

    def __init__(self, notify: Notifier) -> None:
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self.leases = {}
        self.covers = inf
        self._timer: asyncio.TimerHandle | None = None
        self._tick = 10.0
        self._task: asyncio.Task[None] | None = None
        self.lost = 0
        """How many slots were lost before they could be renewed."""

    def __len__(self) -> int:
        return len(self.leases)

    def add(self, lease: Lease) -> None:
        """Renew this lease's slots until it is removed or it is time to give it up."""
        hold = lease.hold
        _schedule(lease)
        lease.renewals = self
        self.leases[hold.id] = lease
        if hold.lease < self.covers:
            self._tick = min(self._tick, hold.lease / RENEWALS_PER_LEASE)
            self._schedule()

    def remove(self, lease: Lease) -> bool:
        """Stop renewing; whether it was still being renewed."""
        return self.leases.pop(lease.hold.id, None) is not None

    async def renew(self, lease: Lease, seconds: float) -> bool:
        """Renew a lease now, for `seconds`; false where it was lost before. Raises `BackendError`."""
        kept = await _renew(lease, seconds)
        if not kept:
            self._report_lost(lease)
        return kept

    def close(self) -> None:
        """Stop renewing anything."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.covers = None, inf
        if self._task is not None:
            self._task.cancel()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._tick / 2, self._on_timer)
        self.covers = self._tick * RENEWALS_PER_LEASE

    def _on_timer(self) -> None:
        self._timer = None
        if not self.leases:
            self._tick, self.covers = 10.0, inf
            return
        self._schedule()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._renew_due(), name="ratelimit_mw renewals")

    async def _renew_due(self) -> None:
        now = time.monotonic()
        due = [lease for lease in list(self.leases.values()) if lease.renew_at <= now]
        for lease in due:
            if lease.give_up_at is not None and lease.give_up_at <= now:
                self._give_up(lease)
        await asyncio.gather(*[self._renew_one(lease) for lease in due])

    async def _renew_one(self, lease: Lease) -> None:
        if self.leases.get(lease.hold.id) is not lease:
            return  # ended or detached in this very turn, when a renewal would cut its ttl short
        try:
            kept = await _renew(lease, lease.hold.lease)
        except BackendError:
            return  # at the next tick again, until the lease is over
        _schedule(lease)
        if not kept and self.remove(lease):
            self._report_lost(lease)

    def _report_lost(self, lease: Lease) -> None:
        self.lost += 1
        lease.is_lost = True
        text = "slot lost: lease %s was not renewed in time; its work runs on uncounted"
        logger.warning(text, lease.id, extra={"ratelimit": {"event": "slot_lost", "lease": lease.id}})
        self._notify(SlotLost(lease.id))

    def _give_up(self, lease: Lease) -> None:
        self.remove(lease)
        lease.is_lost = True
        lease.backend.finish(lease.hold, Money.UNTOUCHED)
        text = "slot freed: lease %s was held for its max_hold; its work runs on uncounted"
        logger.warning(text, lease.id, extra={"ratelimit": {"event": "slot_freed", "lease": lease.id}})
        self._notify(SlotLost(lease.id))


async def _renew(lease: Lease, seconds: float) -> bool:
    """Renew a lease, but never beyond the time to give it up."""
    if lease.give_up_at is not None:
        seconds = min(seconds, lease.give_up_at - time.monotonic())
    return seconds > 0 and await lease.backend.renew(lease.hold, seconds)


def _schedule(lease: Lease) -> None:
    due = time.monotonic() + lease.hold.lease / RENEWALS_PER_LEASE
    lease.renew_at = due if lease.give_up_at is None else min(due, lease.give_up_at)
