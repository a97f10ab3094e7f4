"""Rules that only a server shows: lives and sizes of keys, foreign keys, full memory, its own clock."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.periods import KEPT_AFTER_END
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import BudgetStatus, WindowStatus
from tests.support.conformance import (
    STORES,
    Bench,
    SharedServer,
    daily,
    instant,
    monthly,
    new_id,
    opened,
    slots,
    window,
)
from tests.support.servers import StoreServer
from tests.support.statuses import acquired

PARTITION = "key:0123456789abcdef0123456789abcdef"


@pytest.fixture(params=STORES)
async def bench(request: pytest.FixtureRequest, shared_server: SharedServer) -> AsyncIterator[Bench]:
    """A backend on each kind of server in turn, without any counts."""
    async with opened(request.param, shared_server) as bench:
        yield bench


@pytest.fixture
def client(bench: Bench) -> redis.Redis:
    """A client of the server, for looking at what the backend has stored."""
    assert isinstance(bench.server, StoreServer)
    return bench.server.client()


def lives(client: redis.Redis) -> dict[str, float]:
    """Seconds that each key has to live."""
    with client:
        return {key.decode(): client.pttl(key) / 1000 for key in client.scan_iter(count=1000)}


async def test_every_key_lives_as_long_as_it_counts_and_not_much_longer(
    bench: Bench, client: redis.Redis
) -> None:
    """Each key has a life from its first write on: nothing is left behind, nothing forgotten too early."""
    end_of_day = (instant("2026-11-22T00:00:00+00:00") - bench.clock.now + KEPT_AFTER_END) / SECOND
    end_of_month = (instant("2026-12-01T00:00:00+00:00") - bench.clock.now + KEPT_AFTER_END) / SECOND
    counters = [window(5), window(2_000, 1, "hour"), slots(5, lease=30), daily(100), monthly(500)]
    reservation = (await bench.acquire(*counters, price=10)).reservation
    day = 86_400
    spans = {
        "w:p:60": (60, 68),
        "w:p:3600": (3_600, 4_051),
        "s:p": (30, 63),
        "b:USD:2026-11-21": (end_of_day - 2, end_of_day),
        "b:USD:2026-11": (end_of_month - 2, end_of_month),
        f"r:{reservation.id.hex()}": (end_of_month - 2, end_of_month),
    }

    def check() -> None:
        found = lives(client)
        assert set(found) == {f"ratelimit:{{caller}}:{name}" for name in spans}
        for name, (least, most) in spans.items():
            assert least <= found[f"ratelimit:{{caller}}:{name}"] <= most

    check()
    await bench.backend.renew(reservation, 30)
    check()
    await bench.backend.settle(reservation, 5)
    spans[f"r:{reservation.id.hex()}"] = (day - 2, day)  # nobody can replace the amount for longer
    for _ in range(3):
        await bench.acquire(window(5), window(2_000, 1, "hour"))
    await bench.acquire(*counters, cost=9)  # refused
    check()
    bench.wait(-10)
    await bench.acquire(window(5), window(2_000, 1, "hour"))
    check()
    await bench.backend.renew(reservation, 600)
    spans["s:p"] = (600, 1_203)
    check()
    await bench.backend.finish(reservation, EstimateAction.KEEP)
    del spans["s:p"], spans[f"r:{reservation.id.hex()}"]
    check()


async def test_a_busy_window_is_kept_alive(bench: Bench, client: redis.Redis) -> None:
    """The life of a window in steady use is renewed in time, however long it is used."""
    with client:
        for _ in range(30):
            await bench.acquire(window(30))
            client.pexpire("ratelimit:{caller}:w:p:60", 1_000)
            bench.wait(8)
            await bench.acquire(window(30))
            assert client.pttl("ratelimit:{caller}:w:p:60") > 60_000


SPARE = 16
"""Bytes by which an allocator, such as libc's, may give more than was asked for."""


def size_of(client: redis.Redis) -> int:
    """Bytes of memory of the only key."""
    with client:
        (key,) = client.scan_iter(count=1000)
        return int(client.memory_usage(key, samples=0) or 0)


@pytest.mark.parametrize("quota", [1, 3, 60, 1_000])
async def test_a_remembered_request_takes_24_bytes_at_most(
    bench: Bench, client: redis.Redis, quota: int
) -> None:
    """And 200 for the key: while the log fills, when it is full, and when a full one has emptied."""
    counter = window(quota, of=PARTITION)
    for number in range(1, quota + 1):
        bench.wait(microseconds=1)
        await bench.acquire(counter)
        if number < 40 or number % 50 == 0:
            assert size_of(client) <= 24 * number + 200 + SPARE
    if quota == 1_000:
        assert size_of(client) / quota <= 15
    bench.wait(60, microseconds=-quota // 2)
    left = (await bench.used(counter))[0]
    assert (await bench.acquire(counter)).admitted == (left < quota)
    assert size_of(client) <= 24 * max(left, 1) + 224
    bench.wait(60)
    await bench.acquire(counter)
    assert size_of(client) <= 224


@pytest.mark.parametrize("quota", [1_001, 1_000_000])
async def test_a_caller_takes_24_kilobytes_at_most(bench: Bench, client: redis.Redis, quota: int) -> None:
    """A caller takes 24 kB at most, also if its quota was raised past where requests share entries."""
    small, large = window(1_000, of=PARTITION), window(quota, of=PARTITION)
    for _ in range(1_000):
        bench.wait(microseconds=1)
        await bench.acquire(small)
    for _ in range(1_100):
        bench.wait(microseconds=59_999)
        await bench.acquire(large)
        if bench.clock.now % 9 == 0:
            assert size_of(client) <= 24 * 1024 + 200
    for _ in range(1_100):
        bench.wait(microseconds=30_001)
        await bench.acquire(large)
    assert size_of(client) <= 24 * 1024


NAMES = [
    "plain",
    "{brace",
    "brace}",
    "{}",
    "{a}{b}",
    "%7B",
    "*",
    "?[a-z]",
    "line\nbreak\r\n",
    "ключ 鍵 🔑",
    "\0",
    "a:b",
    "\udc80",
    "x" * 5_000,
]


@pytest.mark.parametrize("kept", [1, 9])
async def test_what_is_given_back_again_and_again_takes_no_room(
    bench: Bench, client: redis.Redis, kept: int
) -> None:
    """A window has room for what its quota needs, and counts that, however many charges were undone."""
    requests = window(10, 1, "hour", of=PARTITION)
    backend: Any = bench.backend
    for turn in range(300):
        bench.wait(microseconds=1000)
        outcome = await bench.acquire(requests)
        assert outcome.admitted
        if turn % 30 or turn >= 30 * kept:
            backend.give_back(Charge([requests]), outcome.reservation, [outcome.now])
    assert await bench.used(requests) == [kept]
    [key] = client.keys("*:w:*")
    assert client.strlen(key) <= 108 + 12 * 10
    bench.wait(3599.7)  # a millisecond less than an hour after the first
    assert await bench.used(requests) == [kept]
    bench.wait(0.001)
    assert await bench.used(requests) == [kept - 1]


async def test_partitions_of_any_text_are_counted_apart(bench: Bench, client: redis.Redis) -> None:
    """Braces, wildcards, line breaks, any script: one caller, one count, one hash tag."""
    for number, name in enumerate(NAMES, 1):
        counters = [window(99, of=name), slots(99, of=name), daily(999, of=name)]
        outcomes = [await bench.acquire(*counters, price=1) for _ in range(number)]
        assert outcomes[-1].used(0) == outcomes[-1].used(1) == number
        await bench.backend.finish(outcomes[0].reservation, EstimateAction.GIVE_BACK)
    for number, name in enumerate(NAMES, 1):
        counters = [window(99, of=name), slots(99, of=name), daily(999, of=name)]
        answer = await bench.peek(*counters)
        assert (answer.used(0), answer.used(1), answer.held(2)) == (number, number - 1, number - 1)
    with client:
        keys = list(client.scan_iter(count=1000))
    tags = {key[key.index(b"{") : key.index(b"}")] for key in keys}
    assert len(tags) == len(NAMES)


@pytest.mark.parametrize("cost", [2**32, 2**53 + 1, 10**400, float("inf")])
async def test_a_cost_above_what_the_script_takes_never_fits(bench: Bench, cost: float) -> None:
    """A cost of any size is refused like any other that is larger than the limit, and charges nothing."""
    await bench.acquire(window(5))
    assert not (await bench.acquire(window(5), cost=cost)).admitted  # type: ignore[arg-type]
    assert await bench.used(window(5)) == [1]


@pytest.mark.parametrize("cost", [0, -1, 1.5, float("nan"), float("-inf")])
async def test_the_script_refuses_what_is_no_cost(bench: Bench, cost: float) -> None:
    """A cost that is not a whole number from 1 fails, whatever let it through, and frees nothing."""
    await bench.acquire(window(5))
    with pytest.raises(BackendError):
        await bench.acquire(window(5), cost=cost)  # type: ignore[arg-type]
    assert await bench.used(window(5)) == [1]


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf"), 2**54])
async def test_the_script_refuses_what_is_no_price(bench: Bench, price: float) -> None:
    """The script refuses invalid prices and settled amounts, and counts nothing of them."""
    reservation = await bench.reserve(daily(500), price=5)
    with pytest.raises(BackendError):
        await bench.acquire(daily(500), price=price)  # type: ignore[arg-type]
    with pytest.raises(BackendError):
        await bench.backend.settle(reservation, price)  # type: ignore[arg-type]
    assert (await bench.peek(daily(500))).statuses == [BudgetStatus(0, 5, is_short=False)]


async def test_the_servers_own_clock_decides(bench: Bench) -> None:
    """Without a clock of the test's, times are the server's: to the microsecond, of every kind of limit."""
    assert isinstance(bench.server, StoreServer)
    backend = bench.on_clock(None)
    charge = Charge([window(5), slots(5), daily(50), monthly(50)])
    reservation = NO_RESERVATION
    with bench.server.client() as client:
        for used in (1, 2, 3):
            before = client.time()
            outcome = await acquired(backend, charge, new_id(), 10)
            reservation = outcome.reservation
            after = client.time()
            assert outcome.admitted
            assert before[0] * SECOND + before[1] <= outcome.now <= after[0] * SECOND + after[1]
            assert outcome.counted == [used, used, 0, 0]
            assert await backend.renew(reservation, 3)
    assert await backend.settle(reservation, 7) is Settlement.SETTLED


MIDNIGHT = instant("2026-11-22T00:00:00+00:00")


async def test_the_servers_clock_picks_the_period(bench: Bench) -> None:
    """A worker that still takes the old day for today is told so and asks again: no charge counts twice."""
    times = itertools.chain([MIDNIGHT - 1], itertools.repeat(MIDNIGHT))
    backend = bench.on_clock(lambda: next(times))
    outcome = await acquired(backend, Charge([window(5), slots(5), daily(100)]), new_id(), 60)
    assert outcome.admitted
    assert outcome.now == MIDNIGHT
    assert [held.scope for held in outcome.reservation.periods] == ["USD:2026-11-22"]
    assert outcome.counted == [1, 1, 0]
    await backend.finish(outcome.reservation, EstimateAction.KEEP)
    bench.clock.now = MIDNIGHT
    assert await bench.used(daily(100), slots(5)) == [60, 0]
    bench.clock.now = MIDNIGHT - 1
    assert await bench.used(daily(100)) == [0]


async def test_a_clock_that_runs_to_and_fro_charges_nothing(bench: Bench) -> None:
    """A charge fails, and nothing of it stays, if worker and server never agree on the day."""
    times = itertools.cycle([MIDNIGHT - 1, MIDNIGHT])
    backend = bench.on_clock(lambda: next(times))
    await backend.open()  # which takes one of them
    with pytest.raises(BackendError):
        await backend.acquire(Charge([window(5), daily(100)]), new_id(), 60)
    bench.clock.now = MIDNIGHT
    assert (await bench.peek(window(5), daily(100))).statuses == [
        WindowStatus(0, 0, 0),
        BudgetStatus(0, 0, is_short=False),
    ]
