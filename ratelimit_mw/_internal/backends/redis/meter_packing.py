"""Packing of operations on metered units for the script.

The operations decide about the estimates of a charge. Beside the windows of the charge, their keys hold its
metered units: the open estimates of each meter, and a record of the charge. A cluster's node has the keys of
its own partition.
"""

import struct
from enum import IntEnum

from ratelimit_mw._internal.backends.redis import letters
from ratelimit_mw._internal.backends.redis.keys import KeyNames
from ratelimit_mw._internal.backends.redis.operations import Template, bulk
from ratelimit_mw._internal.backends.redis.packing import read_settlement
from ratelimit_mw._internal.model.metered import MAX_AMOUNT, Units
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation

METER_HEAD = struct.Struct("<cBBB")
AMOUNT = struct.Struct("<dB")
METER_WINDOW = struct.Struct("<ddd")
LEAVE = -1.0
"""In place of an amount: nothing is settled of this unit."""


class Mode(IntEnum):
    """Action on the metered units of a charge. The values are the script's."""

    SETTLE = 0
    REPLACE = 1
    HOLD = 2
    """Their estimates last until they are settled."""
    KEEP = 3
    """The request has ended: what is not settled is counted as estimated."""
    GIVE_BACK = 4


def meter_template(mode: Mode, hold: Reservation, names: KeyNames, units: Units | None = None) -> Template:
    """All but the lease's id of an operation that settles units of a charge, or ends all of them."""
    keys, parts = list[bytes](), list[bytes]()
    for meter in hold.meters:
        keys += [names.of_open(meter), *names.of_windows(meter)]
        amount = LEAVE if units is None else min(units.get(meter.unit, LEAVE), MAX_AMOUNT)
        parts.append(AMOUNT.pack(amount, len(meter.windows)))
        parts += [
            METER_WINDOW.pack(each.whole or each.quota, each.length, each.granule) for each in meter.windows
        ]
    n_keys = len(keys) + 1
    body = METER_HEAD.pack(letters.METER, n_keys, mode, len(hold.meters)) + b"".join(parts)
    record = names.record_argument(hold.meters[0].partition, "u")
    template = Template(
        b"".join(map(bulk, keys)), n_keys, body, LEASE_ID_SIZE, read_settlement, record=record
    )
    template.charges = ""  # nothing of it is kept until the end of a batch
    return template
