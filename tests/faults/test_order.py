"""Operations of one lease take effect in the order in which they were given, whatever fails between."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import pytest
import redis

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import hash_slot
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.backlog import MAX_BATCH
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.reservation import Reservation
from tests.conftest import StartServer
from tests.support.conformance import daily, eventually, metered, new_id, slots
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

NUMBER = MAX_BATCH
"""Leases at once: their settles fill a batch, and their ends the next."""
ESTIMATE, PRICE = 10, 3
CHARGE = Charge([slots(9_999), daily(999_999)])


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisBackend]:
    """A connected backend on a server."""
    backend = RedisBackend(url, timeout=5)
    try:
        await backend.open()
        yield backend
    finally:
        await backend.close()


async def reservations_of(
    backend: RedisBackend | ClusterBackend, charge: Charge = CHARGE
) -> list[Reservation]:
    """Holds of many leases with an estimate each."""
    outcomes = await asyncio.gather(*[backend.acquire(charge, new_id(), ESTIMATE) for _ in range(NUMBER)])
    return [outcome.reservation for outcome in outcomes]


def settle_and_end(
    backend: RedisBackend | ClusterBackend, reservations: list[Reservation]
) -> "asyncio.Future[list[object]]":
    """Settle all and then end all, without a wait in between; the settles' answers come first."""
    settles = [asyncio.ensure_future(backend.settle(reservation, PRICE)) for reservation in reservations]

    async def end() -> None:
        await asyncio.sleep(0)  # until the settles have been given
        await asyncio.gather(
            *[_wait(backend.finish(reservation, EstimateAction.KEEP)) for reservation in reservations]
        )

    return asyncio.gather(*settles, end())


async def money(backend: RedisBackend | ClusterBackend, charge: Charge = CHARGE) -> tuple[int, int, int]:
    """Slots that are taken; money spent, and held."""
    outcome = await backend.peek(charge)
    return outcome.used(0), outcome.used(1), outcome.held(1)


@contextmanager
def replica(server: StoreServer) -> Iterator[None]:
    """The server is a read-only replica meanwhile."""
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        yield
        client.replicaof("NO", "ONE")


@contextmanager
def unable_to_save(server: StoreServer) -> Iterator[None]:
    """The server could not save a snapshot, and takes no writes meanwhile."""
    with server.client() as client:
        client.config_set("save", "3600 1")
        (server.folder / "dump.rdb").mkdir()  # in the place of the snapshot
        with contextlib.suppress(redis.ResponseError):
            client.bgsave()
        end = time.monotonic() + 30
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            assert time.monotonic() < end
            time.sleep(0.01)
        yield
        (server.folder / "dump.rdb").rmdir()
        client.config_set("stop-writes-on-bgsave-error", "no")


@contextmanager
def without_replicas(server: StoreServer) -> Iterator[None]:
    """The server waits for a replica that is not there."""
    with server.client() as client:
        client.config_set("min-replicas-to-write", "1")
        yield
        client.config_set("min-replicas-to-write", "0")


@contextmanager
def stopped(server: StoreServer) -> Iterator[None]:
    """The server hangs meanwhile, and its connections are cut before it goes on."""
    server.stop_signal()
    yield
    server.continue_signal()


@pytest.mark.parametrize("fault", [replica, unable_to_save, without_replicas, stopped])
async def test_a_settle_takes_effect_before_the_end(
    kind: str,
    start_server: StartServer,
    fault: Callable[[StoreServer], contextlib.AbstractContextManager[None]],
) -> None:
    """Given one after the other to a server that does neither, both are done later, in this order."""
    server = start_server(kind)
    async with opened(server.url) as backend:
        reservations = await reservations_of(backend)
        with fault(server):
            owed = settle_and_end(backend, reservations)
            await asyncio.sleep(0.5)
        async with asyncio.timeout(30):
            results = await owed
        assert set(results[:-1]) <= {Settlement.SETTLED, Settlement.REPEATED}
        await eventually(lambda: _is(backend, (0, NUMBER * PRICE, 0)))


async def test_connections_that_are_cut_change_no_order(server: StoreServer) -> None:
    """Resets at any moment, with several batches under way: each lease costs its price, none its estimate."""
    async with Proxy(server.port) as proxy, opened(proxy.url) as backend:
        for turn in range(12):
            reservations = await reservations_of(backend)
            cut = asyncio.get_running_loop().call_later(0.002 * turn, proxy.reset)
            owed = settle_and_end(backend, reservations)
            async with asyncio.timeout(30):
                await owed
            cut.cancel()
            await eventually(partial(_is, backend, (0, NUMBER * PRICE * (turn + 1), 0)))


async def test_a_script_that_is_forgotten_changes_no_order(server: StoreServer) -> None:
    """A batch that is sent again since the server had lost the script is not passed by the next."""
    async with opened(server.url) as backend:
        flushing = True

        def flush() -> None:
            with server.client() as client:
                while flushing:
                    client.script_flush()

        thread = threading.Thread(target=flush)
        thread.start()
        try:
            for turn in range(8):
                reservations = await reservations_of(backend)
                async with asyncio.timeout(30):
                    await settle_and_end(backend, reservations)
                assert await money(backend) == (0, NUMBER * PRICE * (turn + 1), 0)
        finally:
            flushing = False
            await asyncio.to_thread(thread.join)


async def test_a_wait_that_is_cancelled_changes_no_order(kind: str, start_server: StartServer) -> None:
    """A settle whose caller has gone still comes before the end."""
    server = start_server(kind)
    async with opened(server.url) as backend:
        reservation = (await backend.acquire(CHARGE, new_id(), ESTIMATE)).reservation
        with replica(server):
            settle = asyncio.ensure_future(backend.settle(reservation, PRICE))
            await asyncio.sleep(0.1)
            settle.cancel()
            end = asyncio.ensure_future(_wait(backend.finish(reservation, EstimateAction.KEEP)))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(30):
            await end
        await eventually(lambda: _is(backend, (0, PRICE, 0)))


async def test_keys_that_move_change_no_order(cluster: Cluster) -> None:
    """A settle that is sent on again and again, while its keys lie on two nodes, is not passed by the end."""
    charge = Charge([slots(9_999, of="torn"), daily(999_999, of="torn")])
    slot = hash_slot(b"torn")
    backend = ClusterBackend(cluster.url, timeout=5)
    await backend.open()
    reservations = await reservations_of(backend, charge)
    source = cluster.owner_of(slot)
    target = next(node for node in cluster.nodes if node is not source)
    cluster.open_migration(slot, target)
    with source.client() as client:
        keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, NUMBER // 2)
        client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
    settles = [asyncio.ensure_future(backend.settle(reservation, PRICE)) for reservation in reservations]
    await asyncio.sleep(0.15)
    ends = [
        asyncio.ensure_future(_wait(backend.finish(reservation, EstimateAction.KEEP)))
        for reservation in reservations
    ]
    await asyncio.sleep(0.15)
    await asyncio.to_thread(cluster.move_keys, slot, source, target)
    cluster.close_migration(slot, target)
    async with asyncio.timeout(60):
        results = await asyncio.gather(*settles)
        await asyncio.gather(*ends)
    assert set(results) <= {Settlement.SETTLED, Settlement.REPEATED}
    assert await money(backend, charge) == (0, NUMBER * PRICE, 0)
    await backend.close()


async def test_closing_waits_for_what_waits_in_line(server: StoreServer) -> None:
    """Operations given just before the end of the process arrive, the end after the settle."""
    async with opened(server.url) as backend:
        reservations = await reservations_of(backend)
        settles = [asyncio.ensure_future(backend.settle(reservation, PRICE)) for reservation in reservations]
        await asyncio.sleep(0)
        for reservation in reservations:
            backend.finish(reservation, EstimateAction.KEEP)
        assert backend.load.owed >= NUMBER
        await backend.close()
        assert all(each.done() for each in settles)
        assert await money(backend) == (0, NUMBER * PRICE, 0)


async def test_closing_tells_of_what_waits_in_line(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A settle that no node answers and those that wait for it fail alike."""
    backend = ClusterBackend(cluster.url, timeout=5)
    await backend.open()
    charge = Charge([metered(1_000)], estimates={"tokens": 100})
    reservation = (await backend.acquire(charge, new_id())).reservation
    with contextlib.ExitStack() as stack:
        for node in cluster.nodes:
            stack.enter_context(stopped(node))
        settles = [
            asyncio.ensure_future(backend.settle_units(reservation, {"tokens": used}, replace=True))
            for used in (40, 60, 80)
        ]
        await asyncio.sleep(0.1)
        await backend.close()
        answers = await asyncio.gather(*settles, return_exceptions=True)
    assert [type(each) for each in answers] == [BackendError] * 3
    assert "3 releases and settles never reached the backend" in caplog.text


def test_an_event_loop_that_ends_changes_no_order(kind: str, start_server: StartServer) -> None:
    """The next event loop sends the leases, settles and ends that an ended loop owed, in this order."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=5)

    async def owe(reservations: list[Reservation]) -> None:
        settles = [asyncio.ensure_future(backend.settle(reservation, PRICE)) for reservation in reservations]
        await asyncio.sleep(0)
        for reservation in reservations:
            backend.finish(reservation, EstimateAction.KEEP)
        for settle in settles:
            settle.cancel()

    async def check() -> None:
        await eventually(lambda: _is(backend, (0, NUMBER * PRICE, 0)))
        await backend.close()

    reservations = asyncio.run(reservations_of(backend))
    with stopped(server):
        asyncio.run(owe(reservations))
    asyncio.run(check())


async def _is(backend: RedisBackend, expected: tuple[int, int, int]) -> bool:
    try:
        return await money(backend) == expected
    except BackendError:
        return False


async def _wait(what: Awaitable[object]) -> object:
    return await what
