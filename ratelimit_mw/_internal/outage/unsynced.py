"""Reservations of this process alone, until the backend knows of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import REQUESTS, Slots, Window
from ratelimit_mw._internal.model.reservation import Reservation

ANY_COST = 2**32 - 1


ANY_AMOUNT = 2**53


@dataclass(slots=True)
class UnsyncedReservation:
    """A hold of this process alone, and what has become of it."""

    charge: Charge
    hold: Reservation
    price: int
    """Amount that the hold has, or has spent once it is settled."""
    is_settled: bool = False
    is_ended: bool = False
    is_slotless: bool = False
    """Whether its slots were freed."""
    is_kept: bool = False
    """Whether it was detached, so that its estimate lasts."""
    is_synced: bool = False
    """Whether the backend was told of it, as far as one can know."""
    is_failed: bool = False
    """Whether its request failed, so that what it has not settled is given back."""
    units: dict[str, int] = field(default_factory=dict)
    """Amounts of metered units that the reservation has used, as far as they are settled."""
    is_metered_out: bool = False
    """Whether all of its units are known, and counted as units that were admitted."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it that the backend should know."""
        slots_gone = self.is_slotless or not self.hold.slots
        money_gone = not self.hold.periods or (self.is_ended and not self.price)
        return slots_gone and money_gone and (self.is_metered_out or not self.hold.meters)

    def counted(self, unit: str) -> int:
        """Return the amount of a metered unit that the reservation counts.

        The amount is the settled one; without a settle, 0 if the request failed, else the estimate.
        """
        if unit in self.units:
            return self.units[unit]
        return 0 if self.is_failed else self.charge.units[unit]

    def metered(self) -> Iterator[tuple[Counter, int]]:
        """The windows that count its metered units, and what it counts in each."""
        for counter in self.charge.counters if self.hold.meters and not self.is_metered_out else ():
            if isinstance(counter.limit, Window) and counter.limit.is_metered:
                yield counter, self.counted(counter.limit.counts)


def of_requests(counter: Counter) -> Counter:
    """Return the counter with a metered window replaced by one that is charged a cost and settles nothing.

    Any other counter is returned unchanged.
    """
    limit = counter.limit
    if not isinstance(limit, Window) or not limit.is_metered:
        return counter
    plain = replace(limit, counts=REQUESTS)
    object.__setattr__(plain, "granule", limit.granule)  # new, and as exact as what it stands for
    return replace(counter, limit=plain)


def boundless(counter: Counter) -> Counter:
    """Return the counter at the same place without a limit, for charges that are already done."""
    limit = counter.limit
    if isinstance(limit, Window):
        boundless = replace(limit, quota=ANY_COST)
        object.__setattr__(boundless, "granule", limit.granule)  # new, and as exact as what it stands for
        return replace(counter, limit=boundless)
    if isinstance(limit, Slots):
        return replace(counter, limit=replace(limit, limit=ANY_COST))
    return replace(counter, limit=replace(limit, amount=ANY_AMOUNT))
