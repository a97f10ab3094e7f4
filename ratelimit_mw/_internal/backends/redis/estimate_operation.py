"""Settles and ends of metered units, most of them by less than the main script.

Nearly all settles are for no more than the estimate: the script `lua/close.lua` takes the estimate out of the
set of its meter, and what was not used off the windows. To end a request that keeps its estimate takes one
command. Where an estimate is not in that set, the main script is asked, which knows what else may have become
of it.
"""

import struct
from itertools import chain
from typing import Any, NamedTuple, Protocol, cast

from ratelimit_mw._internal.backends.redis.keys import KeyNames
from ratelimit_mw._internal.backends.redis.lines import OrderedOperation
from ratelimit_mw._internal.backends.redis.meter_packing import (
    HAS_LAPSED,
    WAS_SETTLED,
    Mode,
    PackedMeters,
    line_of,
)
from ratelimit_mw._internal.backends.redis.operations import ALWAYS, Operation, Template, bulk
from ratelimit_mw._internal.backends.redis.script import get_script
from ratelimit_mw._internal.model.backend import Settlement
from ratelimit_mw._internal.model.metered import Meter, Units
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation

ESTIMATE = struct.Struct(f"<{LEASE_ID_SIZE}sdd")
"""An open estimate as the set of its meter has it: the lease's id, when it was charged, and how much."""
_pack_amount = struct.Struct("<d").pack
_CLOSED_SIZE = ESTIMATE.size + 8
_CLOSED = b"1"[0]
_NOT_PREPARED = Template(b"", 0, b"")
# Looked up once: that costs a lot.
_SETTLE, _KEEP, _GIVE_BACK = Mode.SETTLE, Mode.KEEP, Mode.GIVE_BACK
_UNKNOWN, _SETTLED, _REPEATED = Settlement.UNKNOWN, Settlement.SETTLED, Settlement.REPEATED


class MeterTemplate(Template):
    """All of an operation on the estimates of one meter but these, and what is given back of each."""

    __slots__ = ("_remove", "line", "windows")

    def __init__(self, meter: Meter, names: KeyNames) -> None:
        keys = [names.of_open(meter), *names.of_windows(meter)]
        Template.__init__(self, b"".join(map(bulk, keys)), len(keys), b"")
        self.is_apart = True
        self.line = line_of(meter)
        """The name under which settles of the meter are known."""
        self.windows = PackedMeters.windows_of(meter)
        self._remove = bulk(b"ZREM") + bulk(keys[0])

    def call_apart(self, operations: list[Operation], by_digest: bool) -> bytes:
        """The call that closes the estimates of all of these operations, in the Redis protocol."""
        first = cast("UnitsOperation", operations[0])
        if first.mode is _KEEP and len(operations) == len(first.pieces) == 1:
            return b"*3\r\n%b%b" % (self._remove, bulk(first.pieces[0].estimate))
        keys, arguments, n_keys = list[bytes](), list[bytes](), 0
        by_meter = _by_meter(operations)
        for template, pieces in by_meter.items():
            keys.append(template.keys)
            n_keys += template.n_keys
            arguments += (b"$%d\r\n" % (len(template.windows) + len(pieces) * _CLOSED_SIZE), template.windows)
            for piece in pieces:
                arguments += (piece.estimate, _pack_amount(piece.unused))
            arguments.append(b"\r\n")
        script = _BY_DIGEST if by_digest else _BY_TEXT
        head = b"*%d\r\n%b%b" % (3 + n_keys + len(by_meter), script, bulk(b"%d" % n_keys))
        return b"".join((head, *keys, *arguments))

    def take_reply(self, operations: list[Operation], reply: Any) -> list[Operation]:
        """Tell operations that their estimates are closed; the main script has to look for the others."""
        sent = [cast("UnitsOperation", operation) for operation in operations]
        number = sum([len(operation.pieces) for operation in sent])
        if isinstance(reply, int):  # of a command, which ends one estimate, if it was open
            reply = b"1"
        if reply.__class__ is not bytes or len(reply) != number or reply.strip(b"01"):
            raise ValueError(f"{reply!r} does not say of {number} estimates whether they are closed")
        if b"0" in reply:  # else all say the same, in whatever order
            told = chain.from_iterable(_by_meter(operations).values())
            codes = {id(piece): code for piece, code in zip(told, reply, strict=True)}
            reply = bytes([codes[id(piece)] for operation in sent for piece in operation.pieces])
        at, left = 0, list[Operation]()
        for operation in sent:
            end = at + len(operation.pieces)
            if not operation.take_closed(reply[at:end]):
                left.append(operation)
            at = end
        return left


class Piece(NamedTuple):
    """One estimate that an operation closes."""

    template: MeterTemplate
    estimate: bytes
    unused: int
    """Amount that is given back."""
    used: int


def _by_meter(operations: list[Operation]) -> dict[MeterTemplate, list[Piece]]:
    """Return the estimates that operations close, by their meters."""
    found: dict[MeterTemplate, list[Piece]] = {}
    for operation in operations:
        for piece in cast("UnitsOperation", operation).pieces:
            found.setdefault(piece.template, []).append(piece)
    return found


class Prepares(Protocol):
    """Chooser of the way in which operations on units are done."""

    def prepare(self, operation: "UnitsOperation") -> bool:
        """See `UnitsOperation.prepare`."""

    def script_template(self, operation: "UnitsOperation", otherwise: int) -> Template:
        """Return the main script's template of an operation.

        `otherwise` is what has become of an estimate of which nothing is known.
        """


class UnitsOperation(OrderedOperation):
    """An operation on the metered units of a lease: a settle, a hold or an end."""

    __slots__ = ("_is_done_perhaps", "_way", "mode", "pieces", "reservation", "units")

    def __init__(self, way: Prepares, mode: Mode, reservation: Reservation, units: Units) -> None:
        self.template = _NOT_PREPARED
        self.id = reservation.id
        self.line = (reservation.id, f"u:{reservation.meters[0].partition}")
        # As `OrderedOperation` has it: two calls less for each request.
        self.resend, self.tries, self.since = ALWAYS, 0, 0.0
        self.is_upkeep = self.is_asking = False
        self.future = self.result = self.listener = self.lines = self.behind = None
        self._way = way
        self.mode = mode
        self.reservation = reservation
        self.units = units
        self.pieces: list[Piece] = []
        """Estimates that it closes, while it is done apart from the main script."""
        self._is_done_perhaps = False

    def prepare(self) -> bool:
        """Choose the cheapest way that is right, now that all before it are over; false for nothing to do."""
        return self.template is not _NOT_PREPARED or self._way.prepare(self)

    def lose_answer(self) -> None:
        """Take in that it may have been done."""
        self._is_done_perhaps = True

    def leave_to_script(self) -> None:
        """Be a part of calls of the main script from now on."""
        before = self.template
        if before.is_apart:
            self.template = self._way.script_template(
                self, WAS_SETTLED if self._is_done_perhaps else HAS_LAPSED
            )
            self.template.tag, self.template.slot = before.tag, before.slot

    def take_closed(self, codes: bytes) -> bool:
        """Take in which of its estimates were closed; whether that was all there is to do."""
        metering = self.reservation.metering
        for piece, code in zip(self.pieces, codes, strict=True):
            if code == _CLOSED and metering is not None and self.mode is _SETTLE:
                metering.settled[piece.template.line] = piece.used
        if codes.count(_CLOSED) == len(codes):
            self.answer(_SETTLED)
            return True
        self.leave_to_script()
        return False

    def answer(self, answer: Any) -> None:
        """Deliver the result; what was done twice, since its answer was lost, is as if done once."""
        metering = self.reservation.metering
        is_end = self.mode is _KEEP or self.mode is _GIVE_BACK
        if metering is not None and (is_end or not (self.template.is_apart or answer is _UNKNOWN)):
            metering.by_script |= {self.reservation.meters[0].partition}
        if self._is_done_perhaps and answer is _REPEATED:
            answer = _SETTLED
        OrderedOperation.answer(self, answer)


_SCRIPT = get_script("close")
_BY_DIGEST = bulk(b"EVALSHA") + bulk(_SCRIPT.digest.encode())
_BY_TEXT = bulk(b"EVAL") + bulk(_SCRIPT.text.encode())
