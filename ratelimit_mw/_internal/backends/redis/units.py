"""Settles, holds and ends of metered units on their way to one server or partition."""

from ratelimit_mw._internal.backends.redis.estimate_operation import (
    ESTIMATE,
    MeterTemplate,
    Piece,
    UnitsOperation,
)
from ratelimit_mw._internal.backends.redis.keys import KeyNames
from ratelimit_mw._internal.backends.redis.loops import LoopSenders
from ratelimit_mw._internal.backends.redis.meter_packing import (
    HAS_LAPSED,
    IS_OVER,
    NO_UNITS,
    MeterTemplates,
    Mode,
)
from ratelimit_mw._internal.backends.redis.operations import Template
from ratelimit_mw._internal.model.backend import Settlement
from ratelimit_mw._internal.model.metered import Meter, Units
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.runtime.bounded import evict_oldest

# Looked up once: that costs a lot.
_SETTLE, _KEEP, _HOLD, _REPLACE = Mode.SETTLE, Mode.KEEP, Mode.HOLD, Mode.REPLACE
_SETTLED = Settlement.SETTLED
_pack_estimate = ESTIMATE.pack


class UnitOperations:
    """Sends what becomes of the metered units of reservations, one after the other for each lease.

    A first settle for no more than the estimate, and the end of a request, take less than the main script.
    All else, and what is not known to be so, is done by that, which makes a record of the charge.
    """

    __slots__ = ("_known", "_loops", "_most", "_names", "_templates")

    def __init__(self, names: KeyNames, most: int, loops: LoopSenders) -> None:
        """`most` is for how many meters their templates are kept; `loops` send them."""
        self._names = names
        self._most = most
        self._loops = loops
        self._templates = MeterTemplates(names, most)
        self._known: dict[Meter, MeterTemplate] = {}

    def settle(self, reservation: Reservation, units: Units, replace: bool) -> UnitsOperation:
        """Put what was used in place of estimates."""
        return self._send(_REPLACE if replace else _SETTLE, reservation, units)

    def finish(self, reservation: Reservation, keeps: bool) -> UnitsOperation:
        """Keep what is not settled as it was estimated, or give it back."""
        return self._send(_KEEP if keeps else Mode.GIVE_BACK, reservation, NO_UNITS)

    def hold(self, reservation: Reservation) -> UnitsOperation:
        """Let estimates last until they are settled."""
        return self._send(_HOLD, reservation, NO_UNITS)

    def _send(self, mode: Mode, reservation: Reservation, units: Units) -> UnitsOperation:
        operation = UnitsOperation(self, mode, reservation, units)
        self._loops.submit_in_line(operation)
        return operation

    def prepare(self, operation: UnitsOperation) -> bool:
        """See `UnitsOperation.prepare`."""
        reservation, mode = operation.reservation, operation.mode
        metering, meters = reservation.metering, reservation.meters
        if metering is None or meters[0].partition in metering.by_script:
            operation.template = self.script_template(operation, IS_OVER)
            return True
        if mode is _HOLD or mode is _REPLACE:
            operation.template = self.script_template(operation, HAS_LAPSED)
            return True
        pieces = list[Piece]()
        for place, meter in enumerate(meters):
            estimate, template = reservation.estimates[place], self._of(meter)
            is_open = estimate and template.line not in metering.settled
            if mode is _SETTLE:
                used = operation.units.get(meter.unit)
                if used is None:
                    continue
            else:
                if not is_open:
                    continue
                used = estimate if mode is _KEEP else 0
            at = metering.times.get(meter.partition)
            if at is None or not is_open or used > estimate:
                operation.template = self.script_template(operation, HAS_LAPSED)
                return True
            member = _pack_estimate(reservation.id, at, estimate)
            pieces.append(Piece(template, member, estimate - used, used))
        if not pieces:
            operation.answer(_SETTLED)
            return False
        operation.pieces, operation.template = pieces, pieces[0].template
        return True

    def script_template(self, operation: UnitsOperation, otherwise: int) -> Template:
        """Return the main script's template of an operation.

        `otherwise` is what has become of an estimate of which nothing is known.
        """
        return self._templates.template(operation.reservation, operation.mode, operation.units, otherwise)

    def _of(self, meter: Meter) -> MeterTemplate:
        known = self._known.get(meter)
        if known is None:
            evict_oldest(self._known, self._most)
            known = self._known[meter] = MeterTemplate(meter, self._names)
        return known
