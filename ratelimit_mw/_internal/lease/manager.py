"""Leases after their admission: renewed, ended, detached into jobs and resumed."""

import asyncio
import logging
import threading
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from time import monotonic

from ratelimit_mw._internal.lease.background import BackgroundWork
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.renewals import Renewals
from ratelimit_mw._internal.lease.settling import Settling
from ratelimit_mw._internal.lease.token import JOB, LeaseError, Ticket, check_ttl, read_token, write_token
from ratelimit_mw._internal.lease.verdicts import verdicts_of
from ratelimit_mw._internal.model.backend import (
    Backend,
    BackendError,
    EstimateAction,
    ReservationStore,
    UnderWay,
)
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation
from ratelimit_mw._internal.observe.events import Notifier
from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.runtime.event_loop import take_ended
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

logger = logging.getLogger("ratelimit_mw")

EXEMPT = Decision(True, 0)
"""Admitting decision for leases that nothing limits."""
_KEEP, _GIVE_BACK = EstimateAction.KEEP, EstimateAction.GIVE_BACK  # looked up once: that costs a lot
ChargeLate = Callable[[Lease, Sequence[KeyedLimit | Limit], float | None], Awaitable[None]]

_SUCCEEDED, _FAILED = 200, 500
"""In place of the status of an answer, where there is none."""


async def _charge_nothing(lease: Lease, limits: Sequence[KeyedLimit | Limit], _: float | None) -> None:
    raise LeaseError(f"{limits!r} can't be charged: no limiter decides about lease {lease.id}")


class Leases:
    """The leases of one limiter, in all its event loops."""

    def __init__(self, backend: Backend, notify: Notifier, secret: str, timeout: float) -> None:
        """Tokens are signed under `secret`; `timeout` is how many seconds to wait for the backend at most."""
        self.token_store: ReservationStore = backend
        """Store of the reservations that are known by a token alone."""
        self._notify = notify
        self._secret = secret
        self._jobs: dict[bytes, list[Lease]] = {}
        """Detached leases that go on in this process, by id: each as often as it was resumed."""
        self._lock = threading.Lock()
        self.renewals: dict[asyncio.AbstractEventLoop, Renewals] = {}
        self.background: BackgroundWork = BackgroundWork(timeout)
        self.settling: Settling = Settling(backend, self.background, notify)
        self._slots_lost = 0
        self.charge_late: ChargeLate = _charge_nothing
        """Decides about what a handler charges while its request runs."""
        self.freed: Callable[[Reservation], None] | None = None
        """Is told of what is given back, where a call may wait for it."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the leases to the parent process, and count anew."""
        self._lock = threading.Lock()
        leave_to_parent(*self.renewals.values(), *self.background.tasks, *self._jobs.values())
        self._jobs.clear()
        self.renewals.clear()
        self.background.tasks.clear()
        self._slots_lost = self.settling.ignored = 0

    @property
    def slots_lost(self) -> int:
        """Number of slots that were lost before they could be renewed."""
        return self._slots_lost + sum([each.lost for each in list(self.renewals.values())])

    @property
    def number(self) -> int:
        """Number of leases that are renewed."""
        return sum(map(len, list(self.renewals.values())))

    def stop_renewing(self) -> None:
        """Renew nothing any more in the running event loop."""
        renewals = self.renewals.pop(asyncio.get_running_loop(), None)
        if renewals is not None:
            renewals.close()
            self._slots_lost += renewals.lost

    def start_renewing(self, lease: Lease, charge: Charge) -> None:
        """Renew the slots and the estimate of a lease from now on."""
        if charge.max_hold is not None:
            lease.give_up_at = monotonic() + charge.max_hold
        renewals = self.renewals.get(get_running_loop())
        if renewals is None:
            renewals = self.renewing()
        renewals.add(lease)

    def end(self, lease: Lease, failed: bool, status: int = 0) -> None:
        """The request is over: free its slots; give its estimate back where it failed. Waits for nothing.

        A detached lease is left to whoever has its token. Only the first end counts. `status` is that of the
        answer; 0 where there is none.
        """
        for late in lease.late:
            self.end(late, failed, status)
        if lease.is_ended:
            return
        lease.is_ended, lease.scope = True, None
        if lease.policy.answers is not None and lease.reservation is not NO_RESERVATION:
            failed = self._judge(lease, failed, status)
        if lease.reservation is not NO_RESERVATION and not lease.is_detached:
            lease.stop_renewing()
            reservation = lease.reservation.without_meters() if lease.is_metered_out else lease.reservation
            if reservation is not NO_RESERVATION:
                self._finish(lease, reservation, _GIVE_BACK if failed else _KEEP)

    def _finish(self, lease: Lease, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free slots and decide about the estimate, and tell those who wait for it. Waits for nothing."""
        sent = lease.backend.finish(reservation, action)
        if self.freed is not None:
            self.freed(reservation)
        return sent

    def _judge(self, lease: Lease, failed: bool, status: int) -> bool:
        """Settle the windows that count some answers alone; whether the rest is to be given back.

        Where there is no rest, that alone says what becomes of them: one operation in place of two.
        """
        reservation, status = lease.reservation, status or (_FAILED if failed else _SUCCEEDED)
        verdicts = verdicts_of(lease.policy, status)
        others = [meter for meter in reservation.meters if meter.unit not in verdicts]
        said = set(verdicts.values())
        if not others and not reservation.has_price and len(said) == 1 and not lease.is_detached:
            return not said.pop()
        units = {
            meter.unit: estimate if verdicts[meter.unit] else 0
            for meter, estimate in zip(reservation.meters, reservation.estimates, strict=True)
            if meter.unit in verdicts and (verdicts[meter.unit] == failed or lease.is_detached)
        }
        if units:
            lease.backend.settle_units(reservation, units)  # under way, whether somebody waits or not
        return failed

    async def charge(
        self, lease: Lease, limits: Sequence[KeyedLimit | Limit], max_wait: float | None
    ) -> None:
        """See `Lease.charge`."""
        await self.charge_late(lease, limits, max_wait)

    def undo(self, lease: Lease) -> None:
        """Give back all that a request was charged, since it is refused after all. Waits for nothing.

        What was detached stays with its job: of that, only `settle`, `release` and `renew` change anything.
        """
        for late in lease.late:
            self.undo(late)
        if lease.is_ended or lease.is_detached:
            return
        lease.is_ended = True
        reservation, outcome = lease.reservation, lease.outcome
        lease.reservation, lease.outcome = NO_RESERVATION, None
        if outcome is None and lease.decision.policy != "local":
            return  # nothing was charged
        lease.stop_renewing()
        now = lease.decision.now_us if outcome is None else outcome.now
        times = (now,) if outcome is None else outcome.times or (now,)
        charge: object = lease.initial_charge
        if outcome is not None and outcome.drawn is not None:
            charge = outcome.drawn.charge
            outcome.drawn.put_back()
        if isinstance(charge, Charge):
            lease.backend.give_back(charge, reservation, times)
        if self.freed is not None:
            self.freed(reservation)

    async def release(self, lease: Lease | str) -> None:
        """Free the slots of a lease or a token. Idempotent. Raises `LeaseError` for what is not a token."""
        lease = self._given(lease)
        for late in lease.late:
            await self.release(late)
        reservation = lease.reservation
        if reservation.slots:
            is_last = True
            if lease.same_job:
                is_last = self._leave_job(lease)
            else:
                lease.stop_renewing()
            # Before anything is awaited: whatever comes in between, the slots are freed once.
            lease.reservation = reservation.without_slots()
            if reservation.has_estimate and not lease.is_detached and not lease.is_ended:
                if lease.is_acquired:
                    lease.backend.hold_estimate(reservation)  # nobody may ever end it
                else:
                    self.renewing().add(lease)  # until its request ends
            if is_last:
                sent = self._finish(lease, reservation, EstimateAction.UNTOUCHED)
                await self.background.arrive(sent, "a release", lease)

    async def detach(self, lease: Lease, ttl: float) -> str:
        """See `Lease.detach`."""
        seconds = check_ttl(ttl) if lease.is_charged else 0.0  # what was not, promises never to raise
        if not lease.is_ended:
            await self.settling.open_estimate(lease)  # the token has it
        if lease.is_detached:
            return lease.token
        lease.stop_renewing()
        lease.is_detached = True
        # One of this process alone becomes the backend's, under the same id, when that is back.
        reservation = NO_RESERVATION if lease.is_ended else lease.reservation
        ticket = Ticket(reservation, lease.give_up_at, lease.local_estimate)
        lease.token = write_token(ticket, self._secret)
        if reservation.is_leased or reservation.meters:
            try:
                await self._hand_over(lease, seconds)
            except BaseException:  # cancelled, or ended by hand
                self._attach(lease)
                raise
        return lease.token

    async def _hand_over(self, lease: Lease, seconds: float) -> None:
        """Have the backend keep what a lease holds: slots for so long, the estimate until it is settled."""
        kept = None
        if lease.reservation.has_estimate or lease.reservation.meters:
            kept = lease.backend.hold_estimate(lease.reservation)
        if lease.reservation.slots:
            await self._renew(lease, seconds)
        if kept is not None:
            await self.background.arrive(kept, "the estimate of a detached job", lease)

    def _attach(self, lease: Lease) -> None:
        """Undo a detach that was cancelled: nobody has the token, so the slot ends with the request."""
        lease.is_detached, lease.token = False, ""
        if lease.is_ended:  # meanwhile
            lease.backend.finish(lease.reservation, EstimateAction.KEEP)
        elif not lease.is_lost or lease.reservation.has_estimate:
            self.renewing().add(lease)

    @asynccontextmanager
    async def resume(self, token: str) -> AsyncIterator[Lease]:
        """Go on with a detached job: its slot is renewed meanwhile and freed at the end, however it ends.

        Raises `LeaseError` for a token that is damaged or forged. Where the slot was lost before, the work
        runs on uncounted, and `is_lost` says so.
        """
        lease = self._of_token(token)
        if not lease.reservation.slots:
            yield lease
            return
        self._join(lease)
        try:
            if await self._renew(lease, lease.reservation.lease_seconds):
                self.renewing().add(lease)
            yield lease
        finally:
            if lease.reservation.slots and self._leave_job(lease):
                self._finish(lease, lease.reservation, EstimateAction.UNTOUCHED)

    def _join(self, lease: Lease) -> None:
        """Go on with a job in this process, beside others perhaps: a queue may deliver it twice."""
        with self._lock:
            working = self._jobs.setdefault(lease.reservation.id, [])
            working.append(lease)
            lease.same_job = working

    def _leave_job(self, lease: Lease) -> bool:
        """Leave a job. True if no other lease of this process works on it, so that its slot may be freed."""
        lease.stop_renewing()
        with self._lock:
            others = self._jobs[lease.reservation.id]
            others.remove(lease)
            if not others:
                del self._jobs[lease.reservation.id]
            others = list(others)
        for other in others:
            if other.renewals is not None and other.renewals is lease.renewals and not other.is_lost:
                other.renewals.add(other)  # one of them is renewed in each event loop
                break
        return not others

    async def renew(self, token: str) -> bool:
        """Let a detached job's slot last for its lease from now; false where it was lost before."""
        lease = self._of_token(token)
        return not lease.reservation.slots or await self._renew(lease, lease.reservation.lease_seconds)

    async def settle(
        self,
        lease: Lease | str,
        amount: str | int | Decimal | None,
        *,
        units: Units | None = None,
        replace: bool = False,
    ) -> None:
        """See `Lease.settle`; takes a token as well. Raises `LeaseError`."""
        settled = self._given(lease)
        sent = self.settling.settle(settled, amount, units, replace)
        await sent.wait(self.background.timeout)
        if self.freed is not None:
            for each in (settled, *settled.late):
                self.freed(each.reservation)

    async def _renew(self, lease: Lease, seconds: float) -> bool:
        """Renew a lease that no timer renews; whether it is still held, as far as one can tell."""
        try:
            return await self.renewing().renew(lease, seconds)
        except BackendError as error:
            logger.warning("lease %s could not be renewed: %s", lease.id, error)
            return True

    def _given(self, lease: Lease | str) -> Lease:
        """A lease as it is, or that of a token."""
        return lease if isinstance(lease, Lease) else self._of_token(lease)

    def _of_token(self, token: str) -> Lease:
        ticket = read_token(token, self._secret)
        lease = Lease(self, self.token_store, JOB, JOB.identity, JOB.charge)
        lease.decide(EXEMPT)
        lease.reservation = ticket.reservation
        lease.give_up_at = ticket.give_up_at
        lease.local_estimate = ticket.money
        lease.is_detached, lease.token = True, token
        return lease

    def renewing(self) -> Renewals:
        """The running loop's renewals."""
        loop = get_running_loop()
        renewals = self.renewals.get(loop)
        if renewals is None:
            self._slots_lost += sum([each.lost for each in take_ended(self.renewals)])
            renewals = self.renewals[loop] = Renewals(self._notify)
        return renewals
