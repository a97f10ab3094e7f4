"""Packing of charges and other operations for the script `lua/batch.lua`, and reading of its answers.

The parts of a charge that never change are packed once; the parts that charges have in common, once for all
of them.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from ratelimit_mw._internal.backends.redis import letters
from ratelimit_mw._internal.backends.redis.keys import ChargeKeys
from ratelimit_mw._internal.backends.redis.operations import IF_UNDONE, Operation, Template, bulk, done
from ratelimit_mw._internal.backends.redis.own_costs import MOST_COST, own_head, own_limits
from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Limit, Slots, Window
from ratelimit_mw._internal.model.outcome import NUMBERS_OF_A_STATUS, Outcome, row_before
from ratelimit_mw._internal.model.reservation import (
    LEASE_ID_SIZE,
    NO_RESERVATION,
    Reservation,
    ReservationKey,
)
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.leaf import Numbers, numbers_in

LIMIT = struct.Struct("<cddd")
CHARGE_HEAD = struct.Struct("<cBddd")
FINISH_HEAD = struct.Struct("<cBBdd")
SETTLE_HEAD = struct.Struct("<cdBB")
SLOT = LIMIT.pack(letters.SLOTS, 0, 0, 0)
_MAX_BODIES = 64
"""Prices for which a charge's body is kept."""
REFUSED, ADMITTED, OTHER_PERIOD = 0, 1, 2
"""Codes of a charge's outcome.

`OTHER_PERIOD`: the server's time lies outside a period that the charge names."""
OVER = -1
"""In place of how many charges were admitted: their period is over by the server's clock."""


class Layout:
    """The part of a packed charge that doesn't depend on its partitions, and the reader of its answers."""

    __slots__ = (
        "_bodies",
        "_cost",
        "_has_periods",
        "_limits",
        "_numbers",
        "_own",
        "_size",
        "_steps",
        "body",
        "head",
        "keys",
        "limits",
        "n_keys",
        "n_meters",
        "since",
        "until",
    )

    def __init__(self, charge: Charge, keys: ChargeKeys, limits: bytes) -> None:
        """`limits` are those of the charge, packed, without costs of their own."""
        self.keys, self.limits = keys, limits
        self._limits = limits if charge.costs is None else own_limits(charge, limits)
        self._own = charge if charge.costs is not None else None
        self.n_keys = len(charge.counters)
        self.n_meters = len(charge.meters)
        self._cost = min(charge.cost, MOST_COST)
        self._bodies: dict[tuple[bytes, int, int], tuple[bytes, bytes]] = {}
        kind = letters.TAKE_AHEAD if charge.ahead else letters.ACQUIRE
        lease_us = int(charge.lease_seconds * SECOND) if charge.meters else 0
        self.body, self.head = self.body_of(kind, charge.ahead, lease_us)
        """Body of a charge without a price, up to the id; the same as an argument."""
        self._steps = charge.steps
        self._numbers = NUMBERS_OF_A_STATUS * self.n_keys
        self._size = 1 + 8 * self._numbers
        self._has_periods = bool(charge.allowances)
        self.since, self.until = 0, 1 << 62
        """Time in microseconds from and up to which the periods in `limits` hold."""

    def with_costs(self, charge: Charge) -> "Layout":
        """The layout of the same charge with other estimates."""
        layout = Layout(charge, self.keys, self.limits)
        layout.since, layout.until = self.since, self.until
        return layout

    def holds(self, now: int) -> bool:
        """Whether the periods in it are those of this time."""
        return self.since <= now < self.until

    def body_of(self, kind: bytes, price: int, lease_us: int) -> tuple[bytes, bytes]:
        """The body of a charge, up to the id; the same as an argument. `lease_us` is that of its estimate."""
        key = (kind, price, lease_us)
        known = self._bodies.get(key)
        if known is None:
            if self._own is None:
                head = CHARGE_HEAD.pack(kind, self.n_keys, self._cost, price, lease_us)
            else:
                head = own_head(kind, self._own, price, lease_us)
            body = head + self._limits
            known = body, b"$%d\r\n%b" % (len(body) + LEASE_ID_SIZE, body)
            evict_oldest(self._bodies, _MAX_BODIES)
            self._bodies[key] = known
        return known

    def read(self, answer: bytes, number: int) -> tuple[int, Numbers]:
        """Read the answer to so many charges: how many were admitted, and the row of the last one.

        In place of how many there is `OVER` where a period of the charge is over. Raises ValueError or
        IndexError for an answer that can't be one.
        """
        code = answer[0]
        if code == OTHER_PERIOD and number == 1 and self._has_periods and len(answer) == 1:
            return OVER, _NO_NUMBERS
        if len(answer) != self._size + (2 if number > 1 else 0):
            raise ValueError(f"an answer of {len(answer)} bytes to {number} charges")
        row = numbers_in(answer, 1, self._numbers)
        admitted = code if number == 1 else int.from_bytes(answer[self._size :], "little")
        if code > ADMITTED or admitted > number or (code == ADMITTED) != (admitted > 0):
            raise ValueError(f"an answer with code {code} and {admitted} admitted of {number} charges")
        return admitted, row

    def deliver(self, operations: "Sequence[ChargeOperation]", now: int, read: tuple[int, Numbers]) -> None:
        """Tell charges of this layout what became of each, as if each had been alone, one after the other."""
        admitted, row = read
        if admitted == OVER:
            operations[0].ask_again(now)
            return
        for place, operation in enumerate(operations):
            if place >= admitted:
                operation.decided(False, now, row)
            elif len(operations) == 1:
                operation.decided(True, now, row)
            else:
                operation.decided(True, now, row_before(row, self._steps, admitted - 1 - place))


class ChargeTemplate(Template):
    """All of a charge but its lease id."""

    __slots__ = ("_priced", "kind", "layout", "owner", "periods", "price", "records", "units")

    def __init__(  # noqa: PLR0913, PLR0917 - a value
        self,
        owner: object,
        layout: Layout,
        keys: bytes,
        body: bytes,
        head: bytes,
        record: bytes = b"",
        units: bytes = b"",
    ) -> None:
        """`record` is as of `Template`. `units` is the key of a record of units before one of money."""
        n_keys = layout.n_keys + layout.n_meters + (1 if record else 0) + (1 if units else 0)
        Template.__init__(self, keys + units, n_keys, body, LEASE_ID_SIZE, head=head, record=record)
        self.owner = owner
        """The backend that packed it."""
        self.layout = layout
        self.periods: tuple[ReservationKey, ...] = ()
        """Periods of the charge's allowances, as long as the layout holds."""
        self.records = b""
        """The argument of a record up to the id: of a charge with periods, or else with units.

        Only a charge that may be sent again leaves one of units."""
        self.units = b""
        """The argument of the record of the units of a charge with periods, too."""
        self.kind, self.price = letters.ACQUIRE, 0
        self._priced: ChargeTemplate | None = None

    def priced(self, kind: bytes, price: int, lease_us: int) -> "ChargeTemplate":
        """The template of a charge of another kind or price on the same keys, decided apart from others.

        The latest with a record is kept, as a route has one price. The estimate lasts `lease_us`.
        """
        template = self._priced
        if template is None or template.price != price or template.kind != kind:
            record = b"" if kind == letters.PEEK else self.records
            body, head = self.layout.body_of(kind, price, lease_us if record else 0)
            template = ChargeTemplate(self.owner, self.layout, self.keys, body, head, record)
            template.kind, template.price = kind, price
            template.units = self.units
            if record:  # without one, two operations of one template would be decided together
                self._priced = template
            if record and not self.periods:
                template.charges = self.charges
        return template

    def with_units(self, lease_id: bytes) -> "ChargeTemplate":
        """The template of one charge that leaves a record of money and one of units."""
        units = b"%b%b\r\n" % (self.units, lease_id.hex().encode())
        template = ChargeTemplate(
            self.owner, self.layout, self.keys, self._body, self.head, self.record, units
        )
        template.kind, template.price = self.kind, self.price
        return template

    def read(self, answer: bytes, number: int) -> tuple[int, Numbers]:
        """Read the script's answer to so many charges."""
        return self.layout.read(answer, number)

    def deliver(self, operations: list[Operation], now: int, answer: tuple[int, Numbers]) -> None:
        """Hand an answer that was read to charges of this template."""
        self.layout.deliver(cast("list[ChargeOperation]", operations), now, answer)


class ChargeOperation(Operation):
    """A charge on its way. Awaiting it waits for its `Outcome`, or raises a `BackendError`."""

    __slots__ = ("backend", "charge", "kind", "price", "reservation")

    def __init__(self, backend: "Undoes", kind: bytes, charge: Charge, lease_id: bytes, price: int) -> None:
        """`kind` is `ACQUIRE`, `ACQUIRE_AGAIN` for what was admitted elsewhere, or `PEEK`."""
        self.template = _NO_TEMPLATE
        self.id = lease_id
        self.is_upkeep = self.is_asking = False
        self.resend = self.tries = 0  # NEVER, without looking it up for each request
        self.since, self.future, self.result, self.listener = 0.0, None, None, None
        self.backend, self.kind, self.charge, self.price = backend, kind, charge, price
        self.reservation = NO_RESERVATION

    def decided(self, admitted: bool, now: int, row: Numbers) -> None:
        """Deliver the outcome to whoever waits; undo an admission that nobody waits for."""
        reservation = self.reservation if admitted else NO_RESERVATION
        metering = reservation.metering
        if metering is not None:
            for meter in reservation.meters:
                metering.times[meter.partition] = now
            if self.kind != letters.ACQUIRE:
                metering.by_script |= {reservation.meters[0].partition}
                metering.is_restored = True
        self.answer(Outcome(admitted, now, row, reservation))

    def ask_again(self, now: int) -> None:
        """Send the charge again: the server's time lies outside the periods that it names."""
        self.backend.ask_again(self, now)

    def orphaned(self, answer: Outcome | None) -> None:
        """Undo the charge, as nobody waits for it; `answer` is None where it is lost."""
        if self.kind == letters.ACQUIRE and (answer is None or answer.admitted):
            self.backend.undo(self.charge, self.id, self.reservation, 0 if answer is None else answer.now)

    def give_up(self) -> None:
        """Undo the charge of a request that has ended: now, or as soon as its answer comes.

        The answer may have been handed over in this very turn. An exception that is thrown into a coroutine
        by hand leaves the future pending; it is cancelled here, as the end of a task would have done.
        """
        future = self.future
        if future is not None and not future.cancel() and not future.cancelled() and not future.exception():
            self.orphaned(future.result())


class Undoes(Protocol):
    """Interface of the backend that a charge was made for: send the charge again, or undo it."""

    def ask_again(self, operation: ChargeOperation, now: int) -> None:
        """Name other periods, as the server's time is `now`, and send the charge again."""

    def undo(self, charge: Charge, lease_id: bytes, reservation: Reservation, now: int) -> None:
        """Undo a charge that was made at `now`, 0 where that is unknown. Waits for nothing."""


_SETTLEMENTS = {met.value: met for met in Settlement}
_NO_NUMBERS = Numbers()
_NO_TEMPLATE = Template(b"", 0, b"")


def operation_on(keys: list[bytes], body: bytes, unpack: Callable[[bytes], object] = done) -> Operation:
    """An operation that is like no other."""
    return Operation(Template(b"".join(map(bulk, keys)), len(keys), body, 0, unpack))


def give_back_on(
    windows: Sequence[Counter], keys: list[bytes], lease_id: bytes, now: int, cost: int
) -> Operation:
    """The operation that gives back `cost` units in each window, of a charge that was made at `now`."""
    head = FINISH_HEAD.pack(letters.FINISH, len(windows), EstimateAction.UNTOUCHED.value, now, cost)
    limits = [pack_limit(counter.limit) for counter in windows]
    operation = operation_on(keys, b"".join((head, *limits, lease_id)))
    operation.resend = IF_UNDONE  # done twice, it would give back another request's units
    return operation


def read_settlement(answer: bytes) -> Settlement:
    """Read what a settle has met."""
    (code,) = answer
    met = _SETTLEMENTS.get(code)  # to call the enumeration takes twenty times as long
    if met is None:
        raise ValueError(f"{answer!r} is not the answer to a settle")
    return met


def pack_limit(limit: Limit) -> bytes:
    """A window or slots, as the script reads them. Raises TypeError for an allowance."""
    if isinstance(limit, Window):
        return LIMIT.pack(letters.WINDOW, limit.quota, limit.length, limit.granule)
    if isinstance(limit, Slots):
        return LIMIT.pack(letters.SLOTS, limit.limit, int(limit.lease_seconds * SECOND), 0)
    raise TypeError(f"an allowance is packed with its period: {limit!r}")
