"""The shared backend: one Redis or Valkey behind all workers.

Makes operations of the script `batch.lua` of charges, releases and settles, and reads its answers.
"""

import asyncio
import struct
import time
from collections.abc import Awaitable, Sequence
from functools import partial, reduce
from typing import Any

from ratelimit_mw.backends.batcher import Batcher
from ratelimit_mw.backends.connection import end_of_watches
from ratelimit_mw.backends.operations import Operation, Sender, Template, bulk, probe_of
from ratelimit_mw.backends.packing import (
    ACQUIRE,
    ADMITTED,
    FINISH,
    ID,
    LIMIT,
    OTHER_PERIOD,
    RENEW,
    SETTLE,
    SLOT,
    Keys,
    Layout,
    Packed,
    operation_on,
    pack_limit,
    release_template,
    tag_of,
)
from ratelimit_mw.backends.servers import connector_to
from ratelimit_mw.charge import (
    LEASE_ID_SIZE,
    NOTHING_HELD,
    BackendError,
    Charge,
    Clock,
    Counter,
    Held,
    Hold,
    Load,
    Money,
    Outcome,
    Settlement,
    place_of,
)
from ratelimit_mw.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw.periods import KEPT_AFTER_END, period_at
from ratelimit_mw.room import make_room

CLOSE_TIMEOUT = 2.0
"""Seconds that closing waits for what is still owed to the server."""
ASKED_AGAIN = 3
"""Times that a charge is sent before its clock and the server's must agree on the day."""

_MAX_RELEASES = 16_384
"""Callers whose release is kept packed."""
_NO_LEASE = bytes(LEASE_ID_SIZE)


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
        self._timeout = timeout
        self._clock = clock
        self.batchers: dict[asyncio.AbstractEventLoop, Sender] = {}
        self.releases: dict[tuple[Held, ...], Template] = {}
        self._skew = 0  # the server's clock less this machine's, in microseconds, when last seen

    @property
    def error(self) -> BackendError | None:
        """Why the server is thought to be away; None while it is there or was not asked yet."""
        return self._batcher().error

    @property
    def load(self) -> Load:
        """What the connections of all event loops have carried, and what waits."""
        return reduce(Load.plus, [each.load for each in list(self.batchers.values())], Load())

    @property
    def is_away(self) -> bool:
        """Whether any event loop of this process thinks so."""
        return any(each.error is not None for each in list(self.batchers.values()))

    async def open(self) -> None:
        """Connect ahead of the first request. A server that is away is no error: it is tried again."""
        await self._batcher().connect()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        loop = asyncio.get_running_loop()
        batcher = self.batchers.get(loop)
        if batcher is not None:
            await batcher.drain(CLOSE_TIMEOUT)
            batcher.close()
            self.batchers.pop(loop, None)
            await end_of_watches()

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        if charge.allowances:
            return await self._decide(b"A", charge, lease_id, price)
        operation = Operation(self.prepare(charge), lease_id)
        hold = charge.hold(lease_id, 0, 0)
        operation.orphaned, operation.about = self.on_orphan, (charge, lease_id, hold)
        loop = asyncio.get_running_loop()
        future = operation.future = loop.create_future()
        (self.batchers.get(loop) or self._batcher()).submit(operation)
        try:
            now, numbers = await future
        except asyncio.CancelledError:
            self.give_up(operation)
            raise
        if numbers[0] == ADMITTED:
            return Outcome(True, now, numbers[1:], hold)
        return Outcome(False, now, numbers[1:], NOTHING_HELD)

    def give_up(self, operation: Operation) -> None:
        """The request was cancelled: maybe in the very turn in which the answer came and was handed over."""
        future = operation.future
        if future is not None and not future.cancelled() and future.exception() is None:
            operation.answer(future.result())

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        return await self._decide(b"P", charge, _NO_LEASE, price)

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        body = RENEW.pack(b"N", hold.id, int(lease * SECOND), len(hold.slots))
        _, answer = await self._submit(operation_on(self._slot_keys(hold), body))
        return b"\0" not in answer

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        return self._owe_finish(hold, money) if hold.slots or hold.periods else _nothing_to_do()

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        if not hold.periods:
            return Settlement.UNKNOWN
        keys = [*self._period_keys(hold), self._record_key(hold)]
        body = SETTLE.pack(b"S", hold.id, amount, replace, len(hold.periods))
        ends = struct.pack(f"<{len(hold.periods)}d", *[held.ends for held in hold.periods])
        _, answer = await self._submit(operation_on(keys, body + ends), must_arrive=True)
        return Settlement(answer[0])

    def give_back(self, charge: Charge, lease_id: bytes, outcome: Outcome) -> None:
        """Undo an admitted charge: windows by its time, slots and money by its id. Waits for nothing."""
        self.on_orphan((charge, lease_id, outcome.hold), outcome.now, None)

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        keys = [self._key(counter, self._now()) for counter in charge.counters]
        await self._submit(operation_on(keys, struct.pack("<cB", b"D", len(keys))))

    # charges ------------------------------------------------------------------------------------

    async def _decide(self, kind: bytes, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """What needs to know the day, whose periods are part of keys; and what happens seldom."""
        answered, loop = 0, asyncio.get_running_loop()
        give_up_at = loop.time() + self._timeout
        for _ in range(ASKED_AGAIN):
            now = self._now()
            hold = charge.hold(lease_id, price, now) if kind == b"A" else NOTHING_HELD
            operation, packed = self._operation_of(kind, charge, lease_id, price, hold, now)
            if answered:  # once more, in what is left of the request's time
                error = BackendError(f"asked again for more than {self._timeout:g} s")
                loop.call_at(give_up_at, operation.fail, error)
            try:
                answered, answer = await self._submit(operation)
            except asyncio.CancelledError:
                self.give_up(operation)
                raise
            self._skew = answered - _machine_clock()
            if answer[0] != OTHER_PERIOD:
                admitted = answer[0] == ADMITTED
                numbers = packed.unpack(answer)[1:]
                return Outcome(admitted, answered, numbers, hold if admitted else NOTHING_HELD)
            # A period ended between this machine's clock and the server's, whose time is known now.
        raise BackendError(f"the server's clock shows {answered} us and does not keep to it")

    def _operation_of(
        self, kind: bytes, charge: Charge, lease_id: bytes, price: int, hold: Hold, now: int
    ) -> "tuple[Operation, Packed]":
        packed = charge.prepared
        if (
            not isinstance(packed, Packed)
            or packed.owner is not self
            or not packed.layout.since <= now < packed.layout.until
        ):
            packed = charge.prepared = self._pack(charge, now)
        keys, n_keys, life = packed.keys, packed.n_keys, 0
        if hold.periods:
            keys, n_keys = keys + bulk(self._record_key(hold)), n_keys + 1
            life = (max(held.ends for held in hold.periods) + KEPT_AFTER_END - now) // 1000
        body = ACQUIRE.pack(kind, packed.n_keys, charge.cost, price, life) + packed.layout.limits + lease_id
        operation = Operation(Template(keys, n_keys, body))
        if kind == b"A":
            operation.orphaned, operation.about = self.on_orphan, (charge, lease_id, hold)
        return operation, packed

    def prepare(self, charge: Charge) -> "Packed":
        """A charge of no allowances as it is sent, made once."""
        packed = charge.prepared
        if packed.__class__ is not Packed or packed.owner is not self:
            packed = charge.prepared = self._pack(charge, 0)
        return packed

    def release_of(self, charge: Charge) -> Template:
        """All of a release but the id of the lease, made once."""
        packed = self.prepare(charge)
        if packed.release is None:
            keys = packed.layout.slot_keys.of(charge)
            packed.release = release_template(keys, len(charge.slots))
        return packed.release

    def _pack(self, charge: Charge, now: int) -> "Packed":
        """A charge's keys and limits as they are sent, until a period of it ends."""
        if charge.like is not None and not charge.allowances:
            model = self.prepare(charge.like)
            return Packed(self, model.layout, charge)
        places = [(counter.partition, self._suffix(counter, now)) for counter in charge.counters]
        keys = Keys(self._prefix, places)
        limits, since, until = b"", 0, 1 << 62
        for counter in charge.counters:
            if isinstance(counter.limit, Allowance):
                period = period_at(counter.limit.period, counter.limit.timezone, now)
                limits += LIMIT.pack(b"B", counter.limit.amount, period.start, period.end)
                since, until = max(since, period.start), min(until, period.end)
            else:
                limits += pack_limit(counter.limit)
        slot_keys = Keys(self._prefix, [(held.partition, f"s:{held.scope}") for held in charge.slots])
        return Packed(self, Layout(charge, (keys, slot_keys), limits, since, until), charge)

    def on_orphan(self, about: tuple[Charge, bytes, Hold], now: int, answer: Sequence[int] | None) -> None:
        """Undo a charge that nobody waits for any more.

        `now` is when it was made and `answer` what it met; 0 and None where both are unknown.
        """
        charge, lease_id, hold = about
        if answer is not None and answer[0] != ADMITTED:
            return
        windows = [counter for counter in charge.counters if isinstance(counter.limit, Window)]
        if now and windows:
            body = FINISH.pack(b"F", len(windows), Money.UNTOUCHED.value, now, charge.cost)
            keys = [self._key(counter, now) for counter in windows]
            limits = [pack_limit(counter.limit) for counter in windows]
            operation = operation_on(keys, b"".join((body, *limits, lease_id)))
            operation.is_once = True  # done twice, it would give back another request's units
            self._submit(operation, must_arrive=True)
        if hold is not NOTHING_HELD:
            self._owe_finish(hold, Money.GIVE_BACK)

    def _owe_finish(self, hold: Hold, money: Money) -> Operation:
        if not hold.periods and len(hold.id) == LEASE_ID_SIZE:
            template = self.releases.get(hold.slots)
            if template is None:
                make_room(self.releases, _MAX_RELEASES)
                template = self.releases[hold.slots] = self._pack_release(hold.slots)
            return self._submit(Operation(template, hold.id), must_arrive=True)
        keys, limits = self._slot_keys(hold), SLOT * len(hold.slots)
        moves = money if hold.periods else Money.UNTOUCHED
        if moves is not Money.UNTOUCHED:
            keys += [*self._period_keys(hold), self._record_key(hold)]
            limits += b"".join([LIMIT.pack(b"B", 0, 0, held.ends) for held in hold.periods])
        body = FINISH.pack(b"F", len(limits) // LIMIT.size, moves.value, 0, 0) + limits
        return self._submit(operation_on(keys, body + ID.pack(hold.id)), must_arrive=True)

    def _pack_release(self, slots: tuple[Held, ...]) -> Template:
        """All of a release but the id of the lease: the same for every request of a caller."""
        keys = b"".join([bulk(self._name(held.partition, f"s:{held.scope}")) for held in slots])
        return release_template(keys, len(slots))

    # sending ------------------------------------------------------------------------------------

    def _submit(self, operation: Operation, *, must_arrive: bool = False) -> Operation:
        """Send an operation; it is under way when this returns, whether anybody awaits it or not."""
        if must_arrive:
            operation.must_arrive = True
        batcher = self.batchers.get(asyncio.get_running_loop()) or self._batcher()
        batcher.submit(operation)
        return operation

    def _batcher(self) -> Sender:
        """The running loop's own: connections and futures belong to one loop."""
        loop = asyncio.get_running_loop()
        batcher = self.batchers.get(loop)
        if batcher is None:
            for closed in [each for each in list(self.batchers) if each.is_closed()]:
                self.batchers.pop(closed, None)  # another thread's loop may be doing the same
            batcher = self.batchers[loop] = self._new_batcher()
        return batcher

    def _new_batcher(self) -> Sender:
        return Batcher(
            self._connector.connect,
            timeout=self._timeout,
            clock_argument=self._clock_argument,
            new_probe=partial(probe_of, self._prefix + b"probe"),
        )

    def _clock_argument(self) -> bytes:
        return b"" if self._clock is None else b"%d" % self._clock()

    def _now(self) -> int:
        """The server's time in microseconds, as far as this machine can tell."""
        return _machine_clock() + self._skew if self._clock is None else self._clock()

    # keys ---------------------------------------------------------------------------------------

    def _key(self, counter: Counter, now: int) -> bytes:
        return self._name(counter.partition, self._suffix(counter, now))

    def _suffix(self, counter: Counter, now: int) -> str:
        limit = counter.limit
        if isinstance(limit, Window):
            return f"w:{counter.scope}:{limit.seconds}"
        if isinstance(limit, Slots):
            return f"s:{counter.scope}"
        return f"b:{place_of(counter, now).scope}"

    def _slot_keys(self, hold: Hold) -> list[bytes]:
        return [self._name(held.partition, f"s:{held.scope}") for held in hold.slots]

    def _period_keys(self, hold: Hold) -> list[bytes]:
        return [self._period_key(held) for held in hold.periods]

    def _period_key(self, held: Held) -> bytes:
        return self._name(held.partition, f"b:{held.scope}")

    def _record_key(self, hold: Hold) -> bytes:
        return self._name(hold.periods[0].partition, f"r:{hold.id.hex()}")

    def _name(self, partition: str, suffix: str) -> bytes:
        return b"%b{%b}:%b" % (self._prefix, tag_of(partition), suffix.encode("utf-8", "surrogatepass"))


def _machine_clock() -> int:
    return time.time_ns() // 1000


def _nothing_to_do() -> Operation:
    operation = Operation(Template(b"", 0, b""))
    operation.answer((0, b""))
    return operation
