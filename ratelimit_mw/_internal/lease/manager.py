"""Life of leases after their admission: kept, ended, detached into jobs, settled."""

import asyncio
import dataclasses
import logging
import threading
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from time import monotonic
from typing import Any

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.renewals import Renewals
from ratelimit_mw._internal.lease.token import LeaseError, Ticket, check_ttl, read_token, write_token
from ratelimit_mw._internal.model.backend import Backend, BackendError, EstimateAction, Holder, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.money import format_amount, parse_amount
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, new_lease_id
from ratelimit_mw._internal.observe.events import Notifier, SettleIgnored
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

logger = logging.getLogger("ratelimit_mw")

EXEMPT = Decision(True, 0)
"""Admitting decision for leases that nothing limits."""
_NOTHING = Charge(())
_JOB = Policy(
    identity=Identity("", ""),
    route=None,
    charge=_NOTHING,
    priced_charge=_NOTHING,
    price=None,
    currency=None,
    too_small=None,
    on_failure="allow",
    on_failure_priced="allow",
    shadow=False,
    is_exempt=True,
    stock=None,
)
"""Policy of a lease that is known by its token alone: nothing limits it any more."""
_KEEP, _GIVE_BACK = (
    EstimateAction.KEEP,
    EstimateAction.GIVE_BACK,
)  # to look one up in the enumeration costs as much as all else
_ANY_AMOUNT = 2**53
"""More than any budget has."""


class Leases:
    """The leases of one limiter, in all its event loops."""

    def __init__(self, backend: Backend, notify: Notifier, secret: str, timeout: float) -> None:
        """Tokens are signed under `secret`; `timeout` is how many seconds to wait for the backend at most."""
        self._backend = backend
        self.holder: Holder = backend
        """Keeper of holds that are known by a token alone."""
        self._notify = notify
        self._secret = secret
        self._timeout = timeout
        self._jobs: dict[bytes, list[Lease]] = {}
        """Detached leases that go on in this process, by id: each as often as it was resumed."""
        self._lock = threading.Lock()
        self.renewals: dict[asyncio.AbstractEventLoop, Renewals] = {}
        self.owed: set[asyncio.Future[Any]] = set()
        """Work under way to the backend, kept here because nobody may be waiting for it."""
        self._slots_lost = 0
        self.settles_ignored = 0
        """Number of ignored settles: settled before with another amount, or unknown to the backend."""
        self.on_uncounted: Callable[[object], None] = lambda _: None
        """Told of each unit that is settled though no limit of the request counts it."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the leases to the parent process, and count anew."""
        self._lock = threading.Lock()
        leave_to_parent(*self.renewals.values(), *self.owed, *self._jobs.values())
        self._jobs.clear()
        self.renewals.clear()
        self.owed.clear()
        self._slots_lost = self.settles_ignored = 0

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

    async def finish(self) -> None:
        """Wait for what is under way from the running event loop, for a bounded time."""
        owed = [task for task in list(self.owed) if task.get_loop() is asyncio.get_running_loop()]
        if owed:  # and cannot be written any more, which the log has to say
            await asyncio.wait(owed, timeout=self._timeout)

    def keep(self, lease: Lease, charge: Charge) -> None:
        """Renew the slots and the estimate of a lease from now on."""
        if charge.max_hold is not None:
            lease.give_up_at = monotonic() + charge.max_hold
        renewals = self.renewals.get(get_running_loop())
        if renewals is None:
            renewals = self.renewing()
        renewals.add(lease)

    def _leave(self, lease: Lease) -> None:
        """Renew a lease's slots no more."""
        if lease.renewals is not None:
            lease.renewals.remove(lease)

    def end(self, lease: Lease, failed: bool) -> None:
        """The request is over: free its slots; give its estimate back where it failed. Waits for nothing.

        A detached lease is left to whoever has its token. Only the first end counts.
        """
        if lease.is_ended:
            return
        lease.is_ended = True
        if lease.hold is not NO_RESERVATION and not lease.is_detached:
            if lease.renewals is not None:
                lease.renewals.remove(lease)
            hold = lease.hold.without_meters() if lease.is_metered_out else lease.hold
            if hold is not NO_RESERVATION:
                lease.backend.finish(hold, _GIVE_BACK if failed else _KEEP)

    async def release(self, lease: Lease | str) -> None:
        """Free the slots of a lease or a token. Idempotent. Raises `LeaseError` for what is no token."""
        lease = self._given(lease)
        hold = lease.hold
        if hold.slots:
            is_last = True
            if lease.holders:
                is_last = self._is_last(lease)
            else:
                self._leave(lease)
            # Before anything is awaited: whatever comes in between, the slots are freed once.
            lease.hold = hold.without_slots()
            if hold.has_estimate and not lease.is_detached and not lease.is_ended:
                if lease.is_acquired:
                    lease.backend.keep(hold)  # nobody may ever end it
                else:
                    self.renewing().add(lease)  # until its request ends
            if is_last:
                await self._arrive(lease.backend.finish(hold, EstimateAction.UNTOUCHED), "a release", lease)

    async def detach(self, lease: Lease, ttl: float) -> str:
        """See `Lease.detach`."""
        seconds = check_ttl(ttl) if lease.is_charged else 0.0  # what was not, promises never to raise
        if not lease.is_ended:
            await self._open_estimate(lease)  # the token has it
        if lease.is_detached:
            return lease.token
        self._leave(lease)
        lease.is_detached = True
        # One of this process alone becomes the backend's, under the same id, when that is back.
        hold = NO_RESERVATION if lease.is_ended else lease.hold
        lease.token = write_token(Ticket(hold, lease.give_up_at), self._secret)
        if hold.is_leased:
            try:
                await self._hand_over(lease, seconds)
            except BaseException:  # cancelled, or ended by hand
                self._attach(lease)
                raise
        return lease.token

    async def _hand_over(self, lease: Lease, seconds: float) -> None:
        """Have the backend keep what a lease holds: slots for so long, the estimate until it is settled."""
        kept = lease.backend.keep(lease.hold) if lease.hold.has_estimate else None
        if lease.hold.slots:
            await self._renew(lease, seconds)
        if kept is not None:
            await self._arrive(kept, "the estimate of a detached job", lease)

    def _attach(self, lease: Lease) -> None:
        """Undo a detach that was cancelled: nobody has the token, so the slot ends with the request."""
        lease.is_detached, lease.token = False, ""
        if lease.is_ended:  # meanwhile
            lease.backend.finish(lease.hold, EstimateAction.KEEP)
        elif not lease.is_lost or lease.hold.has_estimate:
            self.renewing().add(lease)

    @asynccontextmanager
    async def resume(self, token: str) -> AsyncIterator[Lease]:
        """Go on with a detached job: its slot is renewed meanwhile and freed at the end, however it ends.

        Raises `LeaseError` for a token that is damaged or forged. Where the slot was lost before, the work
        runs on uncounted, and `is_lost` says so.
        """
        lease = self._of_token(token)
        if not lease.hold.slots:
            yield lease
            return
        self._join(lease)
        try:
            if await self._renew(lease, lease.hold.lease):
                self.renewing().add(lease)
            yield lease
        finally:
            if lease.hold.slots and self._is_last(lease):
                lease.backend.finish(lease.hold, EstimateAction.UNTOUCHED)

    def _join(self, lease: Lease) -> None:
        """Go on with a job in this process, beside others perhaps: a queue may deliver it twice."""
        with self._lock:
            holders = self._jobs.setdefault(lease.hold.id, [])
            holders.append(lease)
            lease.holders = holders

    def _is_last(self, lease: Lease) -> bool:
        """Leave a job; whether nobody else goes on with it in this process, who would lose the slot."""
        self._leave(lease)
        with self._lock:
            others = self._jobs[lease.hold.id]
            others.remove(lease)
            if not others:
                del self._jobs[lease.hold.id]
            others = list(others)
        for other in others:
            if other.renewals is not None and other.renewals is lease.renewals and not other.is_lost:
                other.renewals.add(other)  # one of them is renewed in each event loop
                break
        return not others

    async def renew(self, token: str) -> bool:
        """Let a detached job's slot last for its lease from now; false where it was lost before."""
        lease = self._of_token(token)
        return not lease.hold.slots or await self._renew(lease, lease.hold.lease)

    async def settle(
        self,
        lease: Lease | str,
        amount: str | int | Decimal | None,
        *,
        units: Units | None = None,
        replace: bool = False,
    ) -> None:
        """See `Lease.settle`; takes a token as well. Raises `LeaseError`."""
        lease = self._given(lease)
        unpriced, price, used = lease.unpriced, None, dict[str, int]()
        try:
            if units is not None and lease.is_charged:
                used = self._units_of(lease, units)
            if amount is not None and (lease.hold.periods or unpriced is not None):
                price = parse_amount(amount, (unpriced or lease.hold).currency, round_up=True)
        except ValueError as error:
            raise LeaseError(f"cannot settle: {error}") from error
        started, sent = asyncio.get_running_loop().time(), list[Coroutine[Any, Any, None]]()
        if price is not None and (not lease.is_ended or lease.is_detached):
            await self._open_estimate(lease)
        if used:
            sent.append(self._settle_units(lease, used, replace))
        if price is not None:
            sent.append(self._settle(lease, price, replace))
        if sent:
            await self._arrive(_all(sent), "a settle", lease, started)

    def _units_of(self, lease: Lease, units: object) -> dict[str, int]:
        """The amounts of units that limits of the request count. Raises ValueError for what is no amount.

        Where none counts any, that is not looked at, as with a price where there is no budget.
        """
        counted = {meter.unit for meter in lease.hold.meters}
        for unit in units.keys() - counted if isinstance(units, Mapping) else ():
            self.on_uncounted(unit)
        if not counted:
            return {}
        return {unit: used for unit, used in check_amounts(units).items() if unit in counted}

    async def _settle_units(self, lease: Lease, units: Units, replace: bool) -> None:
        if lease.is_ended and not lease.is_detached:
            met = Settlement.UNKNOWN
        else:
            met = await lease.backend.settle_units(lease.hold, units, replace=replace)
        is_all = units.keys() == {meter.unit for meter in lease.hold.meters}
        if met is Settlement.SETTLED and is_all and lease.backend is self._backend:
            lease.is_metered_out = True
            if not lease.hold.slots and not lease.hold.has_price:
                self._leave(lease)
        self._tell_of_ignored(lease, met, ", ".join([f"{used} {unit}" for unit, used in units.items()]))

    async def _open_estimate(self, lease: Lease) -> None:
        """Give a request that has none an estimate of nothing, never refused, to be settled later."""
        unpriced = lease.unpriced
        if unpriced is None:
            return
        if lease.opening is None or (lease.opening.done() and not lease.hold.periods):
            lease.opening = asyncio.ensure_future(
                _log_failure(self._open(lease, unpriced), "an estimate", lease.id)
            )
            self.owed.add(lease.opening)
            lease.opening.add_done_callback(self.owed.discard)
        await asyncio.wait([lease.opening])  # not by this caller alone; the backend bounds it

    async def _open(self, lease: Lease, unpriced: Charge) -> None:
        charge = Charge(map(_without_end, unpriced.allowances))
        lease_id = lease.hold.id if lease.hold is not NO_RESERVATION else new_lease_id()
        opened = (await self._backend.acquire(charge, lease_id, 0)).hold
        # Its slots may have been freed meanwhile.
        held = lease.hold
        lease.hold = Reservation(
            opened.id,
            held.slots,
            opened.periods,
            held.lease,
            opened.price,
            opened.currency,
            held.meters,
            held.estimates,
        )

    async def _settle(self, lease: Lease, units: int, replace: bool) -> None:
        met = await lease.backend.settle(lease.hold, units, replace=replace)
        if not lease.hold.slots and (lease.is_metered_out or not any(lease.hold.estimates)):
            self._leave(lease)
        self._tell_of_ignored(lease, met, format_amount(units, lease.hold.currency))

    def _tell_of_ignored(self, lease: Lease, met: Settlement, amount: str) -> None:
        if met is Settlement.DIFFERENT:
            text = "settle ignored: lease %s was settled before with another amount"
            self._settle_ignored(text, SettleIgnored(lease.id, amount, "different"))
        elif met is Settlement.UNKNOWN:
            text = "settle ignored: lease %s has ended, or is too long ago"
            self._settle_ignored(text, SettleIgnored(lease.id, amount, "unknown"))

    def _settle_ignored(self, text: str, ignored: SettleIgnored) -> None:
        fields = {"event": "settle_ignored", "lease": ignored.lease_id, "reason": ignored.reason}
        logger.warning(text, ignored.lease_id, extra={"ratelimit": fields})
        self.settles_ignored += 1
        self._notify(ignored)

    async def _renew(self, lease: Lease, seconds: float) -> bool:
        """Renew a lease that no timer renews; whether it is still held, as far as one can tell."""
        try:
            return await self.renewing().renew(lease, seconds)
        except BackendError as error:
            logger.warning("lease %s could not be renewed: %s", lease.id, error)
            return True

    async def _arrive(
        self, sent: Awaitable[object], what: str, lease: Lease, started: float | None = None
    ) -> None:
        """Wait for the backend as long as a request would. What is owed to it goes on without the caller.

        The time counts from `started`, where something was waited for before.
        """
        task = asyncio.ensure_future(_log_failure(sent, what, lease.id))
        self.owed.add(task)
        task.add_done_callback(self.owed.discard)
        waited = 0.0 if started is None else asyncio.get_running_loop().time() - started
        done, _ = await asyncio.wait([task], timeout=max(self._timeout - waited, 0))
        if not done:
            logger.warning("%s of lease %s waits for the backend", what, lease.id)

    def _given(self, lease: Lease | str) -> Lease:
        """A lease as it is, or that of a token."""
        return lease if isinstance(lease, Lease) else self._of_token(lease)

    def _of_token(self, token: str) -> Lease:
        ticket = read_token(token, self._secret)
        lease = Lease(self, self.holder, _JOB, _JOB.identity, _JOB.charge)
        lease.decide(EXEMPT)
        lease.hold = ticket.hold
        lease.give_up_at = ticket.give_up_at
        lease.is_detached, lease.token = True, token
        return lease

    def renewing(self) -> Renewals:
        """The running loop's renewals."""
        loop = get_running_loop()
        renewals = self.renewals.get(loop)
        if renewals is None:
            for closed in [each for each in list(self.renewals) if each.is_closed()]:
                ended = self.renewals.pop(closed, None)  # another thread's loop may be doing the same
                self._slots_lost += 0 if ended is None else ended.lost
            renewals = self.renewals[loop] = Renewals(self._notify)
        return renewals


def _without_end(budget: Counter) -> Counter:
    """A budget as it is counted, with room for any price."""
    if not isinstance(budget.limit, Allowance):
        raise TypeError(f"only an allowance is spent, not {budget.limit!r}")
    return dataclasses.replace(budget, limit=dataclasses.replace(budget.limit, amount=_ANY_AMOUNT))


async def _all(sent: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; what one of them raises is raised when all are over."""
    for done in await asyncio.gather(*sent, return_exceptions=True):
        if isinstance(done, BaseException):
            raise done


async def _log_failure(sent: Awaitable[object], what: str, lease_id: str) -> None:
    try:
        await sent
    except BackendError as error:
        logger.error(  # noqa: TRY400 - the reason says it all, a trace would not
            "%s of lease %s did not reach the backend: %s", what, lease_id, error
        )
