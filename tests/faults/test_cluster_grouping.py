"""Operations of one node of a cluster share a call: which do, and that each stays exact while slots move."""

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis import calls
from ratelimit_mw._internal.backends.redis.operations import bulk
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from tests.faults.test_batcher_answers import SPOILT, Spoiler
from tests.support.conformance import STORES, daily, eventually, metered, new_id, slots, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import peeked
from tests.support.topologies import Cluster, running, slot_of, wait_until

pytestmark = pytest.mark.rerun

TOGETHER = 12
"""Callers of one node whose requests come at once."""
LAST_OF_FIRST = 5_460
"""Last hash slot of the first of three nodes."""


@asynccontextmanager
async def opened(url: str, timeout: float = 5.0) -> AsyncIterator[ClusterBackend]:
    """A connected backend."""
    backend = ClusterBackend(url, timeout=timeout)
    try:
        await backend.open()
        yield backend
    finally:
        await backend.close()


def callers_on(cluster: Cluster, node: StoreServer, number: int = TOGETHER) -> list[str]:
    """Callers whose keys a node has, each in a slot of its own."""
    with node.client() as client:
        served = [
            range(first, last + 1)
            for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER", "SLOTS")
            if port == node.port
        ]
    found: dict[int, str] = {}
    for name in (f"caller {n}" for n in itertools.count()):
        if any(slot_of(name) in each for each in served):
            found.setdefault(slot_of(name), name)
            if len(found) == number:
                return list(found.values())
    raise AssertionError("unreachable")


def hourly(name: str, quota: int = 1_000) -> Charge:
    """A charge of one window."""
    return Charge([window(quota, 1, "hour", of=name)])


async def calls_for(backend: ClusterBackend, names: list[str]) -> int:
    """Number of calls that requests of these callers, which come at once, take."""
    before = backend.load.batches
    await asyncio.gather(*[backend.peek(hourly(name)) for name in names])
    return backend.load.batches - before


async def grouped(backend: ClusterBackend, names: list[str]) -> None:
    """Wait until requests of callers of one node share a call."""

    async def are() -> bool:
        return await calls_for(backend, names) == 1

    await eventually(are)


async def serves(backend: ClusterBackend, names: list[str]) -> bool:
    """Whether requests of these callers are answered."""
    try:
        await calls_for(backend, names)
    except BackendError:
        return False
    return True


class Announced(StoreServer):
    """A node that says it is elsewhere: behind a proxy."""

    def __init__(self, elsewhere: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.arguments = (*self.arguments, "--cluster-announce-port", str(elsewhere))


@pytest.mark.parametrize("kind", STORES)
async def test_all_that_share_a_call_are_told_of_a_wrong_answer(tmp_path: Path, kind: str) -> None:
    """Nobody waits for ever, callers of other nodes notice nothing, and then calls are shared again."""
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(0)) for _ in range(3)]
        elsewhere = iter([proxy.port for proxy in proxies])
        nodes = Cluster(kind, tmp_path, server=lambda *all_: Announced(next(elsewhere), *all_))
        for proxy, node in zip(proxies, nodes.nodes, strict=True):
            proxy.server_port = node.port
        stack.callback(nodes.stop)
        await asyncio.to_thread(nodes.start)
        names = [f"caller {n}" for n in range(3 * TOGETHER)]
        charges = [Charge([slots(9, of=name)]) for name in names]
        backend = await stack.enter_async_context(opened(nodes.url, 2.0))

        async def share() -> bool:
            return await serves(backend, names) and await calls_for(backend, names) == len(proxies)

        await eventually(share)
        for spoil in ("a list for an answer", "one answer too many"):
            proxies[0].change = spoiler = Spoiler(SPOILT[spoil])
            async with asyncio.timeout(30):
                answers = await asyncio.gather(
                    *[backend.acquire(charge, new_id()) for charge in charges], return_exceptions=True
                )
            proxies[0].change = None
            assert spoiler.spoilt == 1
            failed = {
                name for name, each in zip(names, answers, strict=True) if isinstance(each, BackendError)
            }
            assert failed == {name for name in names if slot_of(name) <= LAST_OF_FIRST}
            for answer in answers:
                if isinstance(answer, Outcome):
                    await backend.finish(answer.reservation, EstimateAction.UNTOUCHED)
            await eventually(share)

        async def are_free() -> bool:
            return not any([any((await peeked(backend, charge)).counted) for charge in charges])

        await eventually(are_free)


async def test_requests_of_one_node_share_a_call(cluster: Cluster) -> None:
    """Requests that come at once take one call for each node, whatever the hash slots of their callers."""
    on_first, on_second = (callers_on(cluster, node) for node in cluster.nodes[:2])
    async with opened(cluster.url) as backend:
        await grouped(backend, on_first)
        await grouped(backend, on_second)
        assert await calls_for(backend, on_first + on_second) == 2


async def test_nodes_get_one_call_of_the_script_for_many_callers(cluster: Cluster) -> None:
    """The server's own count of calls says the same."""
    node = cluster.nodes[0]
    names = callers_on(cluster, node)
    async with opened(cluster.url) as backend:
        await grouped(backend, names)
        with node.client() as client:
            client.config_resetstat()
            await asyncio.gather(*[backend.acquire(hourly(name), new_id()) for name in names])
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
        assert [(await peeked(backend, hourly(name))).used(0) for name in names] == [1] * TOGETHER


class Caller:
    """One operation of each kind at once, of a caller with limits of each kind, and what they came to."""

    def __init__(self, backend: ClusterBackend, name: str) -> None:
        self.backend = backend
        self.charge = Charge(
            [
                window(1_000, of=name),
                window(1_000, 1, "hour", of=name),
                slots(100, of=name),
                daily(10**9, of=name),
                metered(10_000, 60, of=name),
            ],
            estimates={"tokens": 100},
        )
        self.plain = Charge([window(1_000, of=name), window(1_000, 1, "hour", of=name), slots(100, of=name)])

    async def prepare(self) -> None:
        """Have some requests under way."""
        self.outcomes = [await self.backend.acquire(self.charge, new_id(), 100) for _ in range(5)]
        self.plain_outcome = await self.backend.acquire(self.plain, new_id())

    async def one_of_each(self) -> list[bool | Settlement]:
        """Charge, settle, end, give back and renew, all at once."""
        backend = self.backend
        priced, metered_, ending, undone, renewed = self.outcomes
        backend.give_back(self.plain, self.plain_outcome.reservation, [self.plain_outcome.now])
        backend.give_back(self.charge, undone.reservation, [undone.now])
        charged = [
            asyncio.ensure_future(backend.acquire(charge, new_id(), price))
            for charge, price in ((self.charge, 100), (self.plain, 0))
        ]
        settled = (
            backend.settle(priced.reservation, 40),
            backend.settle_units(metered_.reservation, {"tokens": 30}),
        )
        finished = backend.finish(ending.reservation, EstimateAction.GIVE_BACK)
        kept = backend.hold_estimate(renewed.reservation)
        renewal = asyncio.ensure_future(backend.renew(renewed.reservation, 60.0))

        outcomes = await asyncio.gather(*charged)
        await asyncio.gather(*[asyncio.ensure_future(each) for each in (finished, kept)])
        return [*[each.admitted for each in outcomes], *[await each for each in settled], await renewal]

    async def books(self) -> list[int]:
        """Units, slots, money and tokens that are counted."""
        answer = await peeked(self.backend, self.charge)
        return [*answer.counted, answer.held(3)]


@pytest.mark.parametrize("keys_moved", [0, 1, 4, 1_000, None], ids=["none", "one", "some", "all", "closed"])
async def test_operations_stay_exact_beside_a_slot_that_moves(
    cluster: Cluster, keys_moved: int | None
) -> None:
    """Operations of each kind, of callers of one node, while one's slot is moving: each is done once."""
    source, target = cluster.nodes[:2]
    names = callers_on(cluster, source, 6)
    slot = slot_of(names[2])
    async with opened(cluster.url) as backend:
        await grouped(backend, names)
        callers = [Caller(backend, name) for name in names]
        for caller in callers:
            await caller.prepare()
        cluster.open_migration(slot, target)
        move(slot, source, target, 1_000 if keys_moved is None else keys_moved)
        if keys_moved is None:
            cluster.close_migration(slot, target)
        doing = asyncio.gather(*[caller.one_of_each() for caller in callers])
        await asyncio.sleep(0.1)
        if keys_moved is not None:
            await asyncio.to_thread(cluster.move_keys, slot, source, target)
            await asyncio.to_thread(cluster.close_migration, slot, target)
        expected = [True, True, Settlement.SETTLED, Settlement.SETTLED, True]
        assert await doing == [expected] * len(names)
        books = [6, 6, 5, 40, 330, 300]

        async def are_right() -> bool:
            return [await caller.books() for caller in callers] == [books] * len(names)

        with contextlib.suppress(AssertionError):
            await eventually(are_right, 5)
        assert [await caller.books() for caller in callers] == [books] * len(names)


class Load:
    """Requests of callers with a quota and two slots each, until all quotas are used up."""

    def __init__(self, backends: list[ClusterBackend], names: list[str]) -> None:
        self.charges = {
            name: Charge([window(QUOTA, 1, "hour", of=name), slots(2, of=name)]) for name in names
        }
        self.admitted = dict.fromkeys(names, 0)
        self.running = dict.fromkeys(names, 0)
        self.most_running = 0
        self.failed = 0
        self._tasks = [
            asyncio.create_task(self._run(backend, name))
            for name in names
            for backend in backends
            for _ in range(3)
        ]

    @property
    def is_over(self) -> bool:
        """Whether all quotas are used up."""
        return all(task.done() for task in self._tasks)

    async def end(self) -> None:
        """Wait until all quotas are used up; raises what a request should not have raised."""
        await asyncio.gather(*self._tasks)

    async def _run(self, backend: ClusterBackend, name: str) -> None:
        while True:
            try:
                outcome = await backend.acquire(self.charges[name], new_id())
            except BackendError:
                self.failed += 1
                await asyncio.sleep(0.01)
                continue
            if outcome.admitted:
                self.admitted[name] += 1
                self.running[name] += 1
                self.most_running = max(self.most_running, self.running[name])
                await asyncio.sleep(0.001)
                self.running[name] -= 1
                await backend.finish(outcome.reservation, EstimateAction.KEEP)
            elif outcome.used(0) >= QUOTA:
                return
            await asyncio.sleep(0.002)


QUOTA = 150


async def test_nobody_is_admitted_twice_while_slots_move_key_by_key(cluster: Cluster) -> None:
    """Under load, slots of some callers move to and fro: all get their quota, none more than that."""
    names = [name for node in cluster.nodes[:2] for name in callers_on(cluster, node, 6)]
    async with opened(cluster.url, 20) as one, opened(cluster.url, 20) as two:
        for backend in (one, two):
            await grouped(backend, names[:6])
        load = Load([one, two], names)
        for name in itertools.cycle(names[3:9]):
            if load.is_over:
                break
            await move_slowly(cluster, slot_of(name))
        await load.end()
        assert load.admitted == dict.fromkeys(names, QUOTA)
        assert load.most_running <= 2
        assert load.failed == 0
        assert [(await peeked(one, load.charges[name])).counted for name in names] == [[QUOTA, 0]] * 12


async def test_nobody_is_admitted_twice_while_slots_move_as_a_whole(
    shared_cluster: Callable[[str], Cluster],
) -> None:
    """Slots that a server moves by itself, all keys at one moment as Valkey 9 does, admit nobody twice."""
    cluster = shared_cluster("valkey")
    names = [name for node in cluster.nodes[:2] for name in callers_on(cluster, node, 6)]
    async with opened(cluster.url, 20) as one, opened(cluster.url, 20) as two:
        for backend in (one, two):
            await grouped(backend, names[:6])
        load = Load([one, two], names)
        moves = 0
        for name in itertools.cycle(names[3:9]):
            if load.is_over:
                break
            moves += await asyncio.to_thread(move_whole, cluster, slot_of(name))
        await load.end()
        assert moves > 3
        assert load.admitted == dict.fromkeys(names, QUOTA)
        assert load.most_running <= 2
        assert load.failed == 0
        assert [(await peeked(one, load.charges[name])).counted for name in names] == [[QUOTA, 0]] * 12


@pytest.mark.slow
@pytest.mark.parametrize("end", ["planned", "killed"])
@pytest.mark.parametrize("kind", STORES)
async def test_quotas_hold_while_a_replica_takes_over(tmp_path: Path, kind: str, end: str) -> None:
    """A planned fail-over takes and gives no unit; a primary that is killed loses those of a second."""
    cluster = Cluster(kind, tmp_path, replicas=1)
    with running(cluster):
        names = callers_on(cluster, cluster.nodes[0])
        async with opened(cluster.url, 20) as one, opened(cluster.url, 20) as two:
            for backend in (one, two):
                await grouped(backend, names)
            load = Load([one, two], names)
            await asyncio.sleep(0.1)
            if end == "killed":
                cluster.nodes[0].kill()
            else:
                with cluster.nodes[3].client() as client:
                    client.execute_command("CLUSTER", "FAILOVER")
            await load.end()
            admitted = load.admitted.values()
            if end == "killed":
                assert sum(admitted) <= QUOTA * len(names) + MOST_LOST
            else:
                assert set(admitted) == {QUOTA}
                assert load.most_running <= 2
            await eventually(lambda: serves(one, names))
            used = [(await peeked(one, load.charges[name])).used(0) for name in names]
            assert max(used) <= QUOTA
            assert sum(used) >= QUOTA * len(names) - (MOST_LOST if end == "killed" else 0)
            await grouped(one, names)


MOST_LOST = 400
"""Units that a primary may take with it: what it had admitted and not handed on."""


async def test_a_server_that_refuses_other_slots_gets_a_call_for_each_caller(
    shared_cluster: Callable[[str], Cluster],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Valkey refuses it to scripts that begin with `#!lua`: nothing fails, and the log says so once."""
    cluster = shared_cluster("valkey")
    script = b"#!lua\n" + calls.SCRIPT
    digest = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
    monkeypatch.setattr(calls, "_BY_TEXT", bulk(b"EVAL") + bulk(script))
    monkeypatch.setattr(calls, "_BY_DIGEST", bulk(b"EVALSHA") + bulk(digest))
    names = [callers_on(cluster, node) for node in cluster.nodes[:2]]
    async with opened(cluster.url) as backend:

        async def is_told() -> bool:
            await calls_for(backend, names[0])
            return "do not hash to the same slot" in caplog.text

        await eventually(is_told)
        assert await calls_for(backend, names[0]) == TOGETHER
        for of_node in names:
            await asyncio.gather(*[backend.acquire(hourly(name), new_id()) for name in of_node])
            assert [(await peeked(backend, hourly(name))).used(0) for name in of_node] == [1] * TOGETHER
        assert backend.error is None
    assert caplog.text.count("each caller needs a call of its own") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_servers_that_do_not_know_what_they_serve_get_a_call_for_each_caller(
    shared_server: Callable[[str], StoreServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Plain servers behind a proxy that shares out slots would write a key wherever a call goes."""
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(Proxy(shared_server(kind).port)) for kind in ("redis", "valkey")
        ]
        halves = zip(((0, 8191), (8192, 16383)), proxies, strict=True)
        ranges = [
            b"*3\r\n:%d\r\n:%d\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\nx\r\n" % (*half, proxy.port)
            for half, proxy in halves
        ]
        for proxy in proxies:
            proxy.change = lambda data: (
                b"*2\r\n" + b"".join(ranges) if b"cluster support disabled" in data else data
            )
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies)
        names = [name for name in (f"caller {n}" for n in range(100)) if slot_of(name) < 8192][:TOGETHER]
        async with opened(url) as backend:

            async def is_told() -> bool:
                await calls_for(backend, names)
                return "other nodes serve" in caplog.text

            await eventually(is_told)
            assert await calls_for(backend, names) == TOGETHER


def move(slot: int, source: StoreServer, target: StoreServer, number: int) -> int:
    """Move so many keys of a slot that is being moved; how many there were."""
    with source.client() as client:
        keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, number) if number else []
        if keys:
            client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
    return len(keys)


async def move_slowly(cluster: Cluster, slot: int) -> None:
    """Move a slot to the next node, one key after the other."""
    source = cluster.owner_of(slot)
    target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
    await asyncio.to_thread(cluster.open_migration, slot, target)
    while await asyncio.to_thread(move, slot, source, target, 1):
        await asyncio.sleep(0.005)
    await asyncio.to_thread(cluster.close_migration, slot, target)


def move_whole(cluster: Cluster, slot: int) -> bool:
    """Have a slot's node move it to the next node by itself, and wait for that."""
    source = cluster.owner_of(slot)
    target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
    with source.client() as client:
        client.execute_command(
            "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", cluster.id_of(target)
        )
    wait_until(lambda: cluster.owner_of(slot) is target, "slot")
    return True
