"""Reservations: what an admitted charge holds, under the random id of its lease."""

import os
import struct
from typing import NamedTuple

from ratelimit_mw._internal.model.metered import Meter

LEASE_ID_SIZE = 16
"""Bytes of a lease id: random, so that nobody can guess another's."""
NO_LEASE_ID = bytes(LEASE_ID_SIZE)
"""In place of one where nothing is held."""
_IDS_AT_ONCE = 256
_cut = struct.Struct(f"{LEASE_ID_SIZE}s" * _IDS_AT_ONCE).unpack
_fresh_ids: list[bytes] = []
if hasattr(os, "register_at_fork"):  # or parent and child would go on with the same ones
    os.register_at_fork(after_in_child=_fresh_ids.clear)


def new_lease_id() -> bytes:
    """A new random lease id. Random bytes are fetched for many ids at once: each fetch is a system call."""
    try:
        return _fresh_ids.pop()
    except IndexError:
        fetched: tuple[bytes, ...] = _cut(os.urandom(LEASE_ID_SIZE * _IDS_AT_ONCE))
        _fresh_ids.extend(fetched[1:])
        return fetched[0]


class ReservationKey(NamedTuple):
    """A counter in which an admitted charge holds a slot or an amount."""

    partition: str
    scope: str
    """The scope of a slot; the currency and label of a period, such as `USD:2026-11-21`."""
    ends: int = 0
    """End of the period in microseconds since 1970; 0 for a slot."""


_NOWHERE: frozenset[str] = frozenset()


class Metering:
    """Knowledge that this process has of the metered units of one lease: all its reservations share it."""

    __slots__ = ("by_script", "is_restored", "settled", "times")

    def __init__(self) -> None:
        self.times: dict[str, int] = {}
        """Time of the charge in each partition, by the server's clock in microseconds; none is not known."""
        self.settled: dict[str, int] = {}
        """Amounts settled of estimates without a record of the charge, by a name of their meter."""
        self.by_script: frozenset[str] = _NOWHERE
        """Partitions of which only Redis' main script knows more: there is a record, or the lease is over.

        A reservation's is that of its first meter. On a cluster its parts have one each."""
        self.is_restored = False
        """Whether the charge may have been made before the time that is known of it."""


class Reservation:
    """Reservation of an admitted charge: all that renewing, settling and releasing takes, in any process."""

    __slots__ = (
        "currency",
        "estimates",
        "has_estimate",
        "has_price",
        "id",
        "is_leased",
        "lease_seconds",
        "metering",
        "meters",
        "periods",
        "price",
        "slots",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - a value, made for every request
        self,
        id: bytes,  # noqa: A002 - the lease's
        slots: tuple[ReservationKey, ...] = (),
        periods: tuple[ReservationKey, ...] = (),
        lease_seconds: float = 0.0,
        price: int = 0,
        currency: str = "USD",
        meters: tuple[Meter, ...] = (),
        estimates: tuple[int, ...] = (),
        metering: Metering | None = None,
    ) -> None:
        self.id: bytes = id
        self.slots: tuple[ReservationKey, ...] = slots
        self.periods: tuple[ReservationKey, ...] = periods
        self.lease_seconds: float = lease_seconds
        """Seconds that the slots last past their last renewal, and the estimate with them."""
        self.price: int = price
        self.currency: str = currency
        self.meters: tuple[Meter, ...] = meters
        """Meters of the units that it settles."""
        self.estimates: tuple[int, ...] = estimates
        """Amount that each meter was charged at admission."""
        self.metering: Metering | None = metering
        """Knowledge of the charge of its meters.

        None where another process made it, or where there are none."""
        self.has_price: bool = price > 0 and periods != ()
        """Whether it holds an amount in any period."""
        self.has_estimate: bool = self.has_price or (estimates != () and any(estimates))
        """Whether it holds an estimate, of money or of a metered unit."""
        self.is_leased: bool = self.has_estimate or slots != ()
        """Whether anything of it ends where it is not renewed."""

    def with_keys(
        self,
        slots: tuple[ReservationKey, ...],
        periods: tuple[ReservationKey, ...],
        meters: tuple[Meter, ...],
        estimates: tuple[int, ...],
    ) -> "Reservation":
        """Make a reservation of the same lease on other slots, periods and meters."""
        return Reservation(
            self.id,
            slots,
            periods,
            self.lease_seconds,
            self.price,
            self.currency,
            meters,
            estimates,
            self.metering,
        )

    def without_slots(self) -> "Reservation":
        """Make a reservation of all else, or of nothing where there is nothing else."""
        if not (self.periods or self.meters):
            return NO_RESERVATION
        return self.with_keys((), self.periods, self.meters, self.estimates)

    def without_meters(self) -> "Reservation":
        """Make a reservation of slots and periods alone."""
        if not self.meters:
            return self
        if not (self.slots or self.periods):
            return NO_RESERVATION
        return self.with_keys(self.slots, self.periods, (), ())

    def _values(self) -> tuple[object, ...]:
        values = (self.id, self.slots, self.periods, self.lease_seconds, self.price, self.currency)
        return (*values, self.meters, self.estimates)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reservation) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"Reservation{self._values()}"


NO_RESERVATION = Reservation(b"")
"""The reservation of a charge that takes neither a slot nor money."""
