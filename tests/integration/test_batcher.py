"""Group commit: how many calls reach the server, and that those who share one never touch each other."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator

import pytest
import redis

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.backlog import MAX_BATCH, MAX_QUEUE
from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.outcome import Outcome
from tests.conftest import StartServer
from tests.support.conformance import daily, eventually, new_id, slots, window
from tests.support.servers import StoreServer
from tests.support.statuses import peeked

pytestmark = pytest.mark.rerun


@pytest.fixture
async def backend(server: StoreServer) -> AsyncIterator[RedisBackend]:
    """A connected backend on each kind of server."""
    backend = RedisBackend(server.url, timeout=5)
    await backend.open()
    yield backend
    await backend.close()


def script_calls(server: StoreServer) -> int:
    """Return the number of calls of a script on the server so far."""
    with server.client() as client:
        stats = client.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


def charge_of(number: int) -> Charge:
    """A charge on several limits of one of some callers, and on one that everyone shares."""
    of = f"caller {number % 50}"
    return Charge([window(9_999, of=of), slots(9_999, of=of), daily(9_999, of=of), window(9_999, of="app")])


@pytest.mark.parametrize("number", [1, 2, MAX_BATCH])
async def test_charges_of_one_moment_share_one_call(
    server: StoreServer, backend: RedisBackend, number: int
) -> None:
    """Up to a full batch, whatever comes in one turn of the event loop costs one call and one round trip."""
    before = script_calls(server)
    await asyncio.gather(*[backend.acquire(charge_of(i), new_id(), 1) for i in range(number)])
    assert script_calls(server) - before == 1


@pytest.mark.parametrize("number", [MAX_BATCH + 1, 300, 2_000])
async def test_more_than_a_batch_costs_no_call_too_many(
    server: StoreServer, backend: RedisBackend, number: int
) -> None:
    """Beyond one batch there are as many calls as full batches, and two at most."""
    before = script_calls(server)
    await asyncio.gather(*[backend.acquire(charge_of(i), new_id(), 1) for i in range(number)])
    assert script_calls(server) - before <= number / MAX_BATCH + 2


async def test_releases_renewals_and_settles_ride_along(server: StoreServer, backend: RedisBackend) -> None:
    """Releases, renewals and settles add no call to one that is made anyway."""
    outcomes = await asyncio.gather(*[backend.acquire(charge_of(i), new_id(), 1) for i in range(3)])
    before = script_calls(server)
    released, renewed, settled = (outcome.reservation for outcome in outcomes)

    async def release() -> None:
        await backend.finish(released, EstimateAction.KEEP)

    async def settle() -> None:
        await backend.settle(settled, 3)

    await asyncio.gather(
        release(),
        backend.renew(renewed, 30),
        settle(),
        backend.acquire(charge_of(0), new_id(), 1),
        backend.peek(charge_of(1), 1),
        backend.reset(Charge([window(5, of="other")])),
    )
    assert script_calls(server) - before == 1


async def test_only_renewals_that_nobody_waits_for_are_upkeep(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals of running requests are upkeep; those of a detaching handler or a resuming worker are not."""
    reservation = (await backend.acquire(Charge([slots(5)]), new_id())).reservation
    sent: list[bool] = []
    batcher = backend.loops.senders[asyncio.get_running_loop()]
    submit = batcher.submit

    def noting(operation: Operation) -> None:
        sent.append(operation.is_upkeep)
        submit(operation)

    monkeypatch.setattr(batcher, "submit", noting)
    await backend.renew(reservation, 30)
    await backend.renew_all([(reservation, 30)])
    await backend.finish(reservation, EstimateAction.KEEP)
    assert sent == [False, True, False]


async def test_cancelled_before_it_left_it_never_leaves(server: StoreServer, backend: RedisBackend) -> None:
    """A request that is cancelled in the turn in which it came costs the server nothing."""
    before = script_calls(server)
    task = asyncio.ensure_future(backend.acquire(charge_of(0), new_id(), 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script_calls(server) == before


async def test_an_answer_never_reaches_another_caller(backend: RedisBackend) -> None:
    """Thousands of cancellations at any point mix no answers up: each caller sees its own figures."""
    chance = random.Random(11)
    callers = 300
    for number in range(callers):
        await backend.acquire(Charge([window(10_000, of=f"caller {number}")], cost=number + 1), new_id())

    async def look(number: int) -> None:
        await asyncio.sleep(chance.random() * 0.05)
        mine = window(10_000, of=f"caller {number}")
        noise: list[Counter] = [slots(9, of="noise"), daily(9, of="noise"), window(9, of="noise")]
        before = noise[: chance.randint(0, 3)]
        after = noise[: chance.randint(0, 3)]
        outcome = await backend.peek(Charge([*before, mine, *after]))
        assert outcome.used(len(before)) == number + 1

    results: list[object] = []
    for _ in range(4):
        tasks = [asyncio.ensure_future(look(chance.randrange(callers))) for _ in range(1_500)]
        for task in chance.sample(tasks, 700):
            asyncio.get_running_loop().call_later(chance.random() * 0.06, task.cancel)
        results += await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert cancelled + sum(result is None for result in results) == len(results)
    assert cancelled > 700


async def test_a_cancelled_charge_leaves_nothing(backend: RedisBackend) -> None:
    """Cancelled at whatever point, a charge is given back: its slot, its units and its money."""
    chance = random.Random(5)
    counters = [window(99_999), window(99_999, 1, "hour"), slots(99_999), daily(99_999)]
    tasks = []
    for number in range(600):
        task = asyncio.ensure_future(backend.acquire(Charge(counters), new_id(), 1))
        tasks.append(task)
        if number % 3:
            asyncio.get_running_loop().call_later(chance.random() * 0.02, task.cancel)
        await asyncio.sleep(chance.choice([0, 0, 0.001]))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = sum(isinstance(result, Outcome) for result in results)
    assert 200 <= kept < 600

    async def balanced() -> bool:
        answer = await peeked(backend, Charge(counters))
        return [*answer.counted[:3], answer.held(3)] == [kept] * 4

    await eventually(balanced)


async def test_units_given_back_make_room_at_once(backend: RedisBackend) -> None:
    """Of a charge that was cancelled in flight nothing is left to wait for."""
    charge = Charge([window(5), window(5_000)], cost=5)
    for _ in range(20):
        task = asyncio.ensure_future(backend.acquire(charge, new_id()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has left
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        async def nothing_is_left() -> bool:
            return [each[:2] for each in (await peeked(backend, charge)).statuses] == [(0, 0), (0, 0)]

        await eventually(nothing_is_left)


async def test_a_busy_loop_is_not_taken_for_a_dead_server(server: StoreServer) -> None:
    """An answer that waits to be read counts, though this process was away longer than the time-out."""
    backend = RedisBackend(server.url, timeout=0.1)
    await backend.open()
    for _ in range(3):
        task = asyncio.ensure_future(backend.acquire(charge_of(0), new_id()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(1)  # noqa: ASYNC251 - the pause is what is tested; a busy server has answered by then
        assert (await task).admitted
    await backend.close()


def test_one_backend_serves_one_event_loop_after_the_other(server: StoreServer) -> None:
    """Connections belong to a loop: the next one gets its own, and the counts are the server's."""
    backend = RedisBackend(server.url, timeout=5)

    async def one() -> int:
        outcome = await backend.acquire(Charge([window(9)]), new_id())
        await backend.close()
        return outcome.used(0)

    assert [asyncio.run(one()) for _ in range(3)] == [1, 2, 3]
    assert len(backend.loops.senders) == 0


def test_one_backend_serves_event_loops_in_several_threads(server: StoreServer) -> None:
    """Loops that run side by side share the counts, and nothing else."""
    backend = RedisBackend(server.url, timeout=5)
    charge = Charge([window(100), slots(999), daily(9_999)])
    admitted: list[int] = []

    async def many() -> None:
        outcomes: list[Outcome] = []
        for _ in range(10):
            outcomes += await asyncio.gather(*[backend.acquire(charge, new_id(), 1) for _ in range(6)])
        admitted.append(sum(outcome.admitted for outcome in outcomes))
        await backend.close()

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 4
    assert sum(admitted) == 100


async def test_a_backend_can_be_opened_again(backend: RedisBackend) -> None:
    """Closing ends the connection, not the backend."""
    for used in (1, 2):
        assert (await backend.acquire(Charge([window(9)]), new_id())).used(0) == used
        await backend.close()


async def test_one_too_many_is_refused_at_once(kind: str, start_server: StartServer) -> None:
    """The queue is bounded: beyond it a charge fails without waiting, and those in it are answered."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=5)
    await backend.open()
    server.stop_signal()
    charge = Charge([window(99_999)])
    tasks = [asyncio.ensure_future(backend.acquire(charge, new_id())) for _ in range(MAX_QUEUE + 40)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [index for index, task in enumerate(tasks) if task.done()] == list(
        range(MAX_QUEUE, MAX_QUEUE + 40)
    )
    server.continue_signal()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, Outcome) for result in results) == MAX_QUEUE
    assert sum(isinstance(result, BackendError) for result in results) == 40
    await backend.close()


async def test_the_script_is_loaded_again_where_it_was_forgotten(
    server: StoreServer, backend: RedisBackend
) -> None:
    """SCRIPT FLUSH under load costs a few calls more, and neither an error nor a charge too many."""
    charge = Charge([window(99_999), slots(99_999)])
    flushing = True

    def flush() -> None:
        with redis.Redis.from_url(server.url) as client:
            while flushing:
                client.script_flush()
                time.sleep(0.005)

    thread = threading.Thread(target=flush)
    thread.start()
    outcomes: list[Outcome] = []
    for _ in range(60):
        outcomes += await asyncio.gather(*[backend.acquire(charge, new_id()) for _ in range(100)])
    flushing = False
    await asyncio.to_thread(thread.join)
    assert all(outcome.admitted for outcome in outcomes)
    assert (await peeked(backend, charge)).counted == [6_000, 6_000]
    assert backend.error is None
