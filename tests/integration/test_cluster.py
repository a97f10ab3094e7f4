"""A cluster: a step for each partition, undone where one refuses, and slots that move under load."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.cluster.nodes import hash_slot, hash_tag
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter, period_key
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, WindowStatus
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.support.conformance import Bench, daily, eventually, new_id, slots, window
from tests.support.servers import StoreServer
from tests.support.statuses import Answer, acquired, answer_of, peeked
from tests.support.topologies import Cluster, slot_of

pytestmark = pytest.mark.rerun

TIMEOUT = 5.0


@asynccontextmanager
async def opened(cluster: Cluster, timeout: float = TIMEOUT) -> AsyncIterator[ClusterBackend]:
    """A connected backend."""
    backend = ClusterBackend(cluster.url, timeout=timeout)
    try:
        await backend.open()
        yield backend
    finally:
        await backend.close()


@pytest.fixture
async def backend(cluster: Cluster) -> AsyncIterator[ClusterBackend]:
    """A connected backend on each kind of cluster."""
    async with opened(cluster) as backend:
        yield backend


def elsewhere(cluster: Cluster, slot: int) -> StoreServer:
    """A node that does not serve a slot."""
    owner = cluster.owner_of(slot)
    return next(node for node in cluster.nodes if node is not owner)


# several partitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("refusing", ["address", "app"])
async def test_a_refusal_gives_back_what_earlier_steps_took(backend: ClusterBackend, refusing: str) -> None:
    """Units, slots and money of all partitions: a refused charge changes nothing anywhere."""
    own = [window(9), slots(9), daily(900)]
    address = [window(9, of="address", scope="a"), slots(9, of="address", scope="a")]
    shared = [window(9, of="app"), slots(9, of="app")]
    full = window(1, 1, "hour", of=refusing, scope="full")
    await backend.acquire(Charge([full]), new_id())
    everything = Charge([*own, *address, *shared, full], cost=2)
    outcome = await backend.acquire(everything, new_id(), 100)
    assert not outcome.admitted
    assert not outcome.reservation.slots
    assert [status.refuses for status in everything.statuses(outcome)] == [False] * 7 + [True]

    async def is_undone() -> bool:
        answer = await peeked(backend, Charge([*own, *address, *shared]))
        return answer.counted == [answer.held(place) for place in range(7)] == [0] * 7

    await eventually(is_undone)


async def test_figures_of_a_refusal_leave_out_what_was_undone(cluster: Cluster) -> None:
    """Headers tell how the caller's limits stand without the refused request, and the longest wait of all."""
    bench = Bench("cluster", cluster)
    counters = [window(5), slots(5), daily(900), window(2, of="app"), window(1, 1, "hour", of="total")]
    outcome = await bench.acquire(*counters, price=100)
    assert outcome.statuses == [
        WindowStatus(1, 60_000_000, 0),
        SlotStatus(1, is_full=False),
        BudgetStatus(0, 100, is_short=False),
        WindowStatus(1, 60_000_000, 0),
        WindowStatus(1, 3_600_000_000, 0),
    ]
    bench.wait(1)
    outcome = await bench.acquire(*counters, cost=2, price=100)
    assert not outcome.admitted
    assert outcome.statuses == [
        WindowStatus(1, 59_000_000, 0),
        SlotStatus(1, is_full=False),
        BudgetStatus(0, 100, is_short=False),
        WindowStatus(1, 59_000_000, 59_000_000),
        WindowStatus(1, 3_599_000_000, 3_600_000_000),
    ]
    first = await bench.acquire(window(5, of="new"), window(2, of="app"), cost=2)
    assert not first.admitted
    assert first.statuses[0] == WindowStatus(0, 0, 0)
    await bench.close()


async def test_partitions_at_once_never_pass_a_shared_limit(backend: ClusterBackend) -> None:
    """Forty callers at once draw on one limit: exactly what there is is admitted, the others keep theirs."""
    shared = [window(25, of="app"), slots(25, of="app")]
    charges = [Charge([window(5, of=f"caller {n}"), slots(5, of=f"caller {n}"), *shared]) for n in range(40)]
    outcomes = await asyncio.gather(*[backend.acquire(charge, new_id()) for charge in charges])
    assert sum(outcome.admitted for outcome in outcomes) == 25
    for charge, outcome in zip(charges, outcomes, strict=True):
        own = await peeked(backend, Charge(charge.counters[:2]))
        assert own.counted == [int(outcome.admitted)] * 2


async def test_a_hold_in_several_partitions_is_kept_and_ended_as_one(backend: ClusterBackend) -> None:
    """Renewed, settled and released together; lost in one, it counts as lost."""
    own, shared = [slots(5), daily(900)], [slots(5, of="app")]
    reservations = [
        (await backend.acquire(Charge([*own, *shared]), new_id(), 100)).reservation for _ in range(2)
    ]
    assert await backend.renew(reservations[0], 30)
    assert await backend.settle(reservations[0], 30) is Settlement.SETTLED
    assert await backend.settle(reservations[0], 30) is Settlement.REPEATED
    await backend.finish(reservations[0], EstimateAction.KEEP)
    await backend.reset(Charge(shared))
    assert not await backend.renew(reservations[1], 30)
    await backend.finish(reservations[1], EstimateAction.GIVE_BACK)
    left = (await peeked(backend, Charge([*own, *shared]))).statuses
    assert [status[:2] for status in left] == [(0, 0), (30, 0), (0, 0)]


async def test_a_cancelled_charge_leaves_nothing_in_any_partition(backend: ClusterBackend) -> None:
    """Whichever step was under way, slots and money of all of them come back."""
    counters = [slots(500), daily(9_999), slots(500, of="address", scope="a"), slots(500, of="app")]

    async def cancelled(delay: float) -> None:
        task = asyncio.ensure_future(backend.acquire(Charge(counters), new_id(), 1))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await backend.finish((await task).reservation, EstimateAction.GIVE_BACK)

    await asyncio.gather(*[cancelled(0.0001 * n) for n in range(100)])

    async def is_undone() -> bool:
        return [each[:2] for each in (await peeked(backend, Charge(counters))).statuses] == [(0, 0)] * 4

    await eventually(is_undone)


# slots that move --------------------------------------------------------------------------------


async def test_a_slot_that_has_moved_is_followed(cluster: Cluster, backend: ClusterBackend) -> None:
    """A charge for a slot that has moved since the start is sent on, and counts once."""
    counters = [window(9), slots(9), daily(900)]
    await backend.acquire(Charge(counters), new_id(), 1)
    cluster.migrate(slot_of("caller"), elsewhere(cluster, slot_of("caller")))
    charge = Charge(counters)
    outcome = answer_of(charge, await backend.acquire(charge, new_id(), 1))
    assert outcome.counted == [2, 2, 0]


async def test_single_limits_are_decided_while_their_slot_moves(
    cluster: Cluster, backend: ClusterBackend
) -> None:
    """Keys that have moved, keys that have not and new ones: each is found, at the node that has it."""
    slot = slot_of("moving")
    same = [name for name in (f"moving {n}" for n in range(200_000)) if slot_of(name) == slot][:2]
    old, new = ["moving", same[0]], same[1]
    for partition in old:
        await backend.acquire(Charge([window(5, of=partition)]), new_id())
    source, target = cluster.owner_of(slot), elsewhere(cluster, slot)
    cluster.open_migration(slot, target)
    with source.client() as client:
        keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1)
        client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
    for used in (2, 3, 4, 5, 5):
        outcomes = [await backend.acquire(Charge([window(5, of=each)]), new_id()) for each in old]
        assert [outcome.used(0) for outcome in outcomes] == [used, used]
    for used in (1, 2, 3):
        charged = asyncio.gather(*[backend.acquire(Charge([window(50, of=new)]), new_id()) for _ in range(5)])
        assert max(outcome.used(0) for outcome in await charged) == 5 * used
    cluster.move_keys(slot, source, target)
    cluster.close_migration(slot, target)
    assert [(await peeked(backend, Charge([window(5, of=each)]))).used(0) for each in old] == [5, 5]


async def test_a_release_outlasts_the_move_of_its_slot(cluster: Cluster) -> None:
    """While keys of one caller lie on two nodes nothing is decided; what is owed arrives afterwards."""
    counters = [window(9, of="torn"), slots(9, of="torn"), daily(900, of="torn")]
    slot = slot_of("torn")
    async with opened(cluster, 0.5) as backend:
        reservation = (await backend.acquire(Charge(counters), new_id(), 100)).reservation
        source, target = cluster.owner_of(slot), elsewhere(cluster, slot)
        cluster.open_migration(slot, target)
        with source.client() as client:
            keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 2)
            client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        with pytest.raises(BackendError, match=r"redirected the request for more than 0\.5 s"):
            await backend.acquire(Charge(counters), new_id(), 100)
        assert backend.error is None
        released = asyncio.ensure_future(backend.finish(reservation, EstimateAction.GIVE_BACK))
        await asyncio.sleep(0.2)
        assert not released.done()
        cluster.move_keys(slot, source, target)
        cluster.close_migration(slot, target)
        await asyncio.wait_for(released, 60)
        left = await peeked(backend, Charge(counters))
        assert left.counted == [1, 0, 0]
        assert left.held(2) == 0


async def test_a_slot_set_that_vanishes_while_it_moves_fails_nobody(cluster: Cluster) -> None:
    """A charge does not fail for a key that a release in the same call has deleted, as it was the caller's
    last slot, while both move: the node answers for the keys that it still has, and for no other.
    """
    counters = [window(9, of="moving"), slots(9, of="moving")]
    slot = slot_of("moving")
    source = cluster.owner_of(slot)
    target = elsewhere(cluster, slot)
    async with opened(cluster) as backend:
        first = await backend.acquire(Charge(counters), new_id())
        cluster.open_migration(slot, target)

        async def release_and_charge() -> Answer:
            backend.finish(first.reservation, EstimateAction.UNTOUCHED)
            return await acquired(backend, Charge(counters), new_id())

        second = asyncio.create_task(release_and_charge())
        await asyncio.sleep(0.05)
        cluster.move_keys(slot, source, target)
        cluster.close_migration(slot, target)
        outcome = await asyncio.wait_for(second, 60)
        assert outcome.counted == [2, 1]


async def test_slots_move_under_load_and_nobody_notices(cluster: Cluster) -> None:
    """Resharding the slots of busy callers: no decision fails, and nobody gets a unit too many."""
    quota, callers = 150, 8
    partitions = [f"busy {n}" for n in range(callers)]
    admitted = dict.fromkeys(partitions, 0)
    done = asyncio.Event()

    async def load(backend: ClusterBackend, partition: str) -> None:
        charge = Charge(
            [window(quota, 1, "hour", of=partition), slots(50, of=partition), window(99_999, of="app")]
        )
        while not done.is_set():
            outcome = await backend.acquire(charge, new_id())
            admitted[partition] += outcome.admitted
            await backend.finish(outcome.reservation, EstimateAction.KEEP)
            await asyncio.sleep(0.002)

    moved = 0
    async with opened(cluster) as one, opened(cluster) as two:
        tasks = [asyncio.create_task(load(each, name)) for name in partitions for each in (one, two, two)]
        await asyncio.sleep(0.1)
        for round_ in range(3):
            for partition in [*partitions, "app"]:
                target = cluster.nodes[(cluster.nodes.index(cluster.owner_of(slot_of(partition))) + 1) % 3]
                moved += await asyncio.to_thread(cluster.migrate, slot_of(partition), target)
                await asyncio.sleep(0.01 * round_)
        await eventually(lambda: _full(admitted, quota), 60)
        done.set()
        await asyncio.gather(*tasks)
    assert moved >= 2 * callers
    assert set(admitted.values()) == {quota}


# keys -------------------------------------------------------------------------------------------


@given(
    st.text(min_size=1).filter(lambda text: "\0" not in text)
    | st.sampled_from(["{", "}", "{}", "}{", "%7B{a}", "a{b}c"])
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_keys_of_a_partition_have_the_slot_that_the_server_says(
    redis_cluster: Cluster, partition: str
) -> None:
    """All keys of a partition hash to the one expected slot, whatever it holds, braces too."""
    backend = ClusterBackend(redis_cluster.url)
    counters = [Counter(partition, "p", each.limit) for each in (window(5), slots(5), daily(5))]
    keys = [backend._partitions._names.of_counter(counter, 0) for counter in counters]
    reservation = Charge(counters).recorded_reservation(new_id(), (period_key(counters[2], 0),), 1)
    keys.append(backend._partitions._names.of_record(reservation))
    with redis_cluster.nodes[0].client() as client:
        found = {client.execute_command("CLUSTER", "KEYSLOT", key) for key in keys}
    assert found == {hash_slot(hash_tag(keys[0]))}


@pytest.fixture
def redis_cluster(shared_cluster: Callable[[str], Cluster]) -> Cluster:
    """A cluster of Redis 6.2."""
    return shared_cluster("redis")


# around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
async def test_settings_name_a_cluster(scheme: str, redis_cluster: Cluster) -> None:
    """A limiter and the live keys work under both schemes."""
    backend = BackendSettings(url=SecretURL(redis_cluster.url.replace("redis", scheme, 1)), timeout=5)
    async with Limiter(Settings(backend=backend)) as limiter, await limiter.acquire(api_key="k") as lease:
        assert lease.decision.policy == "shared"
    store = open_key_store(backend)
    await store.write({"hash": b"entry", "other": b"entry"})
    before = await store.version()
    assert before is not None
    await store.write({"other": None})
    assert await store.entries() == {"hash": b"entry"}
    assert await store.changes(before) == (await store.version(), {"other": None})
    slot = hash_slot(b"keys")
    redis_cluster.migrate(slot, elsewhere(redis_cluster, slot))
    with contextlib.suppress(BackendError):
        await store.entries()
    assert await store.entries() == {"hash": b"entry"}
    await store.write({"hash": b"another"})
    changes = await store.changes(before)
    assert changes is not None
    assert changes.entries == {"other": None, "hash": b"another"}
    await store.close()


async def test_a_plain_server_is_taken_for_a_cluster_of_one(redis_server: StoreServer) -> None:
    """Counts and live keys work behind the URL of a cluster, too."""
    url = redis_server.url.replace("redis", "redis+cluster", 1)
    backend = BackendSettings(url=SecretURL(url), timeout=5)
    async with Limiter(Settings(backend=backend)) as limiter, await limiter.acquire(api_key="k") as lease:
        assert lease.decision.policy == "shared"
    store = open_key_store(backend)
    await store.write({"hash": b"entry"})
    assert await store.entries() == {"hash": b"entry"}
    await store.close()


async def test_several_plain_servers_are_no_cluster(
    redis_server: StoreServer, valkey_server: StoreServer
) -> None:
    """Each would count for itself: the backend is away, and says why."""
    ports = f"{redis_server.port},127.0.0.1:{valkey_server.port}"
    backend = ClusterBackend(f"redis+cluster://127.0.0.1:{ports}", timeout=TIMEOUT)
    with pytest.raises(BackendError, match=r"is a single server, not a node of a cluster"):
        await backend.acquire(Charge([window(5)]), new_id())
    await backend.close()


async def _full(admitted: dict[str, int], quota: int) -> bool:
    return set(admitted.values()) == {quota}
