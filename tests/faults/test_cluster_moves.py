"""Slots of a cluster that are moved key by key: what must arrive arrives, once, and in its order."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.conformance import daily, eventually, new_id, slots, window
from tests.support.servers import StoreServer
from tests.support.statuses import acquired, peeked
from tests.support.topologies import Cluster, slot_of

pytestmark = pytest.mark.rerun

SECONDS = 5.0
"""Seconds for which slots are moved under load."""


@asynccontextmanager
async def opened(
    cluster: Cluster, timeout: float = 5.0, clock: Clock | None = None
) -> AsyncIterator[ClusterBackend]:
    """A connected backend."""
    backend = ClusterBackend(cluster.url, timeout=timeout, clock=clock)
    try:
        await backend.open()
        yield backend
    finally:
        await backend.close()


def partition_on(cluster: Cluster, node: StoreServer) -> str:
    """A partition that a node serves."""
    return next(
        name for name in (f"caller {n}" for n in range(10_000)) if cluster.owner_of(slot_of(name)) is node
    )


def move_one_key(slot: int, source: StoreServer, target: StoreServer) -> int:
    """Move one key of a slot that is being moved; how many there were."""
    with source.client() as client:
        keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1)
        if keys:
            client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
    return len(keys)


async def test_a_give_back_outlasts_the_move_of_its_slot(cluster: Cluster) -> None:
    """A give-back arrives though its keys lie on two nodes for longer than a request may wait."""
    source, target, hanging = cluster.nodes
    mine, shared = partition_on(cluster, source), partition_on(cluster, hanging)
    own = [window(9, of=mine), window(9, 1, "hour", of=mine)]
    charge = Charge([*own, window(9, of=shared)])
    async with opened(cluster, 0.5) as backend, opened(cluster) as other:
        assert (await backend.acquire(charge, new_id())).admitted
        hanging.stop_signal()
        try:
            failing = asyncio.ensure_future(acquired(backend, charge, new_id()))
            await eventually(lambda: _are_used(other, own, 2))
            cluster.open_migration(slot_of(mine), target)
            move_one_key(slot_of(mine), source, target)
            with pytest.raises(BackendError):
                await failing
            await asyncio.sleep(0.7)
        finally:
            hanging.continue_signal()
        cluster.move_keys(slot_of(mine), source, target)
        cluster.close_migration(slot_of(mine), target)
        await eventually(lambda: _are_used(backend, own, 1))


async def test_a_charge_on_a_slot_that_moves_counts_once(cluster: Cluster) -> None:
    """A charge that meets slots of dead holders, and is sent again for it, has changed nothing before."""
    now = [1_800_000_000_000_000]
    charge = Charge([slots(1, of="lapsed"), window(9, 1, "hour", of="lapsed")])
    slot = slot_of("lapsed")
    source = cluster.owner_of(slot)
    target = next(node for node in cluster.nodes if node is not source)
    async with opened(cluster, clock=lambda: now[0]) as backend:
        assert (await backend.acquire(charge, new_id())).admitted
        now[0] += 600_000_000
        cluster.open_migration(slot, target)
        charged = asyncio.ensure_future(acquired(backend, charge, new_id()))
        await asyncio.sleep(0.2)
        cluster.move_keys(slot, source, target)
        cluster.close_migration(slot, target)
        outcome = await charged
        assert outcome.admitted
        assert outcome.counted == [1, 2]


async def test_operations_sent_together_are_each_asked_for_at_the_right_node(cluster: Cluster) -> None:
    """Of two keys of a caller one has moved: Redis 6.2 refuses a call with both as if both had."""
    charges = [Charge([window(9, 1, unit, of="parted")]) for unit in ("minute", "hour")]
    slot = slot_of("parted")
    source = cluster.owner_of(slot)
    target = next(node for node in cluster.nodes if node is not source)
    async with opened(cluster) as backend:
        for charge in charges:
            await backend.acquire(charge, new_id())
        cluster.open_migration(slot, target)
        assert move_one_key(slot, source, target) == 1
        for used in (2, 3):
            outcomes = await asyncio.gather(*[backend.acquire(charge, new_id()) for charge in charges])
            assert [outcome.used(0) for outcome in outcomes] == [used, used]
        cluster.move_keys(slot, source, target)
        cluster.close_migration(slot, target)
        assert [(await peeked(backend, charge)).used(0) for charge in charges] == [3, 3]


class Callers:
    """Requests of several callers that settle, each less than its estimate, and end; and what they should
    have come to.
    """

    def __init__(self, names: list[str]) -> None:
        self.charges = {
            name: Charge(
                [
                    window(1_000_000, 1, "hour", of=name),
                    slots(1_000, of=name),
                    daily(10**12, of=name),
                    slots(3, of="app"),
                ]
            )
            for name in names
        }
        self.admitted = dict.fromkeys(names, 0)
        self.settled = dict.fromkeys(names, 0)
        self.met: list[Settlement] = []
        self.refused = 0
        self.is_over = False

    async def run(self, backend: ClusterBackend, name: str) -> None:
        """Make one request after the other."""
        while not self.is_over:
            outcome = await backend.acquire(self.charges[name], new_id(), 100)
            await asyncio.sleep(0.002)
            if outcome.admitted:
                await self._end(backend, name, outcome.reservation)
            else:
                self.refused += 1

    async def _end(self, backend: ClusterBackend, name: str, reservation: Reservation) -> None:
        amount = random.randint(1, 99)
        self.admitted[name] += 1
        self.settled[name] += amount
        settling = asyncio.ensure_future(backend.settle(reservation, amount))
        await asyncio.sleep(0.002)  # the request ends while its settle is under way
        await backend.finish(reservation, EstimateAction.KEEP)
        self.met.append(await settling)

    def books(self) -> dict[str, list[int]]:
        """Of each caller: units of rate, slots, money spent and held, and slots of all."""
        return {name: [self.admitted[name], 0, self.settled[name], 0, 0] for name in self.charges}

    async def books_of(self, backend: ClusterBackend) -> dict[str, list[int]]:
        """Return the books as a backend tells them."""
        books = {}
        for name, charge in self.charges.items():
            answer = await peeked(backend, charge)
            rate, own, spent, shared = answer.counted
            books[name] = [rate, own, spent, answer.held(2), shared]
        return books


@pytest.mark.slow
async def test_books_are_right_after_slots_have_moved_key_by_key(cluster: Cluster) -> None:
    """Under load, with a shared limit that refuses many: money is what was settled, nothing is held, no slot
    is taken, and windows show what was admitted.
    """
    names = [f"paying {n}" for n in range(6)]
    callers = Callers(names)
    async with opened(cluster, 20) as one, opened(cluster, 20) as two:
        tasks = [asyncio.create_task(callers.run(each, name)) for name in names for each in (one, two)]
        until = asyncio.get_running_loop().time() + SECONDS
        while asyncio.get_running_loop().time() < until:
            for partition in (*names[:3], "app"):
                await _move_slowly(cluster, slot_of(partition))
        callers.is_over = True
        await asyncio.gather(*tasks)
        assert callers.refused > 0
        assert set(callers.met) == {Settlement.SETTLED}

        async def are_right() -> bool:
            return await callers.books_of(one) == callers.books()

        with contextlib.suppress(AssertionError):
            await eventually(are_right, 10)
        assert await callers.books_of(one) == callers.books()


async def _move_slowly(cluster: Cluster, slot: int) -> None:
    """Move a slot to the next node, one key after the other."""
    source = cluster.owner_of(slot)
    target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
    await asyncio.to_thread(cluster.open_migration, slot, target)
    while await asyncio.to_thread(move_one_key, slot, source, target):
        await asyncio.sleep(0.005)
    await asyncio.to_thread(cluster.close_migration, slot, target)


async def _are_used(backend: ClusterBackend, counters: list[Counter], used: int) -> bool:
    try:
        counted = (await peeked(backend, Charge(counters))).counted
    except BackendError:
        return False
    return counted == [used] * len(counters)
