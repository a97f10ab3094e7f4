"""Admissions of an outage are told to the backend once each and in order, whatever gets lost between."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from ratelimit_mw import BackendError, Lease, Limiter
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import Settlement, UnderWay
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import BudgetStatus
from tests.support.asgi import settings_of
from tests.support.conformance import eventually
from tests.support.servers import StoreServer
from tests.support.statuses import counted
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

SETTINGS = """
[plans.default]
requests = ["9000/minute"]
concurrent = 50
spending = { daily = "100.00" }
units = { tokens = ["100000/minute", "1000000/day"] }
[application]
requests = ["9000/hour"]
[[routes]]
path = "/chat"
units = { tokens = 300 }
price = "0.10"
"""
CENT = 10_000

Meanwhile = Callable[[Charge], Awaitable[None]]


async def _nothing(_charge: Charge) -> None:
    """Nothing happens meanwhile."""


class Faults:
    """Faults of a backend that a test controls: it is away, or answers of what it has done are lost."""

    def __init__(self) -> None:
        self.is_gone = True
        self.answers_lost = 0
        """Number of answers that are lost from now on, of charges that are told."""
        self.meanwhile: Meanwhile = _nothing
        """Called before the answer to a charge that was told arrives."""

    def check(self) -> None:
        """Fail where the backend is gone."""
        if self.is_gone:
            raise BackendError("nobody answers")

    async def answer(self, charge: Charge, outcome: Outcome) -> Outcome:
        """Return the outcome, unless it is lost."""
        await self.meanwhile(charge)
        if self.answers_lost:
            self.answers_lost -= 1
            raise BackendError("its answer was lost")
        return outcome


def with_faults(backend_class: Any) -> Any:
    """Make a class of backends with faults."""

    class Faulty(backend_class):  # type: ignore[misc]
        faults: Faults

        def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Any:
            """Ask the backend, unless it is gone."""
            self.faults.check()
            return super().ask(charge, lease_id, price)

        async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
            """Charge, and lose the answer perhaps."""
            self.faults.check()
            return await self.faults.answer(charge, await super().acquire(charge, lease_id, price))

        async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
            """Charge once, and lose the answer perhaps."""
            self.faults.check()
            return await self.faults.answer(charge, await super().restore(charge, lease_id, price))

    return Faulty


FaultyServer, FaultyCluster = with_faults(RedisBackend), with_faults(ClusterBackend)


class Outage:
    """A limiter whose backend is gone until the test says that it is back."""

    def __init__(self, backend: Any) -> None:
        self.faults = backend.faults = Faults()
        self.limiter = Limiter(settings_of(SETTINGS), backend=backend)
        self.reconciler = self.limiter.engine.decider.local.reconciler

    async def chat(self, api_key: str = "a") -> Lease:
        """Admit one request in this process alone."""
        lease = await self.limiter.acquire(api_key=api_key, path="/chat")
        assert (lease.allowed, lease.decision.policy) == (True, "local")
        return lease

    def end(self, lease: Lease, *, failed: bool = False) -> None:
        """End a request as the middleware does."""
        self.limiter.engine.leases.end(lease, failed)

    async def is_told(self) -> bool:
        """Whether the backend knows all."""
        return len(self.reconciler) == 0 and self.limiter.stats().load.owed == 0

    async def back(self) -> None:
        """The backend is there again, and learns of all."""
        self.faults.is_gone = False
        await eventually(self.is_told)

    async def figures(self) -> list[int]:
        """Requests, slots, cents and tokens (in two windows) of the caller, and requests of all callers."""
        engine = self.limiter.engine
        policy = engine.policies.match(engine.identity_of(api_key="a"), "GET", "/")
        statuses = [status for _, status in (await engine.peek(policy)).limits]
        return [counted(status) // (CENT if isinstance(status, BudgetStatus) else 1) for status in statuses]

    async def has_used(self, figures: list[int]) -> bool:
        """Whether these are the figures."""
        return await self.figures() == figures


@pytest.fixture(params=["server", "cluster"])
async def outage(
    request: pytest.FixtureRequest,
    kind: str,
    shared_server: Callable[[str], StoreServer],
    shared_cluster: Callable[[str], Cluster],
) -> AsyncIterator[Outage]:
    """An outage of each kind of backend."""
    if request.param == "server":
        made = Outage(FaultyServer(shared_server(kind).url, timeout=5))
    else:
        made = Outage(FaultyCluster(shared_cluster(kind).url, timeout=5))
    async with made.limiter:
        yield made


async def test_a_lost_answer_counts_nothing_twice(outage: Outage) -> None:
    """Requests that have ended, of every kind: told again where the answer was lost, and counted once."""
    settled, kept, failed = [await outage.chat() for _ in range(3)]
    await settled.settle("0.03", units={"tokens": 70})
    for lease in (settled, kept, failed):
        outage.end(lease, failed=lease is failed)
    outage.faults.answers_lost = 9
    await outage.back()
    assert await outage.figures() == [3, 0, 13, 370, 370, 3]


async def test_a_lost_answer_counts_a_running_request_once(outage: Outage) -> None:
    """Told again where the answer was lost; its end finds it."""
    lease = await outage.chat()
    outage.faults.answers_lost = 9
    await outage.back()
    assert await outage.figures() == [1, 1, 0, 300, 300, 1]
    await lease.settle("0.03", units={"tokens": 7_000})
    outage.end(lease)
    await eventually(outage.is_told)
    assert await outage.figures() == [1, 0, 3, 7_000, 7_000, 1]


async def test_counts_that_come_while_others_are_told_again(outage: Outage) -> None:
    """Each is told once: those whose answer was lost, and those that were admitted since."""

    async def admit_another(charge: Charge) -> None:
        if outage.faults.answers_lost:
            outage.faults.is_gone = True
            outage.end(await outage.chat())
            outage.faults.is_gone = False

    outage.end(await outage.chat())
    outage.faults.answers_lost, outage.faults.meanwhile = 5, admit_another
    await outage.back()
    assert await outage.figures() == [6, 0, 60, 1_800, 1_800, 6]


async def test_an_end_comes_after_the_settle_that_is_told(outage: Outage) -> None:
    """A request that fails while its settles are told, of money and units, has used what it has settled."""
    lease = await outage.chat()
    await lease.settle("0.03", units={"tokens": 70})
    backend = outage.limiter.engine.backend
    settle = backend.settle

    def settle_and_end(
        reservation: Reservation, amount: int, *, replace: bool = False
    ) -> UnderWay[Settlement]:
        sent = settle(reservation, amount, replace=replace)
        outage.end(lease, failed=True)
        return sent

    backend.settle = settle_and_end  # type: ignore[method-assign]
    await outage.back()
    assert await outage.figures() == [1, 0, 3, 70, 70, 1]


async def test_a_request_that_ends_while_others_are_told_counts(
    outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two requests of a caller one has ended, and the other ends when its units were just told."""
    monkeypatch.setattr("ratelimit_mw._internal.outage.reconcile.AT_ONCE", 1)
    ended, running = await outage.chat(), await outage.chat()
    outage.end(ended)
    outage.end(await outage.chat("b"))

    async def end(charge: Charge) -> None:
        counter = charge.counters[0]
        if (
            counter.partition not in {running.initial_charge.own_partition, "app"}
            and "tokens" in counter.scope
        ):
            outage.end(running)

    outage.faults.meanwhile = end
    await outage.back()
    assert running.is_ended
    assert await outage.figures() == [2, 0, 20, 600, 600, 3]


async def test_an_end_of_the_process_within_an_outage_waits_for_its_end(outage: Outage) -> None:
    """An outage that is over within the time that closing has is told when it is over."""
    outage.end(await outage.chat())
    asyncio.get_running_loop().call_later(0.2, setattr, outage.faults, "is_gone", False)
    await outage.limiter.close()
    assert outage.reconciler.lost == 0
    assert await outage.figures() == [1, 0, 10, 300, 300, 1]


@pytest.mark.parametrize("kind_of_lease", ["priced", "unpriced"])
async def test_a_settle_comes_before_an_end_of_the_same_moment(outage: Outage, kind_of_lease: str) -> None:
    """A handler is cancelled when it has just begun to settle: what it has settled counts."""
    outage.faults.is_gone = False
    path = "/chat" if kind_of_lease == "priced" else "/other"
    lease = await outage.limiter.acquire(api_key="a", path=path)

    async def handle() -> None:
        try:
            await lease.settle("0.03", units={"tokens": 7_000})
        finally:
            outage.end(lease)

    handler = asyncio.ensure_future(handle())
    await asyncio.sleep(0)
    handler.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handler
    await eventually(lambda: outage.has_used([1, 0, 3, 7_000, 7_000, 1]))
