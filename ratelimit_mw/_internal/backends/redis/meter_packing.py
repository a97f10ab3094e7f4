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
from ratelimit_mw._internal.model.metered import MAX_AMOUNT, Meter, Units
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE
from ratelimit_mw._internal.runtime.bounded import evict_oldest

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


class PackedMeters:
    """The keys and windows of the meters of charges, packed once for all that share them."""

    __slots__ = ("_keys", "_meters", "_n_keys", "_record", "_windows")

    def __init__(self, meters: tuple[Meter, ...], names: KeyNames) -> None:
        self._meters = meters
        keys, self._windows = list[bytes](), list[bytes]()
        for meter in meters:
            keys += [names.of_open(meter), *names.of_windows(meter)]
            windows = [
                METER_WINDOW.pack(each.whole or each.quota, each.length, each.granule)
                for each in meter.windows
            ]
            self._windows.append(b"".join(windows))
        self._n_keys = len(keys) + 1
        self._keys = b"".join(map(bulk, keys))
        self._record = names.record_argument(meters[0].partition, "u")

    def template(self, mode: Mode, units: Units | None = None) -> Template:
        """All but the lease's id of an operation that settles units of a charge, or ends all of them."""
        parts = [METER_HEAD.pack(letters.METER, self._n_keys, mode, len(self._meters))]
        for meter, windows in zip(self._meters, self._windows, strict=True):
            amount = LEAVE if units is None else min(units.get(meter.unit, LEAVE), MAX_AMOUNT)
            parts += (AMOUNT.pack(amount, len(meter.windows)), windows)
        body = b"".join(parts)
        template = Template(
            self._keys, self._n_keys, body, LEASE_ID_SIZE, read_settlement, record=self._record
        )
        template.charges = ""  # nothing of it is kept until the end of a batch
        template.overwrites = mode is Mode.REPLACE
        return template


class MeterTemplates:
    """Templates of operations on metered units; what they have in common is kept."""

    __slots__ = ("_most", "_names", "_packed")

    def __init__(self, names: KeyNames, most: int) -> None:
        """`most` is for how many sets of meters it is kept."""
        self._names = names
        self._most = most
        self._packed: dict[tuple[Meter, ...], PackedMeters] = {}

    def template(self, meters: tuple[Meter, ...], mode: Mode, units: Units | None = None) -> Template:
        """All but the lease's id of an operation on these meters."""
        packed = self._packed.get(meters)
        if packed is None:
            evict_oldest(self._packed, self._most)
            packed = self._packed[meters] = PackedMeters(meters, self._names)
        return packed.template(mode, units)
