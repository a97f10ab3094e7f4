"""Reservations of this process alone, until the backend knows of them."""

from dataclasses import dataclass, replace

from ratelimit_mw._internal.model.charge import (
    Charge,
    Counter,
    Reservation,
)
from ratelimit_mw._internal.model.limits import Slots, Window

ANY_COST = 2**32 - 1


ANY_AMOUNT = 2**53


@dataclass(slots=True)
class UnsyncedReservation:
    """A hold of this process alone, and what has become of it."""

    charge: Charge
    hold: Reservation
    price: int
    """What it holds, or has spent once it is settled."""
    is_settled: bool = False
    is_ended: bool = False
    is_slotless: bool = False
    """Whether its slots were freed."""
    is_kept: bool = False
    """Whether it was detached, so that its estimate lasts."""
    is_synced: bool = False
    """Whether the backend was told of it, as far as one can know."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it that the backend should know."""
        slots_gone = self.is_slotless or not self.hold.slots
        return slots_gone and (not self.hold.periods or (self.is_ended and not self.price))


def boundless(counter: Counter) -> Counter:
    """The same place, without a limit: what was done is done."""
    limit = counter.limit
    if isinstance(limit, Window):
        boundless = replace(limit, quota=ANY_COST)
        object.__setattr__(boundless, "granule", limit.granule)  # new, and as exact as what it stands for
        return replace(counter, limit=boundless)
    if isinstance(limit, Slots):
        return replace(counter, limit=replace(limit, limit=ANY_COST))
    return replace(counter, limit=replace(limit, amount=ANY_AMOUNT))
