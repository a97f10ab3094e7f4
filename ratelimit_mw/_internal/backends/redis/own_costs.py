"""Packing of charges for the script if their limits have costs of their own, such as metered units."""

import struct

from ratelimit_mw._internal.backends.redis import letters
from ratelimit_mw._internal.model.charge import Charge

OWN_HEAD = struct.Struct("<cBBBdd")
OWN_COST = struct.Struct("<dB")
"""Behind each limit: its cost, and the number of its meter."""
METER = struct.Struct("<dd")
"""Behind all limits, for each meter: its cost, and the length of its longest window."""
_OWN_KINDS = {
    letters.ACQUIRE: letters.ACQUIRE_OWN,
    letters.PEEK: letters.PEEK_OWN,
    letters.ACQUIRE_AGAIN: letters.ACQUIRE_AGAIN_OWN,
}
OF_MONEY, OF_UNITS = 1, 2
"""Records that a charge leaves."""
LIMIT_SIZE = struct.calcsize("<cddd")
MOST_COST = 2**32 - 1
"""The largest cost that the script takes, above every quota: a larger one fits no window either."""


def own_limits(charge: Charge, limits: bytes) -> bytes:
    """The limits of a charge with their own costs, and its meters; `limits` are the same without."""
    meters = charge.meter_places or (0,) * len(charge.counters)
    parts = list[bytes]()
    for place, meter in enumerate(meters):
        parts.append(limits[place * LIMIT_SIZE : (place + 1) * LIMIT_SIZE])
        parts.append(OWN_COST.pack(min(charge.cost_at(place), MOST_COST), meter))
    for number, metered in enumerate(charge.meters, 1):
        cost = min(charge.cost_at(meters.index(number)), MOST_COST)
        parts.append(METER.pack(cost, max([window.length for window in metered.windows])))
    return b"".join(parts)


def own_head(kind: bytes, charge: Charge, price: int, lease_us: int) -> bytes:
    """The head of such a charge; `lease_us` is that of estimates, 0 where it leaves none.

    Estimates of units leave a record only where the charge may be sent again.
    """
    of_money = bool(lease_us and charge.allowances)
    of_units = bool(lease_us and charge.meters and kind == letters.ACQUIRE_AGAIN)
    others = len(charge.meters) + of_money + of_units
    records = OF_MONEY * of_money + OF_UNITS * of_units
    return OWN_HEAD.pack(_OWN_KINDS[kind], len(charge.counters), others, records, price, lease_us)
