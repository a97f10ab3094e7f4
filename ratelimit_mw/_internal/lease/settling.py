"""Settles what requests and jobs really used, in place of their estimates."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Protocol

from ratelimit_mw._internal.lease.background import Arrival, BackgroundWork
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.token import LeaseError
from ratelimit_mw._internal.model.backend import Backend, BackendError, Known, Settlement, UnderWay
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.money import format_amount, parse_amount
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, new_lease_id
from ratelimit_mw._internal.observe.events import Notifier, SettleIgnored

logger = logging.getLogger("ratelimit_mw")

_SETTLE = "a settle"
# Looked up once: that costs a lot.
_UNKNOWN, _SETTLED, _REPEATED = Settlement.UNKNOWN, Settlement.SETTLED, Settlement.REPEATED
_NOTHING = Known(_UNKNOWN)
_ANY_AMOUNT = 2**53
"""More than any budget has."""


class OutageEstimates(Protocol):
    """Keeper of the estimates that are opened while the backend is away."""

    def open(self, charge: Charge) -> Reservation:
        """Open an estimate of nothing under an id of its own; the backend is told when it is back."""
        ...

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> UnderWay[Settlement]:
        """Settle it, wherever it is known by then."""
        ...


class Settling:
    """The settles of one limiter's leases: of money and of metered units."""

    def __init__(self, backend: Backend, background: BackgroundWork, notify: Notifier) -> None:
        self._backend = backend
        self.outage: OutageEstimates | None = None
        """Settles in this process what the backend can't be asked about; None where nothing is ever away."""
        self._background = background
        self._notify = notify
        self.ignored: int = 0
        """Number of ignored settles: settled before with another amount, or unknown to the backend."""
        self.on_uncounted: Callable[..., None] = lambda *_: None
        """Told of each unit that is settled though no limit of the request counts it."""

    def settle(
        self, lease: Lease, amount: str | int | Decimal | None, units: Units | None, replace: bool
    ) -> Arrival:
        """Send the settles that `Lease.settle` asks for; the wait for them. Raises `LeaseError`."""
        local_estimate, unpriced = lease.local_estimate, lease.unpriced
        price: int | None = None
        used: dict[str, int] = {}
        late_used: list[tuple[Lease, dict[str, int]]] = []
        try:
            if units is not None and lease.is_charged:
                used = self._units_of(lease, units, lease.late)
            if units is not None and lease.late:
                all_leases = (lease, *lease.late)
                late_used = [(late, self._units_of(late, units, all_leases)) for late in lease.late]
            if amount is not None and (local_estimate or lease.reservation.periods or unpriced is not None):
                currency = (local_estimate or unpriced or lease.reservation).currency
                price = parse_amount(amount, currency, round_up=True)
        except ValueError as error:
            raise LeaseError(f"cannot settle: {error}") from error
        arrival = Arrival(lease, _SETTLE)
        if used:
            self._settle_units(arrival, lease, used, replace)
        if price is not None:
            is_open = local_estimate is not None or unpriced is None
            if is_open or (lease.is_ended and not lease.is_detached):
                self._settle_price(arrival, lease, price, replace)
            else:
                opening = self._open_and_settle(lease, price, replace)
                arrival.add_task(self._background.start(opening, _SETTLE, lease.id))
        for late, amounts in late_used:
            if amounts:
                self._settle_units(arrival, late, amounts, replace)
        return arrival

    def _units_of(self, lease: Lease, units: object, others: tuple[Lease, ...]) -> dict[str, int]:
        """The amounts of units that limits of a lease count; `others` are of the same request.

        Raises ValueError for what is not an amount.
        Where no limit counts any unit, the amounts are not checked: nor is a price without a budget.
        """
        counted = {meter.unit for meter in lease.reservation.meters}
        if counted and isinstance(units, dict) and len(units) == len(counted) and counted.issuperset(units):
            return check_amounts(units)  # as nearly always
        elsewhere = {meter.unit for each in others for meter in each.reservation.meters}
        for unit in units.keys() - counted - elsewhere if isinstance(units, Mapping) else ():
            self.on_uncounted(unit)
        if not counted:
            return {}
        return {unit: used for unit, used in check_amounts(units).items() if unit in counted}

    def _settle_units(self, arrival: Arrival, lease: Lease, units: Units, replace: bool) -> None:
        """Send units, here and not in a task of its own, so that no end of the request comes before them."""
        is_over = lease.is_ended and not lease.is_detached
        sent = _NOTHING if is_over else lease.backend.settle_units(lease.reservation, units, replace=replace)
        arrival.add(sent, self._take_in_units, lease, units)

    def _take_in_units(self, lease: Lease, units: Units, met: Settlement) -> None:
        if met is _SETTLED and lease.backend is self._backend:
            reservation = lease.reservation
            if all([meter.unit in units for meter in reservation.meters]):
                lease.is_metered_out = True
                if not reservation.slots and not reservation.has_price:
                    lease.stop_renewing()
        elif met is not _REPEATED:
            self._tell_of_ignored(lease, met, ", ".join([f"{used} {unit}" for unit, used in units.items()]))

    async def open_estimate(self, lease: Lease) -> None:
        """Create a zero estimate for a request without a price, so that it can be settled.

        The estimate is never refused. Where the backend is away, it is one of this process.
        """
        unpriced = lease.unpriced
        if unpriced is None or lease.local_estimate is not None:
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
            held.metering,
        )

    def _open_here(self, lease: Lease) -> None:
        """Create that estimate in this process, which tells the backend of it later."""
        unpriced = lease.unpriced
        if unpriced is not None and lease.local_estimate is None and self.outage is not None:
            lease.local_estimate = self.outage.open(Charge(map(_without_end, unpriced.allowances)))

    async def _open_and_settle(self, lease: Lease, price: int, replace: bool) -> None:
        try:
            await self.open_estimate(lease)
        except asyncio.CancelledError:  # the event loop ends: the price is the process's
            self._open_here(lease)
            self._send_price(lease, price, replace)
            raise
        self._take_in_price(lease, price, await self._send_price(lease, price, replace))

    def _settle_price(self, arrival: Arrival, lease: Lease, price: int, replace: bool) -> None:
        """Send a price, here as well."""
        arrival.add(self._send_price(lease, price, replace), self._take_in_price, lease, price)

    def _send_price(self, lease: Lease, price: int, replace: bool) -> UnderWay[Settlement]:
        local_estimate = lease.local_estimate
        if local_estimate is not None and self.outage is not None:
            return self.outage.settle(local_estimate, price, replace=replace)
        return lease.backend.settle(lease.reservation, price, replace=replace)

    def _take_in_price(self, lease: Lease, price: int, met: Settlement) -> None:
        if not lease.reservation.slots and (lease.is_metered_out or not any(lease.reservation.estimates)):
            lease.stop_renewing()
        if met is not _SETTLED and met is not _REPEATED:
            currency = (lease.local_estimate or lease.reservation).currency
            self._tell_of_ignored(lease, met, format_amount(price, currency))

    def _tell_of_ignored(self, lease: Lease, met: Settlement, amount: str) -> None:
        if met is Settlement.DIFFERENT:
            text = (
                "settle ignored: lease %s was settled before with another amount, "
                "which replace=True would replace"
            )
            self._settle_ignored(text, SettleIgnored(lease.id, amount, "different"))
        elif met is _UNKNOWN:
            text = (
                "settle ignored: the backend has no record of lease %s: the request has ended "
                "(settle before, or detach it), or its estimate lapsed or never arrived"
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
