"""The shared backend: one Redis or Valkey behind all workers.

Makes operations of the script `lua/batch.lua` of charges, releases and settles, and reads its answers.
"""

import asyncio
import struct
import threading
import time
from asyncio import Future, get_running_loop
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

from ratelimit_mw._internal.backends.connecting.connection import end_of_watches
from ratelimit_mw._internal.backends.connecting.connectors import connector_to
from ratelimit_mw._internal.backends.connecting.loop_end import LoopEnd
from ratelimit_mw._internal.backends.redis.batcher import Batcher
from ratelimit_mw._internal.backends.redis.held_places import HeldPlaces
from ratelimit_mw._internal.backends.redis.keys import ChargeKeys, KeyNames, suffix_of
from ratelimit_mw._internal.backends.redis.letters import (
    ACQUIRE,
    ACQUIRE_AGAIN,
    BUDGET,
    DELETE,
    FINISH,
    KEEP,
    PEEK,
    SETTLE,
)
from ratelimit_mw._internal.backends.redis.lines import Lines, OrderedOperation
from ratelimit_mw._internal.backends.redis.meter_packing import Mode, meter_template
from ratelimit_mw._internal.backends.redis.operations import Answer, Operation, Sender, Template, probe_of
from ratelimit_mw._internal.backends.redis.packing import (
    FINISH_HEAD,
    LIMIT,
    ChargeOperation,
    ChargeTemplate,
    Layout,
    operation_on,
    pack_limit,
    renewal_on,
    renewed,
)
from ratelimit_mw._internal.model.backend import (
    BackendError,
    EstimateAction,
    Load,
    OperationRefusedError,
    Settlement,
)
from ratelimit_mw._internal.model.charge import Charge, Clock, place_of
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Window
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.periods import period_at
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, NO_RESERVATION, Reservation
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

CLOSE_TIMEOUT = 2.0
"""Seconds that closing waits for what is still owed to the server."""
ASKED_AGAIN = 3
"""Times that a charge is sent before its clock and the server's must agree on the day."""

_MAX_PLACES = 16_384
"""Callers of whom is kept how their holds end."""


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
        self._timeout = timeout
        self._clock = clock
        self.call_observers: list[Callable[[float], None]] = []
        self.batchers: dict[asyncio.AbstractEventLoop, Sender] = {}
        self._ends: dict[asyncio.AbstractEventLoop, LoopEnd] = {}
        self._lines: dict[asyncio.AbstractEventLoop, Lines] = {}
        self._held_places: dict[tuple[object, ...], HeldPlaces] = {}
        self._past = Load()
        self._was_away = False
        """Whether the latest of the event loops that have ended thought so."""
        self._left: list[Operation] = []
        """Operations left by event loops that have ended: owed to the server, or perhaps to be undone."""
        self._lock = threading.Lock()  # of what ends with an event loop: several may, and others look for it
        renew_after_fork(self)
        self._skew = 0  # the server's clock less this machine's, in microseconds, when last seen

    @property
    def error(self) -> BackendError | None:
        """Error that marks the server as away; None while the server is there or was not asked yet."""
        return self._batcher().error

    @property
    def load(self) -> Load:
        """Load of the connections of all event loops: operations carried, and operations that wait."""
        waiting = Load(owed=sum([each.waiting for each in list(self._lines.values())]))
        return reduce(
            Load.plus, [each.load for each in list(self.batchers.values())], self._past.plus(waiting)
        )

    @property
    def is_away(self) -> bool:
        """Whether any event loop that runs in this process thinks so; where none does, the latest of all."""
        batchers = list(self.batchers.items())
        if not batchers:
            return self._was_away
        if not [loop for loop, each in batchers if each.error is not None]:  # nearly always, and soon found
            return False
        running = [each for loop, each in batchers if loop.is_running()]
        return any([each.error is not None for each in running or [each for _, each in batchers[-1:]]])

    async def open(self) -> None:
        """Connect ahead of the first request. A server that is away is no error: it is tried again."""
        await self._batcher().connect()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        loop = asyncio.get_running_loop()
        end = self._ends.pop(loop, None)
        if end is not None:
            await end.cancel()
        others = [each for each in list(self.batchers) if each is not loop]
        await self._leave(loop, CLOSE_TIMEOUT, bequeaths=any([each.is_running() for each in others]))

    async def _close_with_loop(self) -> None:
        """Close where nobody did it before the loop ends; a server that is away is not waited for."""
        loop = asyncio.get_running_loop()
        batcher = self.batchers.get(loop)
        is_away = batcher is not None and batcher.error is not None
        await self._leave(loop, 0.0 if is_away else CLOSE_TIMEOUT, bequeaths=True)
        cancelled = [task for task in asyncio.all_tasks() if task.cancelling()]
        if cancelled:  # an attempt to connect, which has a socket to close: nobody else waits for it now
            await asyncio.wait(cancelled, timeout=self._timeout)

    async def _leave(self, loop: asyncio.AbstractEventLoop, timeout: float, *, bequeaths: bool) -> None:
        """Close the connection of an event loop; other loops go on with what it `bequeaths`."""
        batcher, lines = self.batchers.get(loop), self._lines.get(loop)
        if batcher is None:
            return
        deadline = loop.time() + timeout
        if timeout:
            self.take_over()
        if lines is not None:
            await lines.drain(timeout)
        await batcher.drain(deadline - loop.time())
        with self._lock:
            if bequeaths:
                self._inherit(batcher, lines)
            if lines is not None:
                lines.close()
            self._forget(loop)
        batcher.close()
        await end_of_watches()
        await asyncio.sleep(0)  # in which the transport goes

    def take_over(self) -> None:
        """Send what event loops that have ended owed to the server, and undo what they left half done."""
        with self._lock:
            for closed in [each for each in list(self.batchers) if each.is_closed()]:
                self._inherit(self.batchers[closed], self._lines.get(closed))
                self._forget(closed)
            left, self._left = self._left, []
        for operation in left:
            operation.future = None  # which was the ended loop's
            if isinstance(operation, OrderedOperation):
                self._running_lines().submit(operation)
            elif operation.must_arrive:
                self._submit(operation)
            else:
                operation.orphaned(None)

    def _inherit(self, batcher: Sender, lines: Lines | None) -> None:
        self._left += batcher.bequeath()
        if lines is not None:
            self._left += lines.bequeath()

    def after_fork(self) -> None:
        """Leave connections, and what is owed over them, to the parent process."""
        for batcher in self.batchers.values():
            batcher.leave_to_parent()
        leave_to_parent(*self.batchers.values(), *self._lines.values(), *self._left)
        self._lock = threading.Lock()
        self.batchers.clear()
        self._left = []
        self._ends.clear()
        self._lines.clear()
        self._past = Load()
        self._was_away = False

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Keep only the figures of an event loop's batcher."""
        batcher = self.batchers.pop(loop, None)
        self._ends.pop(loop, None)
        self._lines.pop(loop, None)
        if batcher is not None:
            self._was_away = batcher.error is not None
            self._past = self._past.plus(batcher.load._replace(owed=0))

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

    async def renew(self, hold: Reservation, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        (kept,) = await renewed(self.send_renewals([(hold, lease)]), 1)
        if isinstance(kept, BackendError):
            raise kept
        return kept

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many holds, each for its own time, as one operation; the answer to each, or why there is
        none.
        """
        return await renewed(self.send_renewals(renewals, is_upkeep=True), len(renewals))

    def send_renewals(
        self, renewals: Iterable[tuple[Reservation, float]], *, is_upkeep: bool = False
    ) -> Operation:
        """Send the renewals of many holds; `renewed` waits for the answers."""
        operation = renewal_on(renewals, self._names.name)
        operation.is_upkeep = is_upkeep
        return self._submit(operation)

    def finish(self, hold: Reservation, money: EstimateAction) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        units: Awaitable[object] | None = None
        if hold.meters and money is not EstimateAction.UNTOUCHED:
            units = self._owe_units(Mode.KEEP if money is EstimateAction.KEEP else Mode.GIVE_BACK, hold)
        if not hold.id or not (hold.slots or hold.periods):
            return units or _nothing_to_do()
        return self._owe_finish(hold, money)

    async def settle(self, hold: Reservation, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        if not hold.id or not hold.periods:
            return Settlement.UNKNOWN
        _, met = await self._owe_price(SETTLE, hold, amount, replace=replace)
        return Settlement(met)

    def keep(self, hold: Reservation) -> Awaitable[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        units: Awaitable[object] | None = None
        if any(hold.estimates):
            units = self._owe_units(Mode.HOLD, hold)
        if hold.id and hold.has_price:
            return self._owe_price(KEEP, hold, 0)
        return units or _nothing_to_do()

    async def settle_units(self, hold: Reservation, units: Units, *, replace: bool = False) -> Settlement:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        try:
            units = check_amounts(units)
        except ValueError as error:
            raise OperationRefusedError(str(error)) from None
        if not any([meter.unit in units for meter in hold.meters]):
            return Settlement.UNKNOWN
        _, met = await self._owe_units(Mode.REPLACE if replace else Mode.SETTLE, hold, units)
        return Settlement(met)

    def _owe_units(self, mode: Mode, hold: Reservation, units: Units | None = None) -> OrderedOperation:
        template = meter_template(mode, hold, self._names, units)
        return self._submit_in_line(template, hold, f"u:{hold.meters[0].partition}")

    def _owe_price(
        self, kind: bytes, hold: Reservation, amount: int, *, replace: bool = False
    ) -> Awaitable[Answer]:
        template = self._places_of(hold).settle(kind, amount, replace=replace)
        return self._submit_in_line(template, hold, hold.periods[0].partition)

    def give_back(self, charge: Charge, lease_id: bytes, outcome: Outcome) -> None:
        """Undo an admitted charge: windows by its time, slots and money by its id. Waits for nothing."""
        self.undo(charge, lease_id, outcome.hold, outcome.now)

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        keys = [self._names.of_counter(counter, self._now()) for counter in charge.counters]
        keys += [self._names.of_open(meter) for meter in charge.meters]
        await self._submit(operation_on(keys, struct.pack("<cB", DELETE, len(keys))))

    # charges ------------------------------------------------------------------------------------

    def _ask(self, kind: bytes, charge: Charge, lease_id: bytes, price: int) -> ChargeOperation:
        operation = ChargeOperation(self, kind, charge, lease_id, price)
        self._pack_into(operation)
        loop = get_running_loop()
        operation.future = Future(loop=loop)  # as uvloop makes one, for half of what its own way costs
        (self.batchers.get(loop) or self._batcher()).submit(operation)
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
        self._skew = now - _machine_clock()
        operation.tries += 1
        if operation.tries == 1:  # once more, in what is left of the request's time
            error = BackendError(f"asked again for more than {self._timeout:g} s")
            loop = asyncio.get_running_loop()
            loop.call_at(operation.since + self._timeout, operation.fail, error)
        if operation.tries > ASKED_AGAIN:
            text = f"the server's clock shows {now} us and does not keep to it"
            operation.fail(OperationRefusedError(text))
        else:
            self._pack_into(operation)
            self._submit(operation)

    def _pack_into(self, operation: ChargeOperation) -> None:
        """Give a charge its template, and what it will hold."""
        charge, kind, price = operation.charge, operation.kind, operation.price
        packed = self.prepare(charge)
        if kind != PEEK and charge.is_held:
            operation.hold = charge.recorded_hold(operation.id, packed.periods, price)
        if packed.records or kind != ACQUIRE:
            packed = packed.priced(kind, price, int(charge.lease * SECOND))
            if packed.units and packed.record:
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
            keys = layout.keys.of(charge)
        template = ChargeTemplate(self, layout, keys, layout.body, layout.head)
        template.charges = layout.keys.only_partition_of(charge)
        if charge.meters:
            template.records = self._names.record_argument(charge.meters[0].partition, "u")
        if charge.allowances:
            template.units = template.records
            template.periods = tuple([place_of(counter, now) for counter in charge.allowances])
            template.records = self._names.record_argument(template.periods[0].partition)
        return template

    def _lay_out(self, charge: Charge, now: int) -> Layout:
        places = [(counter.partition, suffix_of(counter, now)) for counter in charge.counters]
        places += [(meter.partition, f"e:{meter.open_scope}") for meter in charge.meters]
        limits, since, until = b"", 0, 1 << 62
        for counter in charge.counters:
            if isinstance(counter.limit, Allowance):
                period = period_at(counter.limit.period, counter.limit.timezone, now)
                limits += LIMIT.pack(BUDGET, counter.limit.amount, period.start, period.end)
                since, until = max(since, period.start), min(until, period.end)
            else:
                limits += pack_limit(counter.limit)
        layout = Layout(charge, ChargeKeys(self._prefix, places), limits)
        layout.since, layout.until = since, until
        return layout

    def undo(self, charge: Charge, lease_id: bytes, hold: Reservation, now: int) -> None:
        """Undo a charge that was made at `now`, 0 where that is unknown. Waits for nothing."""
        windows = [
            counter
            for counter in charge.counters
            if isinstance(counter.limit, Window) and not counter.limit.is_metered
        ]
        if now and windows:
            body = FINISH_HEAD.pack(FINISH, len(windows), EstimateAction.UNTOUCHED.value, now, charge.cost)
            keys = [self._names.of_counter(counter, now) for counter in windows]
            limits = [pack_limit(counter.limit) for counter in windows]
            operation = operation_on(keys, b"".join((body, *limits, lease_id)))
            operation.is_once = True  # done twice, it would give back another request's units
            self._submit(operation, must_arrive=True)
        if hold is not NO_RESERVATION:
            self.finish(hold, EstimateAction.GIVE_BACK)

    def _owe_finish(self, hold: Reservation, money: EstimateAction) -> Awaitable[object]:
        template = self._places_of(hold).end(money)
        if template.record:
            return self._submit_in_line(template, hold, hold.periods[0].partition)
        return self._submit(Operation(template, hold.id), must_arrive=True)

    def _places_of(self, hold: Reservation) -> HeldPlaces:
        """Return the operation templates for a reservation, shared by all requests of a caller on a route."""
        key = (hold.slots, hold.periods) if hold.periods else hold.slots
        places = self._held_places.get(key)
        if places is None:
            evict_oldest(self._held_places, _MAX_PLACES)
            places = self._held_places[key] = HeldPlaces(self._names, hold)
        return places

    # sending ------------------------------------------------------------------------------------

    def _submit(self, operation: Operation, *, must_arrive: bool = False) -> Operation:
        """Send an operation; it is under way when this returns, whether anybody awaits it or not."""
        if must_arrive:
            operation.must_arrive = True
        batcher = self.batchers.get(get_running_loop()) or self._batcher()
        batcher.submit(operation)
        return operation

    def _submit_in_line(self, template: Template, hold: Reservation, line: str) -> OrderedOperation:
        """Send an operation on money or units until it arrives, after those before it in this line."""
        operation = OrderedOperation(template, hold.id, (hold.id, line))
        self._running_lines().submit(operation)
        return operation

    def _running_lines(self) -> Lines:
        """The running loop's own."""
        loop = asyncio.get_running_loop()
        lines = self._lines.get(loop)
        if lines is None:
            lines = self._lines[loop] = Lines(self._batcher().submit)
        return lines

    def _batcher(self) -> Sender:
        """The running loop's own: connections and futures belong to one loop."""
        loop = asyncio.get_running_loop()
        batcher = self.batchers.get(loop)
        if batcher is None:
            self._ends[loop] = LoopEnd(self._close_with_loop)
            batcher = self.batchers[loop] = self._new_batcher()
            self.take_over()
        return batcher

    def _new_batcher(self) -> Sender:
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
        return _machine_clock() + self._skew if self._clock is None else self._clock()


def _machine_clock() -> int:
    return time.time_ns() // 1000


def _nothing_to_do() -> Operation:
    operation = Operation(Template(b"", 0, b""))
    operation.answer((0, b""))
    return operation
