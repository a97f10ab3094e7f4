"""The shared backend: one Redis or Valkey behind all workers.

Packs charges into operations of the script `batch.lua` and reads its answers. Whatever of a charge never
changes is packed once.
"""

import asyncio
import struct
import time
from collections.abc import Awaitable
from typing import Any, NamedTuple

from ratelimit_mw.backends.batcher import Batcher, OnOrphan, Operation, bulk
from ratelimit_mw.backends.connection import Connector
from ratelimit_mw.charge import (
    LEASE_ID_SIZE,
    NOTHING_HELD,
    BackendError,
    Charge,
    Clock,
    Counter,
    Figures,
    Held,
    Hold,
    Money,
    Outcome,
    Settlement,
    place_of,
)
from ratelimit_mw.limits import SECOND, Allowance, Limit, Slots, Window
from ratelimit_mw.periods import KEPT_AFTER_END, period_at

CLOSE_TIMEOUT = 2.0
"""Seconds that closing waits for what is still owed to the server."""

_LIMIT = struct.Struct("<cddd")
_ACQUIRE = struct.Struct("<c16sdddB")
_FINISH = struct.Struct("<c16sBddB")
_RENEW = struct.Struct("<c16sdB")
_SETTLE = struct.Struct("<c16sdBB")
_FIGURES = struct.Struct("<qqq")
_ADMITTED, _OTHER_PERIOD = 1, 2
_NO_LEASE = bytes(LEASE_ID_SIZE)
_SERVER_CLOCK = bulk(b"")


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
        self._connector = Connector(url, timeout=timeout, options=options)
        self._prefix = f"{namespace}:".encode()
        self._timeout = timeout
        self._clock = clock
        self._batchers: dict[asyncio.AbstractEventLoop, Batcher] = {}
        self._skew = 0  # the server's clock less this machine's, in microseconds, when last seen

    @property
    def error(self) -> BackendError | None:
        """Why the server is thought to be away; None while it is there or was not asked yet."""
        return self._batcher().error

    async def open(self) -> None:
        """Connect ahead of the first request. A server that is away is no error: it is tried again."""
        await self._batcher().connect()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        batcher = self._batchers.pop(asyncio.get_running_loop(), None)
        if batcher is not None:
            await batcher.drain(CLOSE_TIMEOUT)
            batcher.close()

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        return await self._decide(b"A", charge, lease_id, price)

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        return await self._decide(b"P", charge, _NO_LEASE, price)

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        body = _RENEW.pack(b"N", hold.id, lease * SECOND, len(hold.slots))
        _, answer = await self._submit_keys(self._slot_keys(hold), body)
        return b"\0" not in answer

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        return self._owe_finish(hold, money)

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        keys = [*self._period_keys(hold), self._record_key(hold)]
        body = _SETTLE.pack(b"S", hold.id, amount, replace, len(hold.periods))
        ends = struct.pack(f"<{len(hold.periods)}d", *[held.ends for held in hold.periods])
        _, answer = await self._submit_keys(keys, body + ends, must_arrive=True)
        return Settlement(answer[0])

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        keys = [self._key(counter, self._now()) for counter in charge.counters]
        await self._submit_keys(keys, struct.pack("<cB", b"D", len(keys)))

    # charges ------------------------------------------------------------------------------------

    async def _decide(self, kind: bytes, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        now = 0
        for _ in range(2):
            hold = charge.hold(lease_id, price, self._now()) if kind == b"A" else NOTHING_HELD
            now, answer = await self._send_charge(kind, charge, lease_id, price, hold)
            self._skew = now - _machine_clock()
            if answer[0] != _OTHER_PERIOD:
                figures = [Figures._make(each) for each in _FIGURES.iter_unpack(answer[1:])]
                admitted = answer[0] == _ADMITTED
                return Outcome(admitted, now, figures, hold if admitted else NOTHING_HELD)
            # A period ended between this machine's clock and the server's, whose time is known now.
        raise BackendError(f"the server's clock shows {now} us and does not keep to it")

    def _send_charge(
        self, kind: bytes, charge: Charge, lease_id: bytes, price: int, hold: Hold
    ) -> "asyncio.Future[tuple[int, bytes]]":
        now = self._now()
        packed = charge.prepared
        if (
            not isinstance(packed, _Packed)
            or packed.owner is not self
            or not packed.since <= now < packed.until
        ):
            packed = charge.prepared = self._pack(charge, now)
        keys, n_keys, life = packed.keys, len(charge.counters), 0.0
        if hold.periods:
            keys, n_keys = keys + bulk(self._record_key(hold)), n_keys + 1
            life = (max(held.ends for held in hold.periods) + KEPT_AFTER_END - now) // 1000
        body = _ACQUIRE.pack(kind, lease_id, charge.cost, price, life, len(charge.counters)) + packed.limits

        def give_back(now: int, answer: bytes | None) -> None:
            if kind == b"A" and (answer is None or answer[0] == _ADMITTED):
                self._give_back(charge, lease_id, hold, now)

        return self._submit(keys, n_keys, body, on_orphan=give_back)

    def _pack(self, charge: Charge, now: int) -> "_Packed":
        """A charge's keys and limits as they are sent, until a period of it ends."""
        keys = b"".join([bulk(self._key(counter, now)) for counter in charge.counters])
        limits, since, until = b"", 0, 1 << 62
        for counter in charge.counters:
            if isinstance(counter.limit, Allowance):
                period = period_at(counter.limit.period, counter.limit.timezone, now)
                limits += _LIMIT.pack(b"B", counter.limit.amount, period.start, period.end)
                since, until = max(since, period.start), min(until, period.end)
            else:
                limits += _pack_limit(counter.limit)
        return _Packed(self, keys, limits, since, until)

    def _give_back(self, charge: Charge, lease_id: bytes, hold: Hold, now: int) -> None:
        """Undo a charge that nobody waits for any more; `now` is when it was made, 0 where that is unknown."""
        windows = [counter for counter in charge.counters if isinstance(counter.limit, Window)]
        if now and windows:
            # Not sent again: done twice, it would give back another request's units.
            body = _FINISH.pack(b"F", lease_id, Money.UNTOUCHED.value, now, charge.cost, len(windows))
            keys = [self._key(counter, now) for counter in windows]
            _ignore(self._submit_keys(keys, body + b"".join([_pack_limit(w.limit) for w in windows])))
        if hold is not NOTHING_HELD:
            self._owe_finish(hold, Money.GIVE_BACK)

    def _owe_finish(self, hold: Hold, money: Money) -> "asyncio.Future[tuple[int, bytes]]":
        keys, limits = self._slot_keys(hold), _LIMIT.pack(b"C", 0, 0, 0) * len(hold.slots)
        moves = money if hold.periods else Money.UNTOUCHED
        if moves is not Money.UNTOUCHED:
            keys += [*self._period_keys(hold), self._record_key(hold)]
            limits += b"".join([_LIMIT.pack(b"B", 0, 0, held.ends) for held in hold.periods])
        n_limits = len(limits) // _LIMIT.size
        body = _FINISH.pack(b"F", hold.id, moves.value, 0, 0, n_limits) + limits
        return _ignore(self._submit_keys(keys, body, must_arrive=True))

    # sending ------------------------------------------------------------------------------------

    def _submit_keys(
        self, keys: list[bytes], body: bytes, *, must_arrive: bool = False
    ) -> "asyncio.Future[tuple[int, bytes]]":
        return self._submit(b"".join(map(bulk, keys)), len(keys), body, must_arrive=must_arrive)

    def _submit(
        self,
        keys: bytes,
        n_keys: int,
        body: bytes,
        *,
        must_arrive: bool = False,
        on_orphan: OnOrphan | None = None,
    ) -> "asyncio.Future[tuple[int, bytes]]":
        loop = asyncio.get_running_loop()
        operation = Operation(
            keys, n_keys, bulk(body), loop.create_future(), must_arrive=must_arrive, on_orphan=on_orphan
        )
        (self._batchers.get(loop) or self._batcher()).submit(operation)
        return operation.future

    def _batcher(self) -> Batcher:
        """The running loop's own: connections and futures belong to one loop."""
        loop = asyncio.get_running_loop()
        batcher = self._batchers.get(loop)
        if batcher is None:
            for closed in [each for each in self._batchers if each.is_closed()]:
                del self._batchers[closed]
            batcher = self._batchers[loop] = Batcher(
                self._connector.connect,
                timeout=self._timeout,
                clock_argument=self._clock_argument,
                probe_key=self._prefix + b"probe",
            )
        return batcher

    def _clock_argument(self) -> bytes:
        return _SERVER_CLOCK if self._clock is None else bulk(b"%d" % self._clock())

    def _now(self) -> int:
        """The server's time in microseconds, as far as this machine can tell."""
        return _machine_clock() + self._skew if self._clock is None else self._clock()

    # keys ---------------------------------------------------------------------------------------

    def _key(self, counter: Counter, now: int) -> bytes:
        limit = counter.limit
        if isinstance(limit, Window):
            return self._name(counter.partition, f"w:{counter.scope}:{limit.seconds}")
        if isinstance(limit, Slots):
            return self._name(counter.partition, f"s:{counter.scope}")
        return self._period_key(place_of(counter, now))

    def _slot_keys(self, hold: Hold) -> list[bytes]:
        return [self._name(held.partition, f"s:{held.scope}") for held in hold.slots]

    def _period_keys(self, hold: Hold) -> list[bytes]:
        return [self._period_key(held) for held in hold.periods]

    def _period_key(self, held: Held) -> bytes:
        return self._name(held.partition, f"b:{held.scope}")

    def _record_key(self, hold: Hold) -> bytes:
        return self._name(hold.periods[0].partition, f"r:{hold.id.hex()}")

    def _name(self, partition: str, suffix: str) -> bytes:
        # The partition is the hash tag of Redis Cluster, so it must not hold a brace of its own.
        tag = partition.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
        return self._prefix + f"{{{tag}}}:{suffix}".encode()


class _Packed(NamedTuple):
    """What never changes of a charge, as it is sent."""

    owner: RedisBackend
    keys: bytes
    limits: bytes
    since: int
    until: int


def _pack_limit(limit: Limit) -> bytes:
    if isinstance(limit, Window):
        return _LIMIT.pack(b"W", limit.quota, limit.length, limit.granule)
    if isinstance(limit, Slots):
        return _LIMIT.pack(b"C", limit.limit, limit.lease * SECOND, 0)
    raise TypeError(f"an allowance is packed with its period: {limit!r}")


def _machine_clock() -> int:
    return time.time_ns() // 1000


def _ignore(future: "asyncio.Future[tuple[int, bytes]]") -> "asyncio.Future[tuple[int, bytes]]":
    """Let a failure pass where nobody waits: an expiry frees what was not."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
