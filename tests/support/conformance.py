"""One backend of each kind on a clock of the test's own, for the suite that all of them pass."""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation
from tests.support.servers import StoreServer, server_binaries
from tests.support.statuses import Answer, acquired, peeked
from tests.support.topologies import Cluster

STORES = tuple(sorted(server_binaries()))
KINDS = ("memory", *STORES)
TIMEOUT = 5.0
"""Seconds that a backend waits: longer than any pause of a busy machine."""
TICK = 0.01
"""Seconds between two looks at what is waited for."""

SharedServer = Callable[[str], StoreServer]
Backend = MemoryBackend | RedisBackend | ClusterBackend


def instant(text: str) -> int:
    """Microseconds since 1970 of a time in ISO 8601, with its offset."""
    moment = datetime.fromisoformat(text)
    return int(moment.timestamp()) * SECOND + moment.microsecond


class Clock:
    """A clock that moves only when it is told to, in microseconds."""

    def __init__(self) -> None:
        self.now = instant("2026-11-21T12:00:00+00:00")

    def __call__(self) -> int:
        """Say what it shows."""
        return self.now


class Bench:
    """A backend under test and its clock."""

    def __init__(self, kind: str, server: StoreServer | Cluster | None) -> None:
        self.kind = kind
        self.server = server
        self.clock = Clock()
        self.backends: deque[Backend] = deque()
        self.backend = self.another()

    def another(self) -> Backend:
        """A second backend with the same counts: another object, where a server holds them."""
        if self.server is not None:
            return self.on_clock(self.clock)
        if not self.backends:
            self.backends.append(MemoryBackend(clock=self.clock))
        return self.backends[0]

    def on_clock(self, clock: Callable[[], int] | None) -> RedisBackend | ClusterBackend:
        """A backend on the same server with another clock; None is the server's own."""
        if self.server is None:
            raise TypeError("the memory backend has no server")
        backend = (ClusterBackend if isinstance(self.server, Cluster) else RedisBackend)(
            self.server.url, timeout=TIMEOUT, clock=clock
        )
        self.backends.append(backend)
        return backend

    async def close(self) -> None:
        """Close every backend that was handed out."""
        for backend in self.backends:
            await backend.close()

    def wait(self, seconds: float = 0, *, microseconds: int = 0) -> None:
        """Let time pass; a negative time steps the clock back."""
        self.clock.now += round(seconds * SECOND) + microseconds

    async def acquire(self, *counters: Counter, cost: int = 1, price: int = 0, **units: int) -> Answer:
        """Charge the counters under a new lease id; `units` are estimates."""
        return await acquired(self.backend, Charge(counters, cost, estimates=units), new_id(), price)

    async def peek(self, *counters: Counter, cost: int = 1, price: int = 0, **units: int) -> Answer:
        """Return the answer that a charge would get."""
        return await peeked(self.backend, Charge(counters, cost, estimates=units), price)

    async def used(self, *counters: Counter) -> list[int]:
        """Return the count of each counter: units, active slots, money spent."""
        return (await self.peek(*counters)).counted

    async def reserve(self, *counters: Counter, price: int = 0, **units: int) -> Reservation:
        """The reservation of a charge that has to be admitted."""
        outcome = await self.acquire(*counters, price=price, **units)
        assert outcome.admitted
        return outcome.reservation


@asynccontextmanager
async def opened(kind: str, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """A bench on a backend of this kind, without any counts."""
    bench = Bench(kind, None if kind == "memory" else shared_server(kind))
    try:
        yield bench
    finally:
        await bench.close()


def new_id() -> bytes:
    """A lease id that nobody else has."""
    return os.urandom(LEASE_ID_SIZE)


def window(
    quota: int, multiple: int = 1, unit: str = "minute", *, of: str = "caller", scope: str = "p"
) -> Counter:
    """A window's counter."""
    return Counter(of, scope, Window(quota, multiple, unit))


def metered(
    quota: int, multiple: int = 1, *, counts: str = "tokens", of: str = "caller", scope: str = "p"
) -> Counter:
    """The counter of a window of so many minutes that counts a metered unit."""
    return Counter(of, f"{scope}:{counts}", Window(quota, multiple, "minute", counts))


def slots(limit: int, *, lease: float = 30.0, of: str = "caller", scope: str = "p") -> Counter:
    """A slot set's counter."""
    return Counter(of, scope, Slots(limit, lease_seconds=lease))


def daily(amount: int, *, timezone: str = "UTC", currency: str = "USD", of: str = "caller") -> Counter:
    """The counter of what may be spent in a day."""
    return Counter(of, "p", Allowance(amount, "daily", currency, timezone))


def monthly(amount: int, *, timezone: str = "UTC", currency: str = "USD", of: str = "caller") -> Counter:
    """The counter of what may be spent in a month."""
    return Counter(of, "p", Allowance(amount, "monthly", currency, timezone))


async def eventually(holds: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> float:
    """Wait until a condition holds; how many seconds that took. Fails where it never does.

    Not counted is by how much the machine, busy with something else, let this process sleep too long.
    """
    start, late = time.monotonic(), 0.0
    while not await holds():
        asleep = time.monotonic()
        assert asleep < start + late + seconds, "it never came true"
        await asyncio.sleep(TICK)
        too_long = time.monotonic() - asleep - TICK
        late += too_long if too_long > TICK else 0
    return time.monotonic() - start - late


class Waits:
    """Longest wait of the requests, and the lateness of this process meanwhile, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.late = 0.0

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """The wait of one request."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.longest = max(self.longest, time.monotonic() - start)

    async def pause(self, seconds: float) -> None:
        """Sleep, and note by how much it was too long, where that is more than a tick."""
        start = time.monotonic()
        await asyncio.sleep(seconds)
        too_long = time.monotonic() - start - seconds
        self.late += too_long if too_long > TICK else 0

    @asynccontextmanager
    async def measured(self) -> AsyncIterator[None]:
        """Note all the while by how much this process is late."""

        async def pause() -> None:
            while True:
                await self.pause(TICK)

        pausing = asyncio.create_task(pause())
        try:
            yield
        finally:
            pausing.cancel()


async def ticks(seconds: float) -> None:
    """Let so many seconds pass, by a clock that stands still while this process doesn't get to run."""
    for _ in range(round(seconds / TICK)):
        await asyncio.sleep(TICK)
