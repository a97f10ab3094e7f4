"""Stored values that can't be true: each is mended within a window, and lets nobody have more for longer."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID
from ratelimit_mw._internal.model.status import BudgetStatus, WindowStatus
from tests.support.conformance import (
    STORES,
    Bench,
    SharedServer,
    daily,
    monthly,
    new_id,
    opened,
    slots,
    window,
)
from tests.support.servers import StoreServer

HEADER = 48
"""Bytes of a window's header; its stage of five entries and its ring follow."""
HUGE = b"\x00\x00\x00\x00\x00\x00\x60\x43"  # 2^55, as a double
NAN = b"\x00\x00\x00\x00\x00\x00\xf8\x7f"
INFINITE = b"\x00\x00\x00\x00\x00\x00\xf0\x7f"
NEGATIVE = b"\x00\x00\x00\x00\x00\x00\x59\xc0"  # -100
PART = b"\x00\x00\x00\x00\x00\x00\xe0\x3f"  # 0.5


@pytest.fixture(params=STORES)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """A backend on each kind of server in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench


@pytest.fixture
def client(bench: Bench) -> redis.Redis:
    """A client of the server, to damage what the backend has stored."""
    assert isinstance(bench.server, StoreServer)
    return bench.server.client()


@dataclass
class Case:
    """A caller whose window is damaged, and what was admitted since the test began."""

    counter: Counter
    spoil: Callable[[redis.Redis, bytes], Any]
    admitted: list[tuple[int, int]] = field(default_factory=list)
    """Time, in microseconds, and cost of each admitted charge."""

    @property
    def key(self) -> bytes:
        """The key of the window."""
        assert isinstance(self.counter.limit, Window)
        return f"ratelimit:{{{self.counter.partition}}}:w:p:{self.counter.limit.seconds}".encode()

    def used(self, now: int, since: int = 0) -> int:
        """Units admitted within the last window, of those since a time."""
        assert isinstance(self.counter.limit, Window)
        horizon = max(now - self.counter.limit.length, since - 1)
        return sum([cost for at, cost in self.admitted if at > horizon])


def changed(offset: int, flip: int) -> Callable[[redis.Redis, bytes], Any]:
    """Return a function that changes one byte of a key, if the key has that many."""

    def spoil(client: redis.Redis, key: bytes) -> None:
        stored: Any = client.get(key)
        if offset < len(stored):
            client.setrange(key, offset, bytes([stored[offset] ^ flip]))

    return spoil


def put(offset: int, value: bytes) -> Callable[[redis.Redis, bytes], Any]:
    """Return a function that overwrites a part of a key."""
    return lambda client, key: client.setrange(key, offset, value)


def replaced(value: bytes) -> Callable[[redis.Redis, bytes], Any]:
    """Return a function that puts something else in place of a key."""
    return lambda client, key: client.set(key, value)


def listed(client: redis.Redis, key: bytes) -> None:
    """Put a key of another type in place of one."""
    client.delete(key)
    client.rpush(key, "x")


def unchecked(case: Case, cost: int, admitted: bool) -> None:
    """Accept any decision."""


class Traffic:
    """Callers who ask at the same times, each at its own cost."""

    def __init__(self, bench: Bench, cases: Sequence[Case], costs: Sequence[int], seed: int) -> None:
        self.bench = bench
        self.cases = cases
        self.costs = costs
        self.random = random.Random(seed)

    async def drive(self, windows: float, check: Callable[[Case, int, bool], None], *, every: float) -> None:
        """Ask for so many windows, at `every` of one on average; some of it in bursts."""
        limit: Any = self.cases[0].counter.limit
        end = self.bench.clock.now + round(windows * limit.length)
        backend = self.bench.backend
        while self.bench.clock.now < end:
            step = self.random.choice([0, 0.2, 0.5, 1, 1, 1.5, 3]) * every
            self.bench.clock.now += max(round(step * limit.length), 1)
            asked = [(case, self.random.choice(self.costs)) for case in self.cases]
            if self.random.random() < 0.3:  # some share a key with another of their call
                asked += [(case, self.random.choice(self.costs)) for case in self.cases]
                self.random.shuffle(asked)
            outcomes = await asyncio.gather(
                *[backend.acquire(Charge([case.counter], cost), NO_LEASE_ID) for case, cost in asked]
            )
            for (case, cost), outcome in zip(asked, outcomes, strict=True):
                check(case, cost, outcome.admitted)
                if outcome.admitted:
                    case.admitted.append((self.bench.clock.now, cost))


HEADER_BYTES = [changed(offset, flip) for offset in range(HEADER) for flip in (0x01, 0x80, 0xFF)]
ENTRY_BYTES = [changed(offset, flip) for offset in range(HEADER, 300, 7) for flip in (0x03, 0xFF)]
NUMBERS = [
    put(offset, value)
    for offset in range(0, 32, 8)
    for value in (NAN, INFINITE, NEGATIVE, HUGE, PART, bytes(8))
]
GARBAGE = [
    replaced(b"x"),
    replaced(b"not a window"),
    replaced(bytes(48)),
    replaced(b"\xff" * 48),
    replaced(b"\xff" * 108),
    replaced(b"\xff" * 5_000),
    replaced(b"\x7f" * 300),
    listed,
]


@pytest.mark.parametrize(
    ("quota", "costs", "every"),
    [(5, [1], 0.09), (5, [1, 1, 3], 0.3), (40, [2, 3], 0.05), (3_000, [100, 300], 0.05)],
    ids=["small", "sparse", "ring", "granules"],
)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_damaged_window_counts_right_again_a_window_later(
    bench: Bench, client: redis.Redis, quota: int, costs: list[int], every: float, seed: int
) -> None:
    """A damaged window admits neither more nor less than its limit, one window after the next request."""
    spoils = [*HEADER_BYTES, *NUMBERS, *ENTRY_BYTES]
    cases = [Case(window(quota, of=f"caller {seed} {place}"), spoil) for place, spoil in enumerate(spoils)]
    traffic = Traffic(bench, cases, costs, seed)
    await traffic.drive(2.3, unchecked, every=every)
    with client:
        for case in cases:
            case.spoil(client, case.key)
    damaged = bench.clock.now
    await traffic.drive(0.0001, unchecked, every=every)
    healed = bench.clock.now + 60 * SECOND

    def check(case: Case, cost: int, admitted: bool) -> None:
        now, what = (
            bench.clock.now,
            f"{case.counter.partition} after {(bench.clock.now - damaged) / SECOND} s",
        )
        used = case.used(now)
        if admitted:
            assert used + cost <= 2 * quota, what
            assert now < healed or case.used(now, healed) + cost <= quota, what
        elif now >= healed:
            exact = used if quota <= 1_000 else case.used(now - 60_000)
            assert max(used, exact) + cost > quota, what

    await traffic.drive(3, check, every=every)
    assert bench.backend.load.mended > 0
    assert bench.backend.load.failed == 0


@pytest.mark.parametrize("quota", [5, 3_000])
async def test_what_is_no_window_becomes_a_full_one(bench: Bench, client: redis.Redis, quota: int) -> None:
    """A key that tells nothing of its window is full for a window's length, and then as any other."""
    cases = [Case(window(quota, of=f"caller {place}"), spoil) for place, spoil in enumerate(GARBAGE)]
    with client:
        for case in cases:
            await bench.acquire(case.counter)
            case.spoil(client, case.key)
        for case in cases:
            if case is not cases[2]:  # zeros are an empty one
                outcome = await bench.acquire(case.counter)
                assert not outcome.admitted
                assert outcome.statuses == [WindowStatus(quota, 60 * SECOND, 60 * SECOND)]
        assert bench.backend.load.mended == len(cases) - 1
        bench.wait(60, microseconds=-1)
        assert not (await bench.acquire(cases[0].counter)).admitted
        bench.wait(microseconds=1)
        for case in cases:
            assert (await bench.acquire(case.counter)).admitted
            assert 0 < client.pttl(case.key) < 68_000


SPOILT_PERIODS = [
    put(0, NAN),
    put(0, NEGATIVE),
    put(0, INFINITE),
    put(0, HUGE),
    put(0, PART),
    put(8, NAN),
    put(8, NEGATIVE),
    put(8, INFINITE),
    put(8, HUGE),
    replaced(b"short"),
    replaced(b"\xff" * 40),
    listed,
]


@pytest.mark.parametrize("spoil", SPOILT_PERIODS)
@pytest.mark.parametrize("first", ["acquire", "peek", "settle", "finish"])
async def test_a_damaged_period_is_spent_until_it_ends(
    bench: Bench, client: redis.Redis, spoil: Callable[[redis.Redis, bytes], Any], first: str
) -> None:
    """A day whose amounts are lost can't be spent any more; the next day, and the month, count."""
    reservation = await bench.reserve(daily(100), monthly(500), price=40)
    with client:
        spoil(client, b"ratelimit:{caller}:b:USD:2026-11-21")
        if first == "settle":
            assert await bench.backend.settle(reservation, 30) is Settlement.SETTLED
        elif first == "finish":
            await bench.backend.finish(reservation, EstimateAction.KEEP)
        elif first == "peek":
            assert await bench.used(daily(100)) == [100]
        assert not (await bench.acquire(daily(100), price=1)).admitted
        assert await bench.used(daily(100)) == [100]
        assert bench.backend.load.mended == 1
        assert (await bench.acquire(monthly(500), price=1)).admitted
        bench.wait(12 * 3600)
        assert (await bench.acquire(daily(100), monthly(500), price=100)).admitted
    assert bench.backend.load.failed == 0


@pytest.mark.parametrize(
    "spoil",
    [put(0, NAN), put(0, NEGATIVE), put(8, NAN), put(8, NEGATIVE), put(8, PART), replaced(b"x"), listed],
)
async def test_a_damaged_record_can_be_settled_and_ended(
    bench: Bench, client: redis.Redis, spoil: Callable[[redis.Redis, bytes], Any]
) -> None:
    """The actual price is charged all the same, in full; the estimate, which is lost, stays held."""
    settled, ended = await bench.reserve(daily(500), price=40), await bench.reserve(daily(500), price=40)
    with client:
        for reservation in (settled, ended):
            spoil(client, f"ratelimit:{{caller}}:r:{reservation.id.hex()}".encode())
        assert await bench.backend.settle(settled, 30) is Settlement.SETTLED
        assert client.pttl(f"ratelimit:{{caller}}:r:{settled.id.hex()}") > 3_600_000
        assert await bench.backend.settle(settled, 30) is Settlement.REPEATED
        await bench.backend.finish(ended, EstimateAction.GIVE_BACK)
        assert (await bench.peek(daily(500))).statuses == [BudgetStatus(30, 80, is_short=False)]
        assert await bench.backend.settle(ended, 30) is Settlement.UNKNOWN
    assert bench.backend.load.mended == 2
    assert bench.backend.load.failed == 0


@pytest.mark.parametrize("score", ["inf", 1e300, 9e15])
async def test_a_slot_that_never_ends_ends_a_lease_later(
    bench: Bench, client: redis.Redis, score: str | float
) -> None:
    """A lease that is longer than any can be blocks its slot for one lease more, and no longer."""
    await bench.reserve(slots(2))
    with client:
        client.zadd("ratelimit:{caller}:s:p", {new_id(): score})
    bench.wait(1)
    assert not (await bench.acquire(slots(2))).admitted
    assert bench.backend.load.mended == 1
    bench.wait(30, microseconds=-1)
    assert await bench.used(slots(2)) == [1]
    bench.wait(microseconds=1)
    assert await bench.used(slots(2)) == [0]
    await bench.reserve(slots(2))
    await bench.reserve(slots(2))
    assert not (await bench.acquire(slots(2))).admitted


@pytest.mark.parametrize("first", ["acquire", "peek", "renew", "finish"])
async def test_what_is_no_slot_set_is_dropped(bench: Bench, client: redis.Redis, first: str) -> None:
    """Slots whose set has become something else are lost, as with any other data; nothing else is."""
    reservation = await bench.reserve(slots(2), slots(2, of="app"), window(5))
    with client:
        client.set("ratelimit:{caller}:s:p", "x")
        if first == "renew":
            assert not await bench.backend.renew(reservation, 30)
        elif first == "finish":
            await bench.backend.finish(reservation, EstimateAction.KEEP)
            assert await bench.used(slots(2, of="app")) == [0]
        elif first == "peek":
            assert await bench.used(slots(2)) == [0]
        assert (await bench.acquire(slots(2), slots(2, of="app"), window(5))).admitted
        assert await bench.used(slots(2), window(5)) == [1, 2]
        assert client.type("ratelimit:{caller}:s:p") == b"zset"
    assert bench.backend.load.mended == 1
    assert bench.backend.load.failed == 0


async def test_damage_is_logged_once_a_minute(
    bench: Bench, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The first is named, the others are counted."""
    with client:
        for place in range(3):
            client.set(f"ratelimit:{{caller {place}}}:w:p:60", "x")
            await bench.acquire(window(5, of=f"caller {place}"))
    (line,) = [record for record in caplog.records if "damaged" in record.message]
    assert "'ratelimit:{caller 0}:w:p:60'" in line.message
    assert bench.backend.load.mended == 3


async def test_several_damaged_keys_of_a_batch_are_each_mended(bench: Bench, client: redis.Redis) -> None:
    """Charges that share damaged windows, slots and periods are decided as if they came one by one."""
    found = [window(5), window(5, 1, "hour"), slots(9, of="app"), daily(90)]
    await bench.acquire(*found, price=1)
    with client:
        client.setrange("ratelimit:{caller}:w:p:60", 0, NAN)
        client.setrange("ratelimit:{caller}:w:p:3600", 44, b"\xff\xff\xff\xff")
        client.set("ratelimit:{app}:s:p", "x")
    both = [bench.acquire(*found, price=1), bench.acquire(*found[:3]), bench.acquire(window(5))]
    assert [outcome.admitted for outcome in await asyncio.gather(*both)] == [True] * 3
    assert await bench.used(*found) == [4, 3, 2, 0]
    assert bench.backend.load.failed == 0
