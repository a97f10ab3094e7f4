"""The connection to a server that dies, hangs, refuses or loses answers: found out in time, mended alone."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis

from ratelimit_mw._internal.backends.connecting.connection import Connection
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.backlog import MAX_BATCH
from ratelimit_mw._internal.backends.redis.loops import CLOSE_TIMEOUT
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import BudgetStatus, WindowStatus
from tests.conftest import StartServer
from tests.support.conformance import daily, eventually, new_id, slots, ticks, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.slots import until, until_async
from tests.support.statuses import answer_of, peeked

pytestmark = pytest.mark.rerun

TIMEOUT = 0.5
SLACK = 0.25
"""Seconds that the end of a wait may come later."""
CHARGE = Charge([window(99_999), slots(99), daily(99)])


@pytest.fixture
def own_server(kind: str, start_server: StartServer) -> StoreServer:
    """A server of each kind, to be ill-treated."""
    return start_server(kind)


@pytest.fixture
async def backend(own_server: StoreServer) -> AsyncIterator[RedisBackend]:
    """A connected backend with a short time-out."""
    backend = RedisBackend(own_server.url, timeout=TIMEOUT)
    await backend.open()
    yield backend
    await backend.close()


async def fails_in_time(operation: Awaitable[object]) -> None:
    """It is a `BackendError`, and no request has waited longer than the time-out."""
    task = asyncio.ensure_future(operation)
    await ticks(TIMEOUT + SLACK)
    assert task.done()
    with pytest.raises(BackendError):
        await task


async def fails_at_once(operation: Awaitable[object]) -> None:
    """It is a `BackendError` before anything could come from elsewhere: the event loop waits for nothing."""
    task = asyncio.ensure_future(operation)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert task.done()
    with pytest.raises(BackendError):
        await task


async def is_there(backend: RedisBackend) -> bool:
    """Whether the server is thought to be there, without asking it."""
    return backend.error is None


async def figures(backend: RedisBackend) -> list[tuple[int, int]]:
    """Used, and for money held, of each of `CHARGE`'s limits; zero for windows' waits."""
    _, active, day = (await peeked(backend, CHARGE)).statuses
    return [active[:2], day[:2]]


async def reserve(backend: RedisBackend) -> Reservation:
    """The reservation of a charge of one slot and ten units of money."""
    return (await backend.acquire(CHARGE, new_id(), 10)).reservation


async def test_a_killed_server_is_found_out_and_found_again(
    own_server: StoreServer, backend: RedisBackend
) -> None:
    """Requests fail in time, then at once; when the server is back that is noticed without a request."""
    assert (await backend.acquire(CHARGE, new_id())).admitted
    own_server.kill()
    await fails_in_time(backend.acquire(CHARGE, new_id()))
    for _ in range(50):
        await fails_at_once(backend.acquire(CHARGE, new_id()))
    own_server.restart()
    assert await eventually(lambda: is_there(backend)) < 2
    assert (await backend.acquire(CHARGE, new_id())).used(0) == 1


async def test_a_server_that_was_never_there(own_server: StoreServer) -> None:
    """Starting without a server is not an error: a request fails in time, and all is well once it is up."""
    own_server.stop()
    backend = RedisBackend(own_server.url, timeout=TIMEOUT)
    opening = asyncio.ensure_future(backend.open())
    await ticks(TIMEOUT + SLACK)
    assert opening.done()
    await fails_in_time(backend.acquire(CHARGE, new_id()))
    own_server.restart()
    assert await eventually(lambda: is_there(backend)) < 2
    assert (await backend.acquire(CHARGE, new_id())).admitted
    await backend.close()


async def test_a_hanging_server_costs_one_time_out(own_server: StoreServer, backend: RedisBackend) -> None:
    """A request that waits when a server stops fails in time, and later ones at once."""
    own_server.stop_signal()
    await asyncio.gather(*[fails_in_time(backend.acquire(CHARGE, new_id())) for _ in range(200)])
    await fails_at_once(backend.acquire(CHARGE, new_id()))
    await asyncio.sleep(0.5)
    assert backend.error is not None
    own_server.continue_signal()
    assert await eventually(lambda: is_there(backend)) < 2
    assert (await backend.acquire(CHARGE, new_id())).admitted


async def test_what_is_owed_arrives_when_the_server_is_back(
    own_server: StoreServer, backend: RedisBackend
) -> None:
    """Releases and settles that met an outage are sent until they arrive, each counted once."""
    released, settled, kept = [await reserve(backend) for _ in range(3)]
    own_server.stop_signal()
    pending = [
        asyncio.ensure_future(backend.settle(settled, 7)),
        asyncio.ensure_future(_await(backend.finish(released, EstimateAction.GIVE_BACK))),
    ]
    with pytest.raises(BackendError):
        await backend.acquire(CHARGE, new_id())
    pending.append(asyncio.ensure_future(_await(backend.finish(kept, EstimateAction.KEEP))))
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in pending)
    own_server.continue_signal()
    results = await asyncio.gather(*pending)
    assert results[0] in {Settlement.SETTLED, Settlement.REPEATED}
    assert await figures(backend) == [(1, 0), (17, 0)]


async def test_a_backlog_of_what_is_owed_is_no_second_outage(
    own_server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """However long it waited, and however long all of it takes, it counts as sent when it is sent."""
    async with Proxy(own_server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=1.5)
        await reserve(backend)
        proxy.refuse()
        with pytest.raises(BackendError):
            await backend.acquire(CHARGE, new_id())
        owed = [
            backend.finish(Reservation(new_id(), CHARGE.slots), EstimateAction.KEEP) for _ in range(2_500)
        ]
        await asyncio.sleep(1.3)
        caplog.clear()
        proxy.fault, proxy.delay = "none", 0.1
        start = time.monotonic()
        await asyncio.gather(*owed)
        assert time.monotonic() - start > 1.5
        assert await figures(backend) == [(1, 0), (0, 10)]
        assert [record.message for record in caplog.records] == ["backend is back"]
        await backend.close()


async def test_a_lost_answer_leaves_neither_slot_nor_money(own_server: StoreServer) -> None:
    """A charge whose answer was lost gives slot and money back; a unit of rate stays counted."""
    async with Proxy(own_server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=TIMEOUT)
        await backend.open()
        kept = await reserve(backend)
        proxy.fault = "drop_replies"
        results = await asyncio.gather(
            *[backend.acquire(CHARGE, new_id(), 10) for _ in range(5)], return_exceptions=True
        )
        assert {type(result) for result in results} == {BackendError}
        with own_server.client() as client:
            until(lambda: client.zcard("ratelimit:{caller}:s:p") == 6)
        proxy.fault = "none"
        proxy.reset()

        async def given_back() -> bool:
            with contextlib.suppress(BackendError):
                return await figures(backend) == [(1, 0), (0, 10)]
            return False

        assert await eventually(given_back) < 2
        assert (await peeked(backend, CHARGE)).used(0) == 6
        assert await backend.renew(kept, 30)
        await backend.close()


async def test_a_cut_connection_mixes_no_answers_up(own_server: StoreServer) -> None:
    """Resets under load cost errors; whoever gets an answer gets its own."""
    async with Proxy(own_server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=5)
        for number in range(20):
            await backend.acquire(Charge([window(99, of=f"caller {number}")], cost=number + 1), new_id())

        async def look(number: int) -> bool:
            with contextlib.suppress(BackendError):
                outcome = await backend.peek(Charge([window(99, of=f"caller {number}")]))
                assert outcome.used(0) == number + 1, "the answer of another"
                return True
            return False

        answers: list[bool] = []
        for turn in range(25):
            # Sooner or later in the traffic: how fast that is depends on the machine.
            pause = asyncio.get_running_loop().call_later(0.0003 * (turn + 1), proxy.reset)
            for _ in range(6):
                answers += await asyncio.gather(*[look(number) for number in range(20)])
            pause.cancel()
            await eventually(lambda: is_there(backend))
            answers += await asyncio.gather(*[look(number) for number in range(20)])
        assert answers.count(True) > 20, "there were hardly any answers"
        assert answers.count(False) > 0, "there were no errors"
        await backend.close()


async def test_closing_without_a_server_ends_every_wait(
    own_server: StoreServer, backend: RedisBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing waits for a bounded time; then what is still owed fails, is reported, and nothing goes on."""
    kept = await reserve(backend)
    own_server.stop_signal()
    lost = asyncio.ensure_future(backend.acquire(CHARGE, new_id(), 10))
    owed = asyncio.ensure_future(_await(backend.finish(kept, EstimateAction.KEEP)))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(backend.close())
    await ticks(CLOSE_TIMEOUT + SLACK)
    assert closing.done()
    for waiting in (lost, owed):
        with pytest.raises(BackendError):
            await waiting
    assert "releases and settles never reached the backend" in caplog.text
    me = {asyncio.current_task()}
    await until_async(lambda: asyncio.all_tasks() == me)


async def test_a_server_busy_with_another_script(
    kind: str, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors for several batches at once are one outage: nobody hangs, and it ends with the script."""
    server = start_server(kind, "--lua-time-limit", "20")
    backend = RedisBackend(server.url, timeout=2)
    await backend.open()
    with server.client() as endless, server.client() as killer:
        thread = threading.Thread(target=_run_for_ever, args=(endless,))
        thread.start()
        until(lambda: _is_busy(killer))
        results = await asyncio.gather(
            *[backend.acquire(CHARGE, new_id()) for _ in range(2 * MAX_BATCH)], return_exceptions=True
        )
        assert {type(result) for result in results} == {BackendError}
        assert "BUSY" in str(results[0])
        killer.script_kill()
        await asyncio.to_thread(thread.join)
    assert await eventually(lambda: is_there(backend)) < 2
    assert answer_of(CHARGE, await backend.acquire(CHARGE, new_id())).statuses[0] == WindowStatus(
        1, 60_000_000, 0
    )
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    await backend.close()


async def test_a_server_that_takes_no_writes_counts_as_away(
    own_server: StoreServer, backend: RedisBackend
) -> None:
    """A primary made a replica fails requests at once, and what is owed waits until it takes writes again."""
    kept = await reserve(backend)
    with own_server.client() as client:
        client.replicaof("127.0.0.1", "1")
        released = asyncio.ensure_future(_await(backend.finish(kept, EstimateAction.GIVE_BACK)))
        with pytest.raises(BackendError, match="READONLY"):
            await backend.acquire(CHARGE, new_id())
        await asyncio.sleep(0.2)
        assert backend.error is not None
        client.replicaof("NO", "ONE")
    await released
    assert await eventually(lambda: is_there(backend)) < 2
    assert await figures(backend) == [(0, 0), (0, 0)]


async def test_a_release_that_a_replica_refuses_is_owed_on(
    own_server: StoreServer, backend: RedisBackend
) -> None:
    """The first to meet a server that takes no writes may be a release: it is written when one does."""
    charge = Charge([slots(5)])
    kept = (await backend.acquire(charge, new_id())).reservation
    with own_server.client() as client:
        client.replicaof("127.0.0.1", "1")
        released = backend.finish(kept, EstimateAction.KEEP)
        await until_async(lambda: backend.error is not None)
        assert "READONLY" in str(backend.error)
        client.replicaof("NO", "ONE")
    await eventually(lambda: is_there(backend))
    await released
    assert (await peeked(backend, charge)).used(0) == 0


async def test_full_memory_refuses_charges_and_nothing_else(
    own_server: StoreServer, backend: RedisBackend
) -> None:
    """Without memory a charge fails and changes nothing; releases, renewals and settles go on."""
    kept, settled, released = [await reserve(backend) for _ in range(3)]
    alone = Charge([daily(100, of="alone")])
    estimate = (await backend.acquire(alone, new_id(), 9)).reservation
    with own_server.client() as client:
        client.config_set("maxmemory", "1")
        for price in (0, 10):
            with pytest.raises(BackendError, match="OOM"):
                await backend.acquire(CHARGE, new_id(), price)
        with pytest.raises(BackendError, match="OOM"):
            await backend.acquire(Charge([window(5, of="newcomer"), slots(5, of="newcomer")]), new_id())
        assert await backend.renew(kept, 60)
        assert await backend.renew(estimate, 60)
        await backend.hold_estimate(estimate)
        assert (await peeked(backend, alone)).statuses == [BudgetStatus(0, 9, is_short=False)]
        assert await backend.settle(settled, 4) is Settlement.SETTLED
        await backend.finish(released, EstimateAction.GIVE_BACK)
        await backend.finish(settled, EstimateAction.KEEP)
        assert await figures(backend) == [(1, 0), (4, 10)]
        assert (await peeked(backend, CHARGE)).used(0) == 3
        assert client.exists("ratelimit:{newcomer}:w:p:60", "ratelimit:{newcomer}:s:p") == 0
        assert backend.error is None
        client.config_set("maxmemory", "0")
    assert (await backend.acquire(CHARGE, new_id())).admitted


COMMANDS = (
    "+del +get +getrange +pexpire +pttl +set +setrange +time"
    " +zadd +zcard +zcount +zrem +zremrangebyscore +zscore"
)


@pytest.mark.parametrize("script", ["+eval +evalsha", "+eval"])
async def test_the_fewest_permissions_are_enough(own_server: StoreServer, script: str) -> None:
    """A user that may run the script's own commands on our keys is served, with EVALSHA or without."""
    with own_server.client() as client:
        rules = f"ACL SETUSER limiter on >secret ~ratelimit:* -@all +client|setname {script} {COMMANDS}"
        client.execute_command(*rules.split())
    url = own_server.url.replace("redis://", "redis://limiter:secret@")
    backend = RedisBackend(url, timeout=2)
    outcomes = [outcome async for outcome in _in_turn(backend, 70)]
    assert all(outcome.admitted for outcome in outcomes)
    assert await backend.renew(outcomes[0].reservation, 30)
    assert await backend.settle(outcomes[0].reservation, 1) is Settlement.SETTLED
    await backend.finish(outcomes[1].reservation, EstimateAction.GIVE_BACK)
    await backend.reset(CHARGE)
    assert backend.error is None
    await backend.close()


async def test_evalsha_forbidden_while_batches_are_under_way(own_server: StoreServer) -> None:
    """EVAL takes the place of EVALSHA, and nobody notices, if permission for EVALSHA is taken away live."""
    with own_server.client() as client:
        client.execute_command("ACL", "SETUSER", "limiter", "on", ">secret", "~*", "+@all")
        url = own_server.url.replace("redis://", "redis://limiter:secret@")
        backend = RedisBackend(url, timeout=2)
        await backend.open()
        client.execute_command("ACL", "SETUSER", "limiter", "-evalsha", "-script")
    outcomes = await asyncio.gather(*[backend.acquire(CHARGE, new_id()) for _ in range(90)])
    assert all(outcome.admitted for outcome in outcomes)
    await backend.close()


async def _in_turn(backend: RedisBackend, number: int) -> AsyncIterator[Outcome]:
    for _ in range(number):
        yield await backend.acquire(CHARGE, new_id(), 1)


async def _await(what: Awaitable[object]) -> object:
    return await what


def _is_busy(client: redis.Redis) -> bool:
    try:
        return not client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")


def _run_for_ever(client: redis.Redis) -> None:
    with contextlib.suppress(redis.ResponseError):
        client.eval("while true do end", 0)


# connecting that dies ---------------------------------------------------------------------------


class OddError(Exception):
    """An error that neither a server nor a network makes."""


async def test_connecting_that_dies_of_anything_is_an_outage(
    own_server: StoreServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Any exception while connecting is the outage's reason, said once, and connecting is tried again."""
    backend = RedisBackend(own_server.url, timeout=TIMEOUT)
    connect, tries = backend._connector.connect, 0

    async def broken(on_lost: Callable[[BackendError], None]) -> Connection:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OddError("unheard of")
        return await connect(on_lost)

    monkeypatch.setattr(backend._connector, "connect", broken)
    with pytest.raises(BackendError, match="OddError: unheard of"):
        await backend.acquire(CHARGE, new_id())
    await eventually(lambda: is_there(backend))
    assert (await backend.acquire(CHARGE, new_id())).admitted
    await backend.close()
    said = [record.message for record in caplog.records if "backend" in record.message]
    assert said == ["backend is away: OddError: unheard of", "backend is back"]


async def test_a_client_that_dies_of_anything_raises_a_backend_error(
    own_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single commands fail by the one error that their callers expect, whatever redis-py raises."""
    connector = RedisBackend(own_server.url)._connector
    client = connector.client()

    async def broken(*_: object, **__: object) -> None:
        raise OddError("unheard of")

    monkeypatch.setattr("redis.asyncio.connection.AbstractConnection.connect", broken)
    for ask in (
        lambda: client.execute("PING"),
        lambda: client.transact([["PING"]], "key"),
        lambda: client.ask([["PING"]]),
        lambda: connector.connect(lambda _: None),
    ):
        with pytest.raises(BackendError, match="OddError: unheard of"):
            await ask()
    await client.close()
