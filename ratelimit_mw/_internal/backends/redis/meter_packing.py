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
from ratelimit_mw._internal.model.metered import Meter, Units
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE
from ratelimit_mw._internal.runtime.bounded import evict_oldest

METER_HEAD = struct.Struct("<cBBB")
METER_WINDOW = struct.Struct("<ddd")
LEAVE = -1.0
"""In place of an amount: nothing is settled of this unit."""
_pack_amount = struct.Struct("<d").pack


class Mode(IntEnum):
    """Action on the metered units of a charge. The values are the script's."""

    SETTLE = 0
    REPLACE = 1
    HOLD = 2
    """Their estimates last until they are settled."""
    KEEP = 3
    """The request has ended: what is not settled is counted as estimated."""
    GIVE_BACK = 4


_REPLACE = Mode.REPLACE  # looked up once: that costs a lot


class PackedMeters:
    """The keys and windows of the meters of charges, packed once for all that share them."""

    __slots__ = ("_heads", "_keys", "_n_keys", "_record", "_units")

    def __init__(self, meters: tuple[Meter, ...], names: KeyNames) -> None:
        keys: list[bytes] = []
        self._units: list[tuple[str, bytes]] = []
        """The unit of each meter, and what follows its amount: the number of its windows, and these."""
        for meter in meters:
            keys += [names.of_open(meter), *names.of_windows(meter)]
            windows = [
                METER_WINDOW.pack(each.whole or each.quota, each.length, each.granule)
                for each in meter.windows
            ]
            self._units.append((meter.unit, b"".join((bytes([len(windows)]), *windows))))
        self._n_keys = len(keys) + 1
        self._keys = b"".join(map(bulk, keys))
        self._record = names.record_argument(meters[0].partition, "u")
        self._heads = [METER_HEAD.pack(letters.METER, self._n_keys, mode, len(meters)) for mode in Mode]

    def template(self, mode: Mode, units: Units | None = None) -> Template:
        """All but the lease's id of an operation that settles units of a charge, or ends all of them.

        Amounts are as `check_amounts` lets them through.
        """
        body = self._heads[mode]
        for unit, windows in self._units:
            body += _pack_amount(LEAVE if units is None else units.get(unit, LEAVE)) + windows
        template = Template(
            self._keys, self._n_keys, body, LEASE_ID_SIZE, read_settlement, record=self._record
        )
        template.charges = ""  # nothing of it is kept until the end of a batch
        template.overwrites = mode is _REPLACE
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
