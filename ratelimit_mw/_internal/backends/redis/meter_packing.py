"""Packing of operations on metered units for the script.

The operations decide about the estimates of a charge. Beside the windows of the charge, their keys hold its
metered units: the open estimates of each meter, and a record of the charge, which they make where there is
none. A cluster's node has the keys of its own partition.
"""

import struct
from enum import IntEnum

from ratelimit_mw._internal.backends.redis import letters
from ratelimit_mw._internal.backends.redis.keys import KeyNames
from ratelimit_mw._internal.backends.redis.operations import Template, bulk
from ratelimit_mw._internal.backends.redis.packing import read_settlement
from ratelimit_mw._internal.model.metered import Meter, Units
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation
from ratelimit_mw._internal.runtime.bounded import evict_oldest

METER_HEAD = struct.Struct("<cBBBB")
METER_WINDOW = struct.Struct("<ddd")
LEAVE = NOT_SETTLED = -1.0
"""In place of an amount: nothing is settled of this unit; nothing was settled of it before."""
HAS_LAPSED, WAS_SETTLED, IS_OVER = 0, 1, 2
"""Fates of an estimate that is neither open nor in a record. The values are the script's."""
_pack_estimate = struct.Struct("<dddd").pack
"""Amount, time of the charge (0: not known), estimate, and the amount that was settled before."""


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
NO_UNITS: Units = {}


def line_of(meter: Meter) -> str:
    """The name under which settles of a meter are known."""
    return f"u:{meter.partition}:{meter.open_scope}"


class PackedMeters:
    """The keys and windows of the meters of charges, packed once for all that share them."""

    __slots__ = ("_heads", "_keys", "_lines", "_n_keys", "_record", "_windows")

    def __init__(self, meters: tuple[Meter, ...], names: KeyNames) -> None:
        keys: list[bytes] = []
        self._windows: list[bytes] = []
        """For each meter the number of its windows, and these."""
        for meter in meters:
            keys += [names.of_open(meter), *names.of_windows(meter)]
            self._windows.append(self.windows_of(meter))
        self._lines = [line_of(meter) for meter in meters]
        self._n_keys = len(keys) + 1
        self._keys = b"".join(map(bulk, keys))
        self._record = names.record_argument(meters[0].partition, "u")
        self._heads = [
            METER_HEAD.pack(letters.METER, self._n_keys, mode, len(meters), 0)[:-1] for mode in Mode
        ]

    @staticmethod
    def windows_of(meter: Meter) -> bytes:
        """The number of a meter's windows, and these, as the scripts read them."""
        windows = [
            METER_WINDOW.pack(each.whole or each.quota, each.length, each.granule) for each in meter.windows
        ]
        return b"".join((bytes([len(windows)]), *windows))

    def template(self, reservation: Reservation, mode: Mode, units: Units, otherwise: int) -> Template:
        """All but the lease's id of an operation that settles units of a charge, or ends all of them.

        Amounts are as `check_amounts` lets them through. `otherwise` is what has become of an estimate of
        which nothing is known.
        """
        metering = reservation.metering
        body = self._heads[mode] + bytes([otherwise])
        for place, meter in enumerate(reservation.meters):
            at, before, estimate, windows = 0, NOT_SETTLED, reservation.estimates[place], self._windows[place]
            if metering is not None:
                at = metering.times.get(meter.partition, 0)
                before = metering.settled.get(self._lines[place], NOT_SETTLED)
            body += _pack_estimate(units.get(meter.unit, LEAVE), at, estimate, before) + windows
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

    def template(
        self,
        reservation: Reservation,
        mode: Mode,
        units: Units = NO_UNITS,
        otherwise: int = IS_OVER,
    ) -> Template:
        """All but the lease's id of an operation on the meters of a reservation, as of `PackedMeters`."""
        meters = reservation.meters
        packed = self._packed.get(meters)
        if packed is None:
            evict_oldest(self._packed, self._most)
            packed = self._packed[meters] = PackedMeters(meters, self._names)
        return packed.template(reservation, mode, units, otherwise)
