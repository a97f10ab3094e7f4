"""The shared backend: one Redis or Valkey behind all workers.

Makes operations of the script `lua/batch.lua` of charges, releases and settles, and reads its answers.
"""

import asyncio
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ratelimit_mw._internal.backends.connecting.connectors import connector_to
from ratelimit_mw._internal.backends.redis.batcher import Batcher
from ratelimit_mw._internal.backends.redis.keys import ChargeKeys, KeyNames, suffix_of
from ratelimit_mw._internal.backends.redis.letters import (
    ACQUIRE,
    ACQUIRE_AGAIN,
    BUDGET,
    DELETE,
    HOLD,
    PEEK,
    SETTLE,
)
from ratelimit_mw._internal.backends.redis.lines import OrderedOperation
from ratelimit_mw._internal.backends.redis.loops import LoopSenders, OperationSender
from ratelimit_mw._internal.backends.redis.operations import (
    ALWAYS,
    Operation,
    Template,
    nothing_to_do,
    probe_of,
)
from ratelimit_mw._internal.backends.redis.packing import (
    LIMIT,
    ChargeOperation,
    ChargeTemplate,
    Layout,
    give_back_on,
    operation_on,
    pack_limit,
)
from ratelimit_mw._internal.backends.redis.release_template import ReleaseTemplate
from ratelimit_mw._internal.backends.redis.renewal_packing import renewal_on, renewed
from ratelimit_mw._internal.backends.redis.server_clock import machine_clock
from ratelimit_mw._internal.backends.redis.units import UnitOperations
from ratelimit_mw._internal.model.backend import (
    BackendError,
    EstimateAction,
    Known,
    Load,
    OperationRefusedError,
    Settlement,
    UnderWay,
)
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter, period_key
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Window
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.periods import period_at
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, NO_RESERVATION, Reservation
from ratelimit_mw._internal.runtime.bounded import evict_oldest

ASKED_AGAIN = 3
"""Times that a charge is sent before its clock and the server's must agree on the day."""

# Looked up once: that costs a lot.
_KEEP, _UNTOUCHED = EstimateAction.KEEP, EstimateAction.UNTOUCHED

_MAX_TEMPLATES = 16_384
"""Callers of whom is kept how their reservations end."""


class RedisBackend:
    """Windows, slots and budgets in one Redis or Valkey, decided by its clock."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "ratelimit",
        timeout: float = 0.1,
        options: dict[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`timeout` is how many seconds an operation may wait; `options` go to redis-py's connections.

        `clock` takes the place of the server's own, for tests.
        """
        self._connector = connector_to(url, timeout=timeout, options=options)
        self._prefix = f"{namespace}:".encode()
        self._names = KeyNames(self._prefix)
        self._timeout, self._clock = timeout, clock
        self.call_observers: list[Callable[[float], None]] = []
        self.loops = LoopSenders(self._new_sender, timeout)
        self._release_templates: dict[tuple[object, ...], ReleaseTemplate] = {}
        self._units = UnitOperations(self._names, _MAX_TEMPLATES, self.loops)
        self._skew = 0  # the server's clock less this machine's, in microseconds, when last seen

    @property
    def error(self) -> BackendError | None:
        """Error that marks the server as away; None while the server is there or was not asked yet."""
        return self.loops.sender().error

    @property
    def load(self) -> Load:
        """Load of the connections of all event loops: operations carried, and operations that wait."""
        return self.loops.load

    @property
    def is_away(self) -> bool:
        """Whether any event loop that runs in this process thinks so; where none does, the latest of all."""
        return self.loops.is_away

    async def open(self) -> None:
        """Connect ahead of the first request. A server that is away is not an error: it is tried again."""
        await self.loops.open()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        await self.loops.close()

    def take_over(self) -> None:
        """Send what event loops that have ended owed to the server, and undo what they left half done."""
        self.loops.take_over()

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> ChargeOperation:
        """Send a charge of all of `charge`'s counters, or none, on its way."""
        return self._ask(ACQUIRE, charge, lease_id, price)

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        return await self._outcome_of(self.ask(charge, lease_id, price))

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere, once however often it is asked for."""
        return await self._outcome_of(self._ask(ACQUIRE_AGAIN, charge, lease_id, price))

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        return await self._outcome_of(self._ask(PEEK, charge, NO_LEASE_ID, price))

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Let the slots last `seconds` from now; false where one of them was lost before."""
        (kept,) = await renewed(self.send_renewals([(reservation, seconds)]), 1)
        if isinstance(kept, BackendError):
            raise kept
        return kept

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many reservations, each for its own time, as one operation.

        The answer to each, or the reason why there is none.
        """
        return await renewed(self.send_renewals(renewals, is_upkeep=True), len(renewals))

    def send_renewals(
        self, renewals: Iterable[tuple[Reservation, float]], *, is_upkeep: bool = False
    ) -> Operation:
        """Send the renewals of many reservations; `renewed` waits for the answers."""
        operation = renewal_on(renewals, self._names.name)
        operation.is_upkeep = is_upkeep
        return self.loops.submit(operation)

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        units: UnderWay[object] | None = None
        if reservation.meters and action is not _UNTOUCHED:
            units = self._units.finish(reservation, action is _KEEP)
        if not reservation.id or not (reservation.slots or reservation.periods):
            return units or nothing_to_do()
        return self._owe_finish(reservation, action)

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> UnderWay[Settlement]:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        if not reservation.id or not reservation.periods:
            return Known(Settlement.UNKNOWN)
        return self._owe_price(SETTLE, reservation, amount, replace=replace)

    def hold_estimate(self, reservation: Reservation) -> UnderWay[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        units = self._units.hold(reservation) if reservation.meters else None
        if reservation.id and reservation.has_price:
            return self._owe_price(HOLD, reservation, 0)
        return units or nothing_to_do()

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> UnderWay[Settlement]:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        try:
            units = check_amounts(units)
        except ValueError as error:
            raise OperationRefusedError(str(error)) from None
        if not any([meter.unit in units for meter in reservation.meters]):
            return Known(Settlement.UNKNOWN)
        return self._units.settle(reservation, units, replace)

    def _owe_price(
        self, kind: bytes, reservation: Reservation, amount: int, *, replace: bool = False
    ) -> OrderedOperation:
        template = self._template_of(reservation).settle(kind, amount, replace=replace)
        return self._owe_in_line(template, reservation)

    def _owe_in_line(self, template: Template, reservation: Reservation) -> OrderedOperation:
        line = reservation.id, reservation.periods[0].partition
        return self.loops.submit_in_line(OrderedOperation(template, reservation.id, line))

    def give_back(self, charge: Charge, reservation: Reservation, times: Sequence[int]) -> None:
        """Undo an admitted charge: windows by its time, the rest by its reservation. Waits for nothing."""
        self.undo(charge, reservation.id or NO_LEASE_ID, reservation, times[0])

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        keys = [self._names.of_counter(counter, self._now()) for counter in charge.counters]
        keys += [self._names.of_open(meter) for meter in charge.meters]
        await self.loops.submit(operation_on(keys, struct.pack("<cB", DELETE, len(keys))))

    # charges ------------------------------------------------------------------------------------

    def _ask(self, kind: bytes, charge: Charge, lease_id: bytes, price: int) -> ChargeOperation:
        operation = ChargeOperation(self, kind, charge, lease_id, price)
        self._pack_into(operation)
        self.loops.submit(operation, is_awaited=True)
        return operation

    async def _outcome_of(self, operation: ChargeOperation) -> Outcome:
        try:
            outcome: Outcome = await operation
        except BackendError:
            raise
        except BaseException:  # cancelled, or ended by hand
            operation.give_up()
            raise
        return outcome

    def ask_again(self, operation: ChargeOperation, now: int) -> None:
        """Name other periods, as the server's time is `now`, and send the charge again."""
        self._skew = now - machine_clock()
        operation.tries += 1
        if operation.tries == 1:  # once more, in what is left of the request's time
            error = BackendError(f"the server's clock named other periods for {self._timeout:g} s")
            loop = asyncio.get_running_loop()
            loop.call_at(operation.since + self._timeout, operation.fail, error)
        if operation.tries > ASKED_AGAIN:
            text = f"the server's clock jumps between budget periods; it shows {now} us now"
            operation.fail(OperationRefusedError(text))
        else:
            self._pack_into(operation)
            self.loops.submit(operation)

    def _pack_into(self, operation: ChargeOperation) -> None:
        """Give a charge its template, and what it will hold."""
        charge, kind, price = operation.charge, operation.kind, operation.price
        packed = self.prepare(charge)
        if kind != PEEK and charge.is_held:
            operation.reservation = charge.recorded_reservation(operation.id, packed.periods, price)
        if packed.periods or kind != ACQUIRE:
            packed = packed.priced(kind, price, int(charge.lease_seconds * SECOND))
            if packed.units and packed.record and kind == ACQUIRE_AGAIN:
                packed = packed.with_units(operation.id)
        operation.template = packed

    def prepare(self, charge: Charge) -> ChargeTemplate:
        """A charge's keys and limits as they are sent, made once, until a period of it ends."""
        now = self._now() if charge.allowances else 0
        known = charge.prepared  # of another backend perhaps: while this one is away, memory decides
        if isinstance(known, ChargeTemplate):
            packed = known
            if packed.owner is self and packed.layout.holds(now):
                return packed
        packed = charge.prepared = self._pack(charge, now)
        return packed

    def _pack(self, charge: Charge, now: int) -> ChargeTemplate:
        if charge.base is not None:  # the same charge with other estimates
            base = self.prepare(charge.base)
            layout, keys = base.layout.with_costs(charge), base.keys
        else:
            layout = self._lay_out(charge, now) if charge.model is None else self.prepare(charge.model).layout
            keys = layout.keys.for_charge(charge)
        template = ChargeTemplate(self, layout, keys, layout.body, layout.head)
        template.charges = layout.keys.only_partition_of(charge)
        if charge.meters:
            template.records = self._names.record_argument(charge.meters[0].partition, "u")
        if charge.allowances:
            template.units = template.records
            template.periods = tuple([period_key(counter, now) for counter in charge.allowances])
            template.records = self._names.record_argument(template.periods[0].partition)
        return template

    def _lay_out(self, charge: Charge, now: int) -> Layout:
        names = [(counter.partition, suffix_of(counter, now)) for counter in charge.counters]
        names += [(meter.partition, f"e:{meter.open_scope}") for meter in charge.meters]
        limits, since, until = b"", 0, 1 << 62
        for counter in charge.counters:
            if isinstance(counter.limit, Allowance):
                period = period_at(counter.limit.period, counter.limit.timezone, now)
                limits += LIMIT.pack(BUDGET, counter.limit.amount, period.start, period.end)
                since, until = max(since, period.start), min(until, period.end)
            else:
                limits += pack_limit(counter.limit)
        layout = Layout(charge, ChargeKeys(self._prefix, names), limits)
        layout.since, layout.until = since, until
        return layout

    def undo(self, charge: Charge, lease_id: bytes, reservation: Reservation, now: int) -> None:
        """Undo a charge that was made at `now`, 0 where that is unknown. Waits for nothing."""
        by_cost: dict[int, list[Counter]] = {}
        for place, counter in enumerate(charge.counters) if now else ():
            if isinstance(counter.limit, Window) and not counter.limit.is_metered:
                by_cost.setdefault(charge.cost_at(place), []).append(counter)
        for cost, windows in by_cost.items():
            keys = [self._names.of_counter(counter, now) for counter in windows]
            self.loops.submit(give_back_on(windows, keys, lease_id, now, cost))
        if reservation is not NO_RESERVATION:
            self.finish(reservation, EstimateAction.GIVE_BACK)

    def _owe_finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        template = self._template_of(reservation).end(action)
        if template.record:
            return self._owe_in_line(template, reservation)
        return self.loops.submit(Operation(template, reservation.id, ALWAYS))

    def _template_of(self, reservation: Reservation) -> ReleaseTemplate:
        """Return the operation templates for a reservation, shared by all requests of a caller on a route."""
        key = (reservation.slots, reservation.periods) if reservation.periods else reservation.slots
        template = self._release_templates.get(key)
        if template is None:
            evict_oldest(self._release_templates, _MAX_TEMPLATES)
            template = self._release_templates[key] = ReleaseTemplate(self._names, reservation)
        return template

    # sending ------------------------------------------------------------------------------------

    def _new_sender(self) -> OperationSender:
        return Batcher(
            self._connector.connect,
            timeout=self._timeout,
            clock_argument=self._clock_argument,
            new_probe=partial(probe_of, self._prefix + b"probe"),
            call_observers=self.call_observers,
        )

    def _clock_argument(self) -> bytes:
        return b"" if self._clock is None else b"%d" % self._clock()

    def _now(self) -> int:
        """The server's time in microseconds, as far as this machine can tell."""
        return machine_clock() + self._skew if self._clock is None else self._clock()
