"""Settles what requests and jobs really used, in place of their estimates."""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from ratelimit_mw._internal.lease.background import BackgroundWork
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.token import LeaseError
from ratelimit_mw._internal.model.backend import Backend, BackendError, Known, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.money import format_amount, parse_amount
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, new_lease_id
from ratelimit_mw._internal.observe.events import Notifier, SettleIgnored

logger = logging.getLogger("ratelimit_mw")

_ANY_AMOUNT = 2**53
"""More than any budget has."""


class OutageEstimates(Protocol):
    """Keeper of the estimates that are opened while the backend is away."""

    def open(self, charge: Charge) -> Reservation:
        """Open an estimate of nothing under an id of its own; the backend is told when it is back."""
        ...

    def settle(
        self, reservation: Reservation, amount: int, *, replace: bool = False
    ) -> Awaitable[Settlement]:
        """Settle it, wherever it is known by then."""
        ...


class Settling:
    """The settles of one limiter's leases: of money and of metered units."""

    def __init__(self, backend: Backend, background: BackgroundWork, notify: Notifier) -> None:
        self._backend = backend
        self.outage: OutageEstimates | None = None
        """Settles in this process what the backend can't be asked about; None where nothing is ever away."""
        self.local_estimates: WeakKeyDictionary[Lease, Reservation] = WeakKeyDictionary()
        """Estimates of zero by which requests without a price are settled there, by their lease."""
        self._background = background
        self._notify = notify
        self.ignored: int = 0
        """Number of ignored settles: settled before with another amount, or unknown to the backend."""
        self.on_uncounted: Callable[[object], None] = lambda _: None
        """Told of each unit that is settled though no limit of the request counts it."""

    async def settle(
        self, lease: Lease, amount: str | int | Decimal | None, units: Units | None, *, replace: bool
    ) -> None:
        """See `Lease.settle`. Raises `LeaseError`."""
        local_estimate, unpriced, price, used = (
            self.local_estimates.get(lease),
            lease.unpriced,
            None,
            dict[str, int](),
        )
        try:
            if units is not None and lease.is_charged:
                used = self._units_of(lease, units)
            if amount is not None and (local_estimate or lease.reservation.periods or unpriced is not None):
                currency = (local_estimate or unpriced or lease.reservation).currency
                price = parse_amount(amount, currency, round_up=True)
        except ValueError as error:
            raise LeaseError(f"cannot settle: {error}") from error
        sent = list[Coroutine[Any, Any, None]]()
        if used:
            sent.append(self._take_in_units(lease, used, self._send_units(lease, used, replace)))
        is_open = local_estimate is not None or unpriced is None
        if price is not None and not is_open and (not lease.is_ended or lease.is_detached):
            sent.append(self._open_and_settle(lease, price, replace))
        elif price is not None:
            # Sent here and not in a task of its own, so that no end of the request comes before it.
            sent.append(self._take_in_price(lease, price, self._send_price(lease, price, replace)))
        for late in lease.late:
            if late_used := {} if units is None else self._units_of(late, units):
                late_sent = self._send_units(late, late_used, replace)
                sent.append(self._take_in_units(late, late_used, late_sent))
        if sent:
            all_sent = sent[0] if len(sent) == 1 else _all(sent)
            await self._background.arrive(all_sent, "a settle", lease.id)

    def _units_of(self, lease: Lease, units: object) -> dict[str, int]:
        """The amounts of units that limits of the request count. Raises ValueError for what is not an amount.

        Where no limit counts any unit, the amounts are not checked: nor is a price without a budget.
        """
        counted = {meter.unit for meter in lease.reservation.meters}
        elsewhere = {meter.unit for each in lease.late for meter in each.reservation.meters}
        for unit in units.keys() - counted - elsewhere if isinstance(units, Mapping) else ():
            self.on_uncounted(unit)
        if not counted:
            return {}
        return {unit: used for unit, used in check_amounts(units).items() if unit in counted}

    def _send_units(self, lease: Lease, units: Units, replace: bool) -> Awaitable[Settlement]:
        if lease.is_ended and not lease.is_detached:
            return Known(Settlement.UNKNOWN)
        return lease.backend.settle_units(lease.reservation, units, replace=replace)

    async def _take_in_units(self, lease: Lease, units: Units, sent: Awaitable[Settlement]) -> None:
        met = await sent
        is_all = units.keys() == {meter.unit for meter in lease.reservation.meters}
        if met is Settlement.SETTLED and is_all and lease.backend is self._backend:
            lease.is_metered_out = True
            if not lease.reservation.slots and not lease.reservation.has_price:
                lease.stop_renewing()
        self._tell_of_ignored(lease, met, ", ".join([f"{used} {unit}" for unit, used in units.items()]))

    async def open_estimate(self, lease: Lease) -> None:
        """Create a zero estimate for a request without a price, so that it can be settled.

        The estimate is never refused. Where the backend is away, it is one of this process.
        """
        unpriced = lease.unpriced
        if unpriced is None or lease in self.local_estimates:
            return
        if lease.is_local:
            self._open_here(lease)
            return
        if lease.opening is None or (lease.opening.done() and not lease.reservation.periods):
            lease.opening = self._background.start(self._open(lease, unpriced), "an estimate", lease.id)
        await asyncio.wait([lease.opening])  # not by this caller alone; the backend bounds it

    async def _open(self, lease: Lease, unpriced: Charge) -> None:
        charge = Charge(map(_without_end, unpriced.allowances))
        lease_id = lease.reservation.id if lease.reservation is not NO_RESERVATION else new_lease_id()
        try:
            opened = (await self._backend.acquire(charge, lease_id, 0)).reservation
        except BackendError:
            self._open_here(lease)
            return
        # Its slots may have been freed meanwhile.
        held = lease.reservation
        lease.reservation = Reservation(
            opened.id,
            held.slots,
            opened.periods,
            held.lease_seconds,
            opened.price,
            opened.currency,
            held.meters,
            held.estimates,
        )

    def _open_here(self, lease: Lease) -> None:
        """Create that estimate in this process, which tells the backend of it later."""
        unpriced = lease.unpriced
        if unpriced is not None and lease not in self.local_estimates and self.outage is not None:
            self.local_estimates[lease] = self.outage.open(Charge(map(_without_end, unpriced.allowances)))

    async def _open_and_settle(self, lease: Lease, price: int, replace: bool) -> None:
        try:
            await self.open_estimate(lease)
        except asyncio.CancelledError:  # the event loop ends: the price is the process's
            self._open_here(lease)
            self._send_price(lease, price, replace)
            raise
        await self._take_in_price(lease, price, self._send_price(lease, price, replace))

    def _send_price(self, lease: Lease, price: int, replace: bool) -> Awaitable[Settlement]:
        local_estimate = self.local_estimates.get(lease)
        if local_estimate is not None and self.outage is not None:
            return self.outage.settle(local_estimate, price, replace=replace)
        return lease.backend.settle(lease.reservation, price, replace=replace)

    async def _take_in_price(self, lease: Lease, units: int, sent: Awaitable[Settlement]) -> None:
        met = await sent
        if not lease.reservation.slots and (lease.is_metered_out or not any(lease.reservation.estimates)):
            lease.stop_renewing()
        currency = self.local_estimates.get(lease, lease.reservation).currency
        self._tell_of_ignored(lease, met, format_amount(units, currency))

    def _tell_of_ignored(self, lease: Lease, met: Settlement, amount: str) -> None:
        if met is Settlement.DIFFERENT:
            text = "settle ignored: lease %s was settled before with another amount"
            self._settle_ignored(text, SettleIgnored(lease.id, amount, "different"))
        elif met is Settlement.UNKNOWN:
            text = (
                "settle ignored: the backend has no record of lease %s: "
                "the lease has ended, or its estimate never arrived"
            )
            self._settle_ignored(text, SettleIgnored(lease.id, amount, "unknown"))

    def _settle_ignored(self, text: str, ignored: SettleIgnored) -> None:
        fields = {"event": "settle_ignored", "lease": ignored.lease_id, "reason": ignored.reason}
        logger.warning(text, ignored.lease_id, extra={"ratelimit": fields})
        self.ignored += 1
        self._notify(ignored)


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
