"""Counts and reservations of this process alone, until the backend knows of them."""

from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field, replace

from ratelimit_mw._internal.model.backend import Backend, EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter, period_key
from ratelimit_mw._internal.model.limits import Allowance, Slots, Window
from ratelimit_mw._internal.model.metered import MAX_AMOUNT
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, Reservation, new_lease_id

ANY_COST = 2**32 - 1
ANY_AMOUNT = 2**53
STEPS = 16
"""Parts of a window that share an entry, under the latest time."""
_TOLD = "told"
"""In place of requests: the backend keeps a record of a charge of metered units alone."""


class UnsyncedWindow:
    """Units that were admitted here under one window, until the backend was told of them.

    The charge that tells it leaves a record, as metered units do. So it counts once, however often it is
    sent.
    """

    __slots__ = ("_counter", "_entries", "_length", "_newest", "_unit", "charge", "lease_id")

    def __init__(self, counter: Counter, window: Window) -> None:
        self._length = window.length
        self._unit = window.counts if window.is_metered else _TOLD
        self._counter = boundless(counter, self._unit)
        self._entries: list[tuple[int, int]] = []
        """Times and amounts that no charge has told of yet."""
        self._newest = 0
        """Time of the latest units in `charge`."""
        self.charge: Charge | None = None
        """Charge that tells the backend, from its making until its answer."""
        self.lease_id = NO_LEASE_ID
        """Id of that charge."""

    def add(self, now: int, cost: int) -> None:
        """Count units that were admitted at `now`."""
        step = self._length // STEPS
        if self._entries and self._entries[-1][0] // step == now // step:
            cost += self._entries.pop()[1]
        self._entries.append((now, cost))

    def take_back(self, cost: int) -> bool:
        """Count so many of the latest units no more; false where the backend may know of them."""
        if sum([units for _, units in self._entries]) < cost:
            return False
        while cost:
            at, units = self._entries.pop()
            if units > cost:
                self._entries.append((at, units - cost))
            cost -= min(units, cost)
        return True

    def units(self, now: int) -> int:
        """Return the units that have not left the window, and that the backend may not know of."""
        units = sum([cost for at, cost in self._entries if at > now - self._length])
        return units if self.charge is None else units + self.charge.estimates[0]

    def to_tell(self, now: int) -> Charge | None:
        """Return the charge that tells the backend, the same one until it is `told`; None if nothing is left.

        What has left the window by `now` is told no more.
        """
        horizon = now - self._length
        if self.charge is None or self._newest <= horizon:
            self.charge = None
            live = [entry for entry in self._entries if entry[0] > horizon]
            left = sum([cost for _, cost in live])
            cost = min(left, MAX_AMOUNT)
            self._entries = [(live[-1][0], left - cost)] if left > cost else []
            if cost:
                self._newest, self.lease_id = live[-1][0], new_lease_id()
                # Never given back: by then it has left the window.
                seconds = self._length / 1_000_000
                self.charge = Charge([self._counter], lease_seconds=seconds, estimates={self._unit: cost})
        return self.charge

    def told(self, charge: Charge | None) -> None:
        """Note that the backend knows of a charge."""
        if self.charge is charge:
            self.charge = None

    @property
    def is_over(self) -> bool:
        """Whether the backend knows of everything."""
        return self.charge is None and not self._entries

    def forget_on(self, shared: Backend) -> None:
        """Take back what the backend may have been told, where it will never be told the rest."""
        if self.charge is not None:
            shared.finish(self.charge.recorded_reservation(self.lease_id, (), 0), EstimateAction.GIVE_BACK)


@dataclass(slots=True)
class UnsyncedReservation:
    """A reservation of this process alone, and what has become of it."""

    charge: Charge
    reservation: Reservation
    price: int
    """Amount that the reservation has, or has spent once it is settled."""
    is_settled: bool = False
    is_ended: bool = False
    is_slotless: bool = False
    """Whether its slots were freed."""
    never_lapses: bool = False
    """Whether it was detached, so that its estimate lasts."""
    is_synced: bool = False
    """Whether the backend was told of it, as far as one can know."""
    is_failed: bool = False
    """Whether its request failed, so that what it has not settled is given back."""
    units: dict[str, int] = field(default_factory=dict)
    """Amounts of metered units that the reservation has used, as far as they are settled."""
    is_metered_out: bool = False
    """Whether all of its units are known, and counted as units that were admitted."""

    def counters(self, now: int) -> list[Counter]:
        """Return the counters that it still takes at `now`: slots that run, periods that are not over."""
        running = {held.ends for held in self.reservation.periods if held.ends > now}
        return [
            boundless(counter)
            for counter in self.charge.counters
            if (isinstance(counter.limit, Slots) and not self.is_slotless)
            or (isinstance(counter.limit, Allowance) and period_key(counter, now).ends in running)
            or (isinstance(counter.limit, Window) and counter.limit.is_metered and not self.is_metered_out)
        ]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it that the backend should know."""
        slots_gone = self.is_slotless or not self.reservation.slots
        money_gone = not self.reservation.periods or (self.is_ended and not self.price)
        return slots_gone and money_gone and (self.is_metered_out or not self.reservation.meters)

    def counted(self, unit: str, estimate: int) -> int:
        """Return the amount of a metered unit that the reservation counts.

        The amount is the settled one; without a settle, 0 if the request failed, else the estimate.
        """
        if unit in self.units:
            return self.units[unit]
        return 0 if self.is_failed else estimate

    def metered(self) -> Iterator[tuple[Counter, int]]:
        """The windows that count its metered units, and what it counts in each."""
        counters = self.charge.counters if self.reservation.meters and not self.is_metered_out else ()
        for place, counter in enumerate(counters):
            if isinstance(counter.limit, Window) and counter.limit.is_metered:
                yield unshared(counter), self.counted(counter.limit.counts, self.charge.cost_at(place))

    @property
    def fate(self) -> tuple[object, ...]:
        """Value that changes with everything that becomes of it after its admission."""
        settled = self.price if self.is_settled else None
        return settled, tuple(self.units.items()), self.never_lapses, self.is_ended, self.is_slotless

    def repeat_on(self, shared: Backend, reservation: Reservation) -> list[Awaitable[object]]:
        """Do to its copy in the shared backend all that was done to it here, in order.

        All of it is under way when this returns.
        """
        sent = list[Awaitable[object]]()
        if self.is_settled:
            sent.append(shared.settle(reservation, self.price, replace=True))
        if self.units and reservation.meters:
            sent.append(shared.settle_units(reservation, self.units, replace=True))
        if self.never_lapses:
            sent.append(shared.hold_estimate(reservation))
        if self.is_ended:
            action = EstimateAction.GIVE_BACK if self.is_failed else EstimateAction.KEEP
            sent.append(shared.finish(reservation, action))
        elif self.is_slotless:
            sent.append(shared.finish(reservation, EstimateAction.UNTOUCHED))
        return sent


UNTOUCHED: tuple[object, ...] = (None, (), False, False, False)
"""Fate of a reservation to which nothing has happened since its admission."""


def unshared(counter: Counter) -> Counter:
    """Return the counter of a shared limit as a whole, of which this one may be a plan's share."""
    limit = counter.limit
    if isinstance(limit, Window) and limit.whole:
        return replace(counter, limit=replace(limit, quota=limit.whole, whole=0))
    if isinstance(limit, Slots) and limit.whole:
        return replace(counter, limit=replace(limit, limit=limit.whole, whole=0))
    return counter


def boundless(counter: Counter, counts: str | None = None) -> Counter:
    """Return the counter at the same place without a limit, for charges that are already done.

    A window counts the unit `counts`, if there is one.
    """
    limit = counter.limit
    if isinstance(limit, Window):
        boundless = replace(limit, quota=ANY_COST, counts=counts or limit.counts)
        object.__setattr__(boundless, "granule", limit.granule)  # new, and as exact as what it stands for
        return replace(counter, limit=boundless)
    if isinstance(limit, Slots):
        return replace(counter, limit=replace(limit, limit=ANY_COST))
    return replace(counter, limit=replace(limit, amount=ANY_AMOUNT))
