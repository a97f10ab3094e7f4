"""Renewals of many reservations, packed into one operation of the script."""

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ratelimit_mw._internal.backends.redis import letters
from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.backends.redis.packing import operation_on
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.metered import Meter
from ratelimit_mw._internal.model.reservation import (
    LEASE_ID_SIZE,
    Reservation,
)

RENEW_HEAD = struct.Struct("<cHH")


RENEWAL = struct.Struct(f"<{LEASE_ID_SIZE}sddBBB")


PERIOD = struct.Struct("<Hd")


ESTIMATE = struct.Struct("<Hdd")
"""Of a meter: the index of its open estimates, when it was charged, and how much."""


NOT_RENEWED = 2
"""A reservation that could not be renewed, since one of its keys holds something else."""


def renewal_on(renewals: Iterable[tuple[Reservation, float]], name: Callable[[str, str], bytes]) -> Operation:
    """The operation that renews reservations, each for its own time.

    `name` makes keys of partitions and suffixes.
    """
    renewals = list(renewals)
    slot_sets = dict.fromkeys(held for reservation, _ in renewals for held in reservation.slots)
    keys = [name(held.partition, f"s:{held.scope}") for held in slot_sets]
    indexes: dict[object, int] = {held: index for index, held in enumerate(slot_sets)}

    def index_of(what: object, partition: str, suffix: str) -> int:
        if what not in indexes:
            indexes[what] = len(keys)
            keys.append(name(partition, suffix))
        return indexes[what]

    entries = []
    for reservation, seconds in renewals:
        periods = reservation.periods if reservation.has_price else ()
        meters = _open_of(reservation)
        times = int(seconds * SECOND), int(reservation.lease_seconds * SECOND)
        slots = [indexes[held] for held in reservation.slots]
        entries.append(RENEWAL.pack(reservation.id, *times, len(slots), len(periods), len(meters)))
        entries.append(struct.pack(f"<{len(slots)}H", *slots))
        if periods:
            record = index_of(reservation.id, periods[0].partition, f"r:{reservation.id.hex()}")
            entries.append(struct.pack("<H", record))
        entries += [
            PERIOD.pack(index_of(each, each.partition, f"b:{each.scope}"), each.ends) for each in periods
        ]
        entries += [
            ESTIMATE.pack(index_of(each, each.partition, f"e:{each.open_scope}"), at, estimate)
            for each, at, estimate in meters
        ]
    body = RENEW_HEAD.pack(letters.RENEW, len(keys), len(slot_sets)) + b"".join(entries)
    operation = operation_on(keys, body, partial(read_renewals, len(renewals)))
    operation.template.charges = ""
    operation.template.overwrites = True
    return operation


def _open_of(reservation: Reservation) -> list[tuple[Meter, int, int]]:
    """Estimates that may lapse, as far as is known: for each its meter, when it was charged and how much.

    The time is negative where the charge may be older.
    """
    metering = reservation.metering
    return [
        (meter, metering.times[meter.partition] * (-1 if metering.is_restored else 1), estimate)
        for meter, estimate in zip(reservation.meters, reservation.estimates, strict=True)
        if metering is not None and estimate and meter.partition in metering.times
    ]


async def renewed(operation: Operation, number: int) -> Sequence[bool | BackendError]:
    """Await the answers to so many renewals in one operation.

    Each is true for a reservation that was renewed, false for a lost one, or the `BackendError` if the
    reservation was not asked about.
    """
    try:
        answers: Sequence[bool | BackendError] = await operation
    except BackendError as error:
        return [error] * number
    return answers


def read_renewals(number: int, answer: bytes) -> Sequence[bool | BackendError]:
    """Read what so many renewals in one operation were told: whether each is still held, or why not asked."""
    if len(answer) < number or answer[:number].strip(b"\0\1\2"):
        raise ValueError(f"{answer!r} says nothing about {number} renewals")
    fault = BackendError(answer[number:].decode(errors="replace"))
    return [fault if each == NOT_RENEWED else bool(each) for each in answer[:number]]
