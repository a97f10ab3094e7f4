"""Nodes of a cluster that die: their shard alone is away, until a replica takes over or the node is back."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import hash_slot
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction
from ratelimit_mw._internal.model.charge import Charge
from tests.support.conformance import Waits, daily, eventually, new_id, slots, window
from tests.support.processes import HOST
from tests.support.servers import StoreServer, server_binaries
from tests.support.statuses import acquired, peeked
from tests.support.topologies import DOWN_AFTER, Cluster, running, wait_until

pytestmark = pytest.mark.rerun

TIMEOUT = 3.0
SLACK = 0.4
"""Seconds that the end of a wait may come later."""
MOST_OUTAGE = 60.0
"""Seconds that a fail-over may take on a busy machine, where a vote may have to be taken again."""
MOST_CONNECTIONS = 30
"""Connections in which a node is asked within some seconds whether it is back, and who serves what."""
MOST_LOST = 400
"""Units that a primary may take with it: what it had admitted and not handed on, in a second at most."""


@pytest.fixture(params=sorted(server_binaries()))
def replicated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Three primaries with a replica each, to be killed."""
    cluster = Cluster(request.param, tmp_path, replicas=1)
    with running(cluster):
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three primaries without replicas, to be killed."""
    cluster = Cluster("redis", tmp_path)
    with running(cluster):
        yield cluster


def partition_on(cluster: Cluster, number: int) -> str:
    """A partition that the node of this number serves."""
    names = (f"caller {n}" for n in range(100_000))
    return next(name for name in names if cluster.owner_of(hash_slot(name.encode())) is cluster.nodes[number])


class Load:
    """Charges on one partition, some two hundred times a second for each backend."""

    def __init__(self, backends: list[ClusterBackend], partition: str) -> None:
        self.charge = Charge([window(100_000, 1, "hour", of=partition)])
        self.admitted = 0
        self.failed_at: list[float] = []
        self.waits = Waits()
        self._done = False
        self._tasks = [asyncio.create_task(self._run(backend)) for backend in backends]

    async def stop(self) -> None:
        """Wait for what is under way; raises what a charge should not have raised."""
        self._done = True
        await asyncio.gather(*self._tasks)
        assert self.waits.longest < TIMEOUT + SLACK + self.waits.late

    async def _run(self, backend: ClusterBackend) -> None:
        while not self._done:
            async with self.waits.one():
                try:
                    outcome = await backend.acquire(self.charge, new_id())
                    self.admitted += outcome.admitted
                except BackendError:
                    self.failed_at.append(time.monotonic())
            await self.waits.pause(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "hung"])
async def test_a_node_that_is_gone_is_replaced_and_others_go_on(
    replicated: Cluster, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its callers fall under the failure policy until a replica took over; those of other nodes never do.

    Killed, or hanging: one that wakes up again is not gone back to.
    """
    gone = replicated.nodes[0]
    mine, other = partition_on(replicated, 0), partition_on(replicated, 1)
    owed = Charge([slots(5, of=mine), daily(1_000, of=mine)])
    async with opened(replicated.url, 2) as backends:
        held = (await backends[0].acquire(owed, new_id(), 100)).reservation
        loads = [Load(backends, mine), Load(backends, other)]
        await asyncio.sleep(0.5)
        gone_at = time.monotonic()
        (gone.kill if end == "killed" else gone.stop_signal)()
        await eventually(lambda: _has_failed(loads[0]))
        released = asyncio.ensure_future(backends[0].finish(held, EstimateAction.GIVE_BACK))
        await eventually(lambda: _all_serve(backends, loads[0].charge), MOST_OUTAGE)
        await asyncio.wait_for(released, MOST_OUTAGE)
        gone.continue_signal()
        await asyncio.sleep(0.5)
        for load in loads:
            await load.stop()
        outage = max(loads[0].failed_at) - gone_at
        counted = [(await peeked(each, loads[0].charge)).used(0) for each in backends]
        assert [status[:2] for status in (await peeked(backends[1], owed)).statuses] == [(0, 0), (0, 0)]
    lost = loads[0].admitted - counted[0]
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{replicated.kind} {end}: shard away for {outage:.2f} s, "
            f"lost {lost} of {loads[0].admitted} units, {len(loads[1].failed_at)} failures elsewhere"
        )
    assert counted[0] == counted[1]
    assert lost <= MOST_LOST
    assert loads[1].failed_at == []


async def test_a_dead_shard_comes_back_on_its_own(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Without a replica, its callers wait for its return and others go on; what was owed arrives."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    mine, other = partition_on(cluster, 0), partition_on(cluster, 1)
    async with opened(cluster.url) as (backend,):
        charges = [Charge([slots(500, of=each)]) for each in (mine, other)]
        both = Charge([*charges[1].counters, *charges[0].counters])
        reservation = (await backend.acquire(both, new_id())).reservation
        cluster.nodes[0].kill()
        await eventually(lambda: _fails(backend, charges[0]))
        with pytest.raises(BackendError):
            await backend.acquire(both, new_id())
        released = asyncio.ensure_future(backend.finish(reservation, EstimateAction.KEEP))
        await asyncio.sleep(2 * DOWN_AFTER / 1_000)
        assert not await _fails(backend, charges[1])
        await asyncio.to_thread(cluster.nodes[0].restart)
        await asyncio.wait_for(released, MOST_OUTAGE)
        await eventually(lambda: _all_serve([backend], charges[0]), MOST_OUTAGE)
        # The half of `both` that had been charged was given back; the slot of the last charge is held.
        assert (await peeked(backend, charges[1])).used(0) == 1
        messages = [record.message for record in caplog.records if "is back" in record.message]
        assert messages == ["backend is back"]


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [("redis", "PAUSE"), ("valkey", "PAUSE"), ("redis", "MISCONF"), ("valkey", "NOREPLICAS")],
)
async def test_a_node_that_takes_no_writes_is_away_until_it_does(
    kind: str, refusal: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers, and knows who serves what: that does not bring it back. It is away once, asked ever less
    often, and back when a write in a slot of its own has been done; other nodes go on.
    """
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    cluster = Cluster(kind, tmp_path)
    with running(cluster):
        for number, node in enumerate(cluster.nodes):
            caplog.clear()
            mine, other = (
                Charge([window(50_000, of=partition_on(cluster, each))])
                for each in (number, (number + 1) % 3)
            )
            async with opened(cluster.url, timeout=0.3) as (backend,):
                assert (await backend.acquire(mine, new_id())).admitted
                refuse_writes(node, refusal)
                while not await _fails(backend, mine):
                    await asyncio.sleep(0.01)
                connections = accepted(node)
                for _ in range(150):
                    assert await _fails(backend, mine)
                    assert not await _fails(backend, other)
                    await asyncio.sleep(0.01)
                assert accepted(node) - connections < MOST_CONNECTIONS
                assert [_word(record.message) for record in caplog.records] == ["away"]
                take_writes(node, refusal)
                while await _fails(backend, mine):
                    await asyncio.sleep(0.01)
                assert [_word(record.message) for record in caplog.records] == ["away", "back"]


async def test_a_node_gets_its_first_slot_key_by_key(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that serves no slot yet is reached while one is moving to it, and named as away by nobody."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    new, partition = cluster.add(), partition_on(cluster, 0)
    slot, charge = hash_slot(partition.encode()), Charge([window(5, of=partition)])
    async with opened(cluster.url) as (backend,):
        cluster.open_migration(slot, new)
        for used in (1, 2):
            assert (await backend.acquire(charge, new_id())).used(0) == used
        with new.client() as client:
            assert client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await eventually(lambda: _all_serve([backend], charge))
        cluster.close_migration(slot, new)
        assert (await backend.acquire(charge, new_id())).used(0) == 3
    assert all("connection lost" in each.message or "is back" in each.message for each in caplog.records)


async def test_a_cluster_that_wants_all_its_shards_is_away_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under `cluster-require-full-coverage yes` one dead shard stops all: each node is away, said once, and
    all are back when it is.
    """
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    cluster = Cluster("redis", tmp_path, "--cluster-require-full-coverage", "yes")
    with running(cluster):
        charges = [Charge([window(50_000, of=partition_on(cluster, number))]) for number in range(3)]
        async with opened(cluster.url) as (backend,):
            cluster.nodes[0].kill()
            for charge in charges:
                while not await _fails(backend, charge):
                    await asyncio.sleep(0.02)
            connections = accepted(cluster.nodes[1])
            await asyncio.sleep(2)
            assert accepted(cluster.nodes[1]) - connections < MOST_CONNECTIONS
            assert all([await _fails(backend, charge) for charge in charges])
            await asyncio.to_thread(cluster.nodes[0].restart)
            for charge in charges:
                while await _fails(backend, charge):
                    await asyncio.sleep(0.02)
        assert sorted(_word(record.message) for record in caplog.records) == ["away"] * 3 + ["back"] * 3


async def test_a_seed_that_is_down_is_passed_over(cluster: Cluster) -> None:
    """Any one node that the URL names, and that is there, leads to all others."""
    down = Cluster("redis", cluster.nodes[0].folder / "never started").nodes[0]
    url = f"redis+cluster://{HOST}:{down.port},{HOST}:{cluster.nodes[2].port}"
    async with opened(url) as (backend,):
        for number in range(3):
            charge = Charge([window(5, of=partition_on(cluster, number))])
            assert (await backend.acquire(charge, new_id())).admitted


def refuse_writes(node: StoreServer, refusal: str) -> None:
    """Have a node refuse writes with this error, or leave them unanswered."""
    with node.client() as client:
        if refusal == "PAUSE":
            client.execute_command("CLIENT", "PAUSE", 600_000, "WRITE")
        elif refusal == "NOREPLICAS":
            client.config_set("min-replicas-to-write", 1)
        else:
            folder = node.folder / "no more"
            folder.mkdir()
            client.config_set("dir", str(folder))
            client.config_set("save", "3600 1000000")
            folder.rmdir()
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "failed save")


def take_writes(node: StoreServer, refusal: str) -> None:
    """Let a node take writes again."""
    with node.client() as client:
        if refusal == "PAUSE":
            client.execute_command("CLIENT", "UNPAUSE")
        elif refusal == "NOREPLICAS":
            client.config_set("min-replicas-to-write", 0)
        else:
            client.config_set("save", "")


def accepted(node: StoreServer) -> int:
    """Return the number of connections that a node has had, the asking one included."""
    with node.client() as client:
        return int(client.info("stats")["total_connections_received"])


def _word(message: str) -> str:
    return message.removeprefix("backend is ")[:4]


@asynccontextmanager
async def opened(url: str, number: int = 1, timeout: float = TIMEOUT) -> AsyncIterator[list[ClusterBackend]]:
    """Connected backends, as several processes would have them."""
    backends = [ClusterBackend(url, timeout=timeout) for _ in range(number)]
    try:
        for backend in backends:
            await backend.open()
        yield backends
    finally:
        for backend in backends:
            await backend.close()


async def _all_serve(backends: list[ClusterBackend], charge: Charge) -> bool:
    try:
        return len([await each.peek(charge) for each in backends]) > 0
    except BackendError:
        return False


async def _has_failed(load: Load) -> bool:
    return bool(load.failed_at)


async def _fails(backend: ClusterBackend, charge: Charge) -> bool:
    try:
        await backend.acquire(charge, new_id())
    except BackendError:
        return True
    return False


async def test_a_refusal_stands_though_other_steps_cannot_be_asked(cluster: Cluster) -> None:
    """A node that is there has refused: no `on_failure` decides about that, and it comes in time."""
    mine, shared = partition_on(cluster, 0), partition_on(cluster, 1)
    own, common = window(2, 1, "hour", of=mine), window(1_000, 1, "hour", of=shared)
    async with opened(cluster.url, 1) as (backend,):
        assert [(await backend.acquire(Charge([own, common]), new_id())).admitted for _ in range(3)] == [
            True,
            True,
            False,
        ]
        cluster.nodes[1].stop_signal()
        for _ in range(3):  # before it is known to be away, and afterwards
            refused = await acquired(backend, Charge([own, common]), new_id())
            assert not refused.admitted
            assert refused.window().used == 2
            assert refused.window().retry_after_us > 0
            assert refused.window(1) == (0, 0, 0)
        with pytest.raises(BackendError):
            await backend.acquire(Charge([window(9, of=mine, scope="other"), common]), new_id())
