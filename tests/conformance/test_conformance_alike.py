"""Charges and releases that differ in their ids alone: sent as one, and decided as if each had come alone."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.backlog import MAX_BATCH
from ratelimit_mw._internal.model.backend import EstimateAction, OperationRefusedError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Slots
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import Reservation
from tests.conftest import StartServer
from tests.support.conformance import Bench, eventually, new_id, slots, window
from tests.support.oracle import Oracle
from tests.support.servers import StoreServer
from tests.support.slots import until_async
from tests.support.statuses import peeked
from tests.support.topologies import Cluster

NO_COST: Any = 1.5
"""A cost that the script refuses."""

Step = tuple[Charge, bytes | None]
"""A charge and its lease id; None to look only."""

PLACES = st.tuples(
    st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]), st.integers(1, 30), st.sampled_from([1, 1, 1, 0])
)
WAITS = st.sampled_from([0, 0, 1, 7, 1_000_000, 29_000_000, 31_000_000, 60_000_000, 61_000_000])
MOMENTS = st.lists(
    st.tuples(WAITS, st.lists(PLACES, min_size=1, max_size=8), st.integers(0, 12)), min_size=1, max_size=7
)


def charges_of(name: str) -> list[Charge]:
    """Some callers' charges, also of one caller with other costs and limits, and of one that all share."""
    shared = Counter(f"{name} app", "app", slots(9).limit, "everyone")
    own, large = window(25, of=name), window(2_000, of=name, scope="r")
    return [
        Charge([own, window(60, 1, "hour", of=name), slots(20, of=name)]),
        Charge([own], cost=3),
        Charge([large, slots(7, of=name, lease=45.5)], cost=90),
        Charge([window(40, of=f"{name} b"), shared]),
        Charge([window(30, of=f"{name} c"), shared], cost=2),
        Charge([slots(3, of=f"{name} d", lease=30.5)]),
    ]


def in_their_order(steps: Sequence[Step]) -> list[int]:
    """Places of steps as they are decided: those that are alike where the first of them stands."""
    alike: dict[object, list[int]] = {}
    for place, (charge, lease_id) in enumerate(steps):
        alike.setdefault(place if lease_id is None else charge, []).append(place)
    return [place for places in alike.values() for place in places]


@pytest.fixture
def bench(
    kind: str, shared_server: Any
) -> Iterator[tuple[Bench, asyncio.Runner, StoreServer, Iterator[int]]]:
    """Two backends on a server of each kind, their event loop, and a number for each example."""
    with asyncio.Runner() as runner:
        server = shared_server(kind)
        bench = Bench(kind, server)
        bench.another()
        for backend in bench.backends:
            runner.run(backend.open())
        yield bench, runner, server, itertools.count()
        runner.run(bench.close())


class Comparison:
    """Equal charges made in one batch, made one by one, and checked against the oracle."""

    def __init__(self, bench: Bench, server: StoreServer, name: str) -> None:
        self.bench = bench
        self.server = server
        self.name = name
        self.together = charges_of(f"{name} together")
        self.alone = charges_of(f"{name} alone")
        self.oracle = Oracle(bench.clock.now)
        self.held: list[tuple[Reservation, Reservation]] = []

    async def moment(self, places: Sequence[tuple[int, int, int]], n_releases: int) -> None:
        """Make charges, and release some that were admitted before, at once."""
        numbers = [(place, charged) for place, times, charged in places for _ in range(times)]
        numbers = numbers[: MAX_BATCH - n_releases]
        ids = [new_id() if charged else None for _, charged in numbers]
        steps = [(self.together[place], id_) for (place, _), id_ in zip(numbers, ids, strict=True)]
        released, self.held = self.held[:n_releases], self.held[n_releases:]
        outcomes = await self._at_once(steps, [reservation for reservation, _ in released])
        for reservation, reservation_alone in released:
            self.oracle.finish([held[:2] for held in reservation.slots], reservation.id, EstimateAction.KEEP)
            await self.bench.backends[1].finish(reservation_alone, EstimateAction.KEEP)
        for at in in_their_order(steps):
            charge, lease_id = steps[at]
            got = outcomes[at]
            self.oracle.check(list(charge.counters), charge.cost, 0, lease_id, got)
            twin = await _decided(self.bench.backends[1], (self.alone[numbers[at][0]], lease_id))
            assert got.admitted == twin.admitted
            for counter, status, of_twin in zip(
                charge.counters, charge.statuses(got), charge.statuses(twin), strict=True
            ):
                assert status == of_twin or isinstance(counter.limit, Slots)  # where expired ones may count
            if got.reservation.slots:
                self.held.append((got.reservation, twin.reservation))

    async def _at_once(self, steps: Sequence[Step], releases: Sequence[Reservation]) -> list[Outcome]:
        async def release(reservation: Reservation) -> None:
            await self.bench.backends[0].finish(reservation, EstimateAction.KEEP)

        before = self.bench.backends[0].load.batches
        deciding = [_decided(self.bench.backends[0], step) for step in steps]
        outcomes = await asyncio.gather(*deciding, *map(release, releases))
        assert self.bench.backends[0].load.batches - before == 1
        return [outcome for outcome in outcomes if outcome is not None]

    def check_state(self) -> None:
        """Whether what is stored of both ways is the same, but for leases that have expired."""
        with self.server.client() as client:
            for key in client.scan_iter(f"ratelimit:{{{self.name} together*"):
                twin = key.replace(b"together", b"alone")
                if client.type(key) == b"zset":
                    live = (f"({self.oracle.now}", "+inf")
                    assert client.zrangebyscore(key, *live) == client.zrangebyscore(twin, *live)
                else:
                    assert client.get(key) == client.get(twin)


async def _decided(backend: Any, step: Step) -> Outcome:
    charge, lease_id = step
    outcome: Outcome = await (backend.peek(charge) if lease_id is None else backend.acquire(charge, lease_id))
    return outcome


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(moments=MOMENTS)
def test_a_batch_of_charges_alike_is_decided_as_if_they_came_one_by_one(
    bench: tuple[Bench, asyncio.Runner, StoreServer, Iterator[int]],
    moments: list[tuple[int, list[tuple[int, int, int]], int]],
) -> None:
    """Mixed with other callers, costs, looks and releases: the same answers and the same state."""
    backends, runner, server, numbers = bench
    comparison = Comparison(backends, server, f"example {next(numbers)}")
    for wait, places, n_releases in moments:
        backends.wait(microseconds=wait)
        comparison.oracle.now = backends.clock.now
        runner.run(comparison.moment(places, n_releases))
    comparison.check_state()


ALIKE = Charge([window(1_000), window(9_000, 1, "hour"), slots(1_000)], cost=2)
SLOTS_KEY = "ratelimit:{caller}:s:p"


@pytest.fixture
async def backend(server: StoreServer) -> AsyncIterator[RedisBackend]:
    """A connected backend on each kind of server."""
    backend = RedisBackend(server.url, timeout=5)
    await backend.open()
    yield backend
    await backend.close()


async def finished(backend: RedisBackend, reservations: Sequence[Reservation]) -> list[object]:
    """Release holds in one moment; return each result or exception."""

    async def release(reservation: Reservation) -> None:
        await backend.finish(reservation, EstimateAction.KEEP)

    return await asyncio.gather(*map(release, reservations), return_exceptions=True)


def arguments(line: bytes | str) -> list[str]:
    """Return the arguments of a command in a line of `MONITOR`, where bytes may be blanks and quotes."""
    text = line.decode("latin-1") if isinstance(line, bytes) else line
    return re.findall(r'"((?:[^"\\]|\\.)*)"', text)


async def test_charges_alike_cost_what_one_costs(server: StoreServer, backend: RedisBackend) -> None:
    """However many there are in a batch, they are one argument of one call and one command for each key."""
    ids = [new_id() for _ in range(40)]
    with server.client() as client, client.monitor() as monitor:
        outcomes = await asyncio.gather(*[backend.acquire(ALIKE, each) for each in ids])
        await finished(backend, [outcome.reservation for outcome in outcomes])
        client.echo("the end")
        commands = list(iter(lambda: arguments(monitor.connection.read_response()), ["ECHO", "the end"]))
    of_call = 3  # the digest, the number of keys, the time
    assert [
        (name, len(rest)) for name, *rest in commands if name in ("EVALSHA", "ZCARD", "ZADD", "ZREM")
    ] == [
        ("EVALSHA", of_call + 3 + 1),
        ("ZCARD", 1),
        ("ZADD", 1 + 2 * 40),
        ("ZREM", 1 + 40),  # a plain command, as it does the same
    ]


async def test_who_is_cancelled_among_others_alike_gives_back_what_is_theirs(
    server: StoreServer, backend: RedisBackend
) -> None:
    """Each one's own slot and units, though all were taken by one command; the others keep theirs."""
    ids = [new_id() for _ in range(30)]
    for turns in (1, 2, 3):  # before they leave, under way, and when the answer may have come
        tasks = [asyncio.ensure_future(backend.acquire(ALIKE, lease_id)) for lease_id in ids]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [outcome.reservation for outcome in results if isinstance(outcome, Outcome)]
        assert [reservation.id for reservation in kept] == [
            each for place, each in enumerate(ids) if place % 3
        ]

        async def only_the_others_are_left(kept: list[Reservation] = kept) -> bool:
            return (await peeked(backend, ALIKE)).counted == [2 * len(kept), 2 * len(kept), len(kept)]

        await eventually(only_the_others_are_left)
        with server.client() as client:
            assert sorted(client.zrange(SLOTS_KEY, 0, -1)) == sorted(reservation.id for reservation in kept)
        await finished(backend, kept)
        await backend.reset(ALIKE)


async def test_an_error_reaches_all_who_are_alike_and_nobody_else(
    server: StoreServer, backend: RedisBackend
) -> None:
    """A charge that the script refuses fails, with each that is like it, and nothing of them is counted."""
    wrong, other = Charge(ALIKE.counters, cost=NO_COST), Charge([window(9, of="other")])
    charges = [wrong, other, wrong, other, wrong]
    results = await asyncio.gather(
        *[backend.acquire(charge, new_id()) for charge in charges], return_exceptions=True
    )
    assert [type(result) for result in results] == [
        OperationRefusedError, Outcome, OperationRefusedError, Outcome, OperationRefusedError
    ]  # fmt: skip
    assert backend.load.failed == 3
    assert (await peeked(backend, ALIKE)).counted == [0, 0, 0]
    assert (await peeked(backend, other)).used(0) == 2


async def test_releases_alike_that_a_replica_refuses_are_owed_on(
    kind: str, start_server: StartServer
) -> None:
    """Each of them is sent again, beside charges that fail, until a server takes writes."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=5)
    outcomes = await asyncio.gather(*[backend.acquire(ALIKE, new_id()) for _ in range(12)])
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        releasing = asyncio.ensure_future(finished(backend, [outcome.reservation for outcome in outcomes]))

        await until_async(lambda: backend.error is not None)
        assert backend.load.owed == 12
        client.replicaof("NO", "ONE")
    assert await releasing == [None] * 12
    await until_async(lambda: backend.error is None)
    assert (await peeked(backend, ALIKE)).used(2) == 0
    await backend.close()


async def test_charges_alike_on_a_cluster(cluster: Cluster) -> None:
    """Each node decides its partition's as one; where a later partition refuses, each is undone by itself."""
    backend = ClusterBackend(cluster.url, timeout=5)
    own = Charge([window(30), slots(50)], cost=2)
    shared = Charge([window(99, of="another"), slots(20, of="app")])
    outcomes = await asyncio.gather(*[backend.acquire(own, new_id()) for _ in range(40)])
    assert [outcome.used(0) for outcome in outcomes] == [min(2 * n, 30) for n in range(1, 41)]
    assert [outcome.admitted for outcome in outcomes] == [n <= 15 for n in range(1, 41)]
    both = await asyncio.gather(*[backend.acquire(shared, new_id()) for _ in range(40)])
    assert sum(outcome.admitted for outcome in both) == 20

    async def refused_ones_are_undone() -> bool:
        return (await peeked(backend, shared)).counted == [20, 20]

    await eventually(refused_ones_are_undone)
    for outcome in (*outcomes, *both):
        await backend.finish(outcome.reservation, EstimateAction.KEEP)
    for charge in (own, shared):
        assert (await peeked(backend, charge)).used(1) == 0
    await backend.close()
