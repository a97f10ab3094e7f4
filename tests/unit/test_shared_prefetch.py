"""Units of limits that all callers share, taken ahead: all limits of a request are charged, or none."""

import asyncio
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit_mw import Identity, Limit, Limiter, RateLimited, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.cache.prefetch_state import PrefetchState
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from ratelimit_mw._internal.policy.policy import Policy
from tests.conformance.test_contention import most_in
from tests.support.asgi import settings_of
from tests.support.conformance import Clock

SHARE = 0.5
TEXT = """
    identity.hash_secret = "a secret of some length, for tests alone"
    backend.on_failure = "{on_failure}"
    application.requests = ["{application}"]
    application.prefetch = true
    [plans.default]
    requests = ["{own}"]
    [plans.half]
    requests = ["{own}"]
    application_share = {share}
    [plans.slots]
    concurrent = 2
    [plans.ahead]
    requests = ["{own}"]
    prefetch = true
    [plans.tokens]
    units.tokens = ["{own}"]
    [plans.money]
    spending.daily = "1000.00"
    [[routes]]
    path = "/total"
    total = ["{total}"]
    total_prefetch = true
    [[routes]]
    path = "/two"
    cost = 2
    [[routes]]
    path = "/priced"
    price = "0.01"
    units.tokens = 3
"""
PLANS = ("default", "half", "slots", "ahead", "tokens", "money")
PATHS = ("/", "/total", "/two", "/priced")


def said_with(**values: object) -> Settings:
    """The settings of these tests, with other amounts."""
    amounts = {"application": "500/second", "total": "300/second", "own": "100000/second"}
    said = {**amounts, "share": SHARE, "on_failure": "deny", **values}
    return settings_of(TEXT.format(**said))


class Admission(NamedTuple):
    """A request that was admitted, as the oracle remembers it."""

    at: int
    cost: int
    caller: str
    plan: str
    path: str


@dataclass
class World:
    """Real time, a server whose clock may be stepped, and everything that was admitted."""

    now: int = 10**9
    clock: Clock = field(default_factory=Clock)
    admitted: list[Admission] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = MemoryBackend(clock=self.clock)

    def pass_by(self, microseconds: int) -> None:
        """Let time pass for everybody."""
        self.now += microseconds
        self.clock.now += microseconds

    def most(self, length: int = SECOND, **alike: str) -> int:
        """The most units that some interval of this length holds, of requests that are alike in this."""
        ledger = [
            (each.at, each.cost)
            for each in self.admitted
            if all(getattr(each, name) == value for name, value in alike.items())
        ]
        return most_in(ledger, length) if ledger else 0


class Remote:
    """The server as one worker sees it: answers come in a later turn, and may be lost."""

    def __init__(self, world: World) -> None:
        self.server = world.server
        self.asked: list[Charge] = []
        self.is_away = False
        self.loses = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> "RemoteCharge":
        """Have a charge on its way."""
        if self.is_away:
            raise BackendError("away")
        self.asked.append(charge)
        return RemoteCharge(self, charge, lease_id, price)

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge, and wait for the outcome."""
        return await self.ask(charge, lease_id, price)


class RemoteCharge:
    """A charge on its way to the server."""

    def __init__(self, remote: Remote, charge: Charge, lease_id: bytes, price: int) -> None:
        self._remote, self._charge, self._lease_id, self._price = remote, charge, lease_id, price
        self._outcome: Outcome | None = None

    def __await__(self) -> Generator[Any, None, Outcome]:
        self._outcome = self._remote.server.ask(self._charge, self._lease_id, self._price)
        yield  # others have a turn
        if self._remote.loses:
            raise BackendError("lost")
        return self._outcome

    def give_up(self) -> None:
        """Undo it."""
        outcome = self._outcome
        if outcome is not None and outcome.admitted:
            self._remote.server.give_back(self._charge, outcome.reservation, (outcome.now,))


class Worker:
    """A process of its own that serves requests."""

    def __init__(self, world: World, said: Settings) -> None:
        self.world = world
        self.remote = Remote(world)
        self.limiter = Limiter(said, backend=self.remote)
        self.engine = self.limiter.engine
        self.engine.prefetch.now = self.engine.refusals.now = lambda: world.now / SECOND
        self.engine.decider.local = LocalPolicy(self.remote, clock=world.clock)

    def policy(self, plan: str, path: str, caller: str = "") -> Policy:
        """The policy of a caller on this path."""
        return self.engine.policies.match(Identity(f"k:{caller or plan}", plan), "GET", path)

    async def request(self, plan: str = "default", path: str = "/", caller: str = "") -> Lease:
        """One request; a request without delay is admitted at one moment, which the oracle writes down."""
        policy = self.policy(plan, path, caller)
        at = self.world.now
        lease = await self.engine.charge(policy)
        if lease.allowed and lease.decision.policy == "shared":
            cost = policy.charge.cost
            self.world.admitted.append(Admission(at, cost, policy.identity.partition, plan, path))
        return lease

    def states(self, plan: str = "default", path: str = "/") -> list[PrefetchState]:
        """Units of shared limits that this process takes ahead, for requests of this plan and path."""
        ahead = self.policy(plan, path).ahead
        assert ahead is not None
        return list(ahead.shared)

    async def settle(self) -> None:
        """Let the questions that are under way be answered."""
        while self.engine.leases.background.tasks:
            await asyncio.gather(*self.engine.leases.background.tasks)
            await asyncio.sleep(0)


def in_hand(states: list[PrefetchState]) -> int:
    """For how many requests there are units of every one of these limits."""
    return min(0 if state.block is None else state.block.left for state in states)


def busy(world: World, said: Settings) -> Worker:
    """A worker that has been at it for a while: whoever has spent little takes little."""
    worker = Worker(world, said)
    for plan in PLANS:
        for path in PATHS:
            for state in worker.states(plan, path):
                state._spent, state._marked = 50_000, world.now / SECOND
    return worker


async def supplied(
    world: World, said: Settings, plan: str = "default", path: str = "/", caller: str = ""
) -> Worker:
    """A worker with units of all shared limits in hand."""
    worker = busy(world, said)
    for _ in range(400):
        lease = await worker.request(plan, path, caller)
        worker.engine.leases.end(lease, failed=False)
        await worker.settle()
        world.pass_by(1)
        if in_hand(worker.states(plan, path)) >= 4:
            return worker
    raise AssertionError("nothing was taken ahead")


# never over -------------------------------------------------------------------------------------------

COMMON = ("some", "some", "some", "fill", "wait", "pass")
SELDOM = ("die", "lose", "away", "step", "reload", "clear", "cancel", "late")


@settings(max_examples=50)
@given(
    application=st.integers(120, 600),
    total=st.integers(60, 600),
    own=st.integers(20, 600),
    steps=st.integers(5, 40),
    seed=st.integers(0, 10**9),
)
def test_no_interval_holds_more_than_any_limit(
    application: int, total: int, own: int, steps: int, seed: int
) -> None:
    """Three workers serve callers of six plans on four paths, die, lose answers, reload and cancel."""
    amounts = {"application": f"{application}/second", "total": f"{total}/second", "own": f"{own}/second"}
    world = World()
    asyncio.run(_live(world, amounts, steps, random.Random(seed)))
    assert world.most() <= application
    assert world.most(path="/total") <= total
    assert world.most(plan="half") <= max(int(application * SHARE), 1)
    for plan in ("default", "half", "ahead"):
        assert world.most(caller=f"k:{plan}") <= own


async def _live(world: World, amounts: dict[str, str], steps: int, chance: random.Random) -> None:
    said = said_with(**amounts)
    workers = [busy(world, said) for _ in range(3)]
    for _ in range(steps):
        what = chance.choice(COMMON * 3 + SELDOM)
        number = chance.randrange(3)
        worker = workers[number]
        if what == "some":
            for _ in range(60):
                lease = await worker.request(chance.choice(PLANS), chance.choice(PATHS))
                worker.engine.leases.end(lease, failed=chance.random() < 0.3)
                world.pass_by(chance.randrange(200))
        elif what == "fill":
            await _fill(workers, chance)
        elif what == "die":
            workers[number] = busy(world, said)
        elif what == "cancel":
            await _cancel(worker, chance)
        elif what == "late":
            await _refuse_late(worker, chance.choice(PATHS))
        else:
            _happen(what, world, worker, said, chance)
        await worker.settle()


async def _fill(workers: list[Worker], chance: random.Random) -> None:
    """Let each worker ask until it is refused."""
    for worker in workers:
        plan, path = chance.choice(PLANS), chance.choice(PATHS)
        for _ in range(700):
            lease = await worker.request(plan, path)
            worker.engine.leases.end(lease, failed=False)
            if not lease.allowed:
                break


def _happen(what: str, world: World, worker: Worker, said: Settings, chance: random.Random) -> None:
    life = SECOND // 40
    if what == "wait":
        world.pass_by(chance.randrange(2 * life))
    elif what == "pass":
        world.pass_by(SECOND - chance.randrange(life))
    elif what == "step":
        world.clock.now -= chance.randrange(2 * life)
    elif what == "lose":
        worker.remote.loses = not worker.remote.loses
    elif what == "away":
        worker.remote.is_away = not worker.remote.is_away
    elif what == "reload":
        worker.engine.apply(said.model_copy())
    else:
        worker.engine.prefetch.clear()


async def _cancel(worker: Worker, chance: random.Random) -> None:
    """Cancel a request while the server decides about it: it may not count as admitted."""
    task = asyncio.ensure_future(worker.engine.charge(worker.policy(chance.choice(PLANS), "/total")))
    await asyncio.sleep(0)
    if task.done() and task.result().allowed:
        worker.world.admitted.append(Admission(worker.world.now, 1, "", "", "/total"))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


NEVER = Limit("never", "1/year", cost=1)


async def _refuse_late(worker: Worker, path: str) -> None:
    """Have a request refused by what its handler charges: it costs nothing after all."""
    lease = await worker.engine.charge(worker.policy("default", path))
    if not lease.allowed or lease.decision.policy != "shared":
        return
    try:
        await lease.charge(NEVER.on("nobody"))
    except RateLimited:
        return
    cost = worker.policy("default", path).charge.cost
    worker.world.admitted.append(Admission(worker.world.now, cost, "k:default", "default", path))


# all or nothing ---------------------------------------------------------------------------------------


def _drawn(worker: Worker, plan: str, path: str) -> Iterator[int]:
    for state in worker.states(plan, path):
        yield 0 if state.block is None else state.block.left


@pytest.mark.parametrize("path", ["/", "/total", "/two"])
async def test_a_request_asks_for_what_is_not_in_hand_alone(path: str) -> None:
    """The caller's own limits are asked for, those of all callers are drawn, and figures tell of both."""
    world = World()
    worker = await supplied(world, said_with(), path=path)
    before = list(_drawn(worker, "default", path))
    lease = await worker.request(path=path)
    assert [each.owner for each in worker.remote.asked[-1].counters] == ["caller"]
    assert list(_drawn(worker, "default", path)) == [number - 1 for number in before]
    counters = [counter.owner for counter in lease.initial_charge.counters]
    assert counters == ["caller"] + ["everyone"] * len(before)
    own, *shared = [status.used for _, status in lease.decision.windows()]
    assert own == sum(each.cost for each in world.admitted)
    assert all(used == own for used in shared)


async def test_a_refused_request_puts_back_what_it_has_drawn() -> None:
    """The refusal is the caller's own, and of the shared limit nothing is spent: others draw it."""
    world = World()
    worker = await supplied(world, said_with(own="40/hour"), caller="other")
    while (await worker.request(caller="poor")).allowed:
        await worker.settle()
    if in_hand(worker.states()) < 2:
        worker = await supplied(world, said_with(own="40/hour"), caller="third")
    worker.engine.refusals.clear()
    before = in_hand(worker.states())
    lease = await worker.request(caller="poor")
    assert lease.decision.refusal is not None
    assert lease.decision.refusal.limit is not None
    assert lease.decision.refusal.limit.counter.owner == "caller"
    assert in_hand(worker.states()) == before


async def test_refusals_at_once_leave_every_unit_in_hand() -> None:
    """More requests than there are units are under way and refused: no unit is lost with a block."""
    world = World()
    worker = await supplied(world, said_with(), "slots")
    held = [await worker.request("slots") for _ in range(2)]
    before = in_hand(worker.states("slots"))
    assert before >= 2
    policy = worker.policy("slots", "/")
    refused = await asyncio.gather(*[worker.engine.charge(policy) for _ in range(before + 10)])
    assert not any(lease.allowed for lease in refused)
    assert in_hand(worker.states("slots")) == before
    for lease in held:
        worker.engine.leases.end(lease, failed=False)


@pytest.mark.parametrize("fault", ["away", "lost", "cancelled"])
async def test_whatever_keeps_a_request_out_puts_back_what_it_has_drawn(fault: str) -> None:
    """An outage, a lost answer, and a client that leaves."""
    world = World()
    worker = await supplied(world, said_with(), path="/total")
    before = list(_drawn(worker, "default", "/total"))
    policy = worker.policy("default", "/total")
    if fault == "cancelled":
        task = asyncio.ensure_future(worker.engine.charge(policy))
        await asyncio.sleep(0)
        assert list(_drawn(worker, "default", "/total")) != before
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    else:
        worker.remote.is_away, worker.remote.loses = fault == "away", fault == "lost"
        lease = await worker.engine.charge(policy)
        assert lease.decision.policy == "deny"
    assert list(_drawn(worker, "default", "/total")) == before


@pytest.mark.parametrize("plan", PLANS)
async def test_a_late_refusal_gives_back_exactly_what_was_asked_for(plan: str) -> None:
    """Of a request that its handler has refused nothing is counted any more, in hand or at the server."""
    world = World()
    worker = await supplied(world, said_with(), plan, "/priced")
    policy = worker.policy(plan, "/priced")
    (state,) = worker.states(plan, "/priced")
    state.asking_until = 2 * world.now / SECOND  # no more than what is in hand
    await (await worker.engine.charge(worker.policy("default", "/"))).charge(NEVER.on("x"))
    before = await _counted(worker, policy)
    assert state.block is not None
    units = state.block.left
    lease = await worker.engine.charge(policy)
    with pytest.raises(RateLimited):
        await lease.charge(NEVER.on("x"))
    assert state.block.left == units
    assert await _counted(worker, policy) == before


async def _counted(worker: Worker, policy: Policy) -> list[tuple[int, int]]:
    outcome = await worker.remote.server.peek(policy.priced_charge)
    places = range(len(policy.priced_charge.counters))
    return [(outcome.used(place), outcome.held(place) if place else 0) for place in places]


async def test_everything_in_hand_asks_nobody() -> None:
    """A plan that takes its own units ahead as well asks for nothing while all lasts."""
    world = World()
    worker = await supplied(world, said_with(), "ahead", "/total")
    ahead = worker.policy("ahead", "/total").ahead
    assert ahead is not None
    assert ahead.own is not None
    while (
        ahead.own.block is None or ahead.own.block.left < 3 or in_hand(worker.states("ahead", "/total")) < 3
    ):
        await worker.request("ahead", "/total")
        await worker.settle()
        world.pass_by(1)
    asked = len(worker.remote.asked)
    lease = await worker.request("ahead", "/total")
    assert lease.allowed
    assert len(worker.remote.asked) == asked
    limits = lease.decision.limits
    assert [each.counter.owner for each in limits] == ["caller", "everyone", "everyone"]


async def test_one_unit_serves_requests_of_every_caller() -> None:
    """Callers draw on the same block; those of a plan with a share of the limit have one of their own."""
    worker = Worker(World(), said_with())
    assert worker.states("default") == worker.states("slots") == worker.states("money", "/priced")
    assert worker.states("default")[0] not in worker.states("half")
    assert worker.states("default")[0] not in worker.states("default", "/two")  # of another cost


async def test_nothing_but_windows_of_requests_is_taken_ahead() -> None:
    """Slots and metered units of all callers are asked for in each request."""
    said = settings_of(
        """
        [application]
        requests = ["100000/second"]
        concurrent = 50
        units.tokens = ["100000/second"]
        prefetch = true
        """
    )
    worker = Worker(World(), said)
    (state,) = worker.states()
    assert [counter.scope for counter in state.charge.counters] == ["app"]
    assert [type(counter.limit).__name__ for counter in state.charge.counters] == ["Window"]


async def test_limits_in_code_are_asked_for_beside_units_in_hand() -> None:
    """A request that code limits as well draws the same shared units, and asks for the rest."""
    world = World()
    worker = await supplied(world, said_with())
    mine = Limit("mine", "5/hour")
    for number in range(6):
        lease = await worker.limiter.acquire(mine.on("x"), identity=worker.policy("default", "/").identity)
        assert lease.allowed is (number < 5)
    asked = worker.remote.asked[-1]
    assert "everyone" not in [counter.owner for counter in asked.counters]


async def test_an_outage_starts_from_what_was_last_known_of_a_shared_limit() -> None:
    """A worker that has drawn on units in hand knows how full the limit was, and counts on from there."""
    world = World()
    said = said_with(application="400/hour", own="100000/hour", on_failure="local")
    worker = busy(world, said)
    while len(world.admitted) < 300:
        await worker.request()
        await worker.settle()
        world.pass_by(100)
    worker.remote.is_away = True
    worker.engine.prefetch.clear()
    admitted = 0
    while (await worker.engine.charge(worker.policy("default", "/"))).allowed:
        admitted += 1
    assert admitted <= 100 * said.backend.local_share + 1


# how much can be used ---------------------------------------------------------------------------------


@settings(max_examples=2)
@given(demand=st.floats(0.9, 2), seed=st.integers(0, 10**6))
def test_nine_tenths_can_be_used_by_64_workers_with_uneven_load(demand: float, seed: int) -> None:
    """Some have half of all requests, most have few, and some die: hardly anything is lost."""
    used = asyncio.run(_use(demand, random.Random(seed), ahead=True))
    plainly = asyncio.run(_use(demand, random.Random(seed), ahead=False))
    assert used >= 0.9 * plainly


QUOTA, LENGTH, WORKERS = 5_000, 2 * SECOND, 64


async def _use(demand: float, chance: random.Random, *, ahead: bool) -> int:
    """Return the number of requests admitted in two windows and a half."""
    world = World()
    said = settings_of(
        f'[application]\nrequests = ["{QUOTA}/2 seconds"]\nprefetch = {str(ahead).lower()}\n'
        '[plans.default]\nrequests = ["1000000/hour"]'
    )
    workers = [Worker(world, said) for _ in range(WORKERS)]
    weights = [1 / (number + 1) for number in range(WORKERS)]
    end, admitted = world.now + 5 * LENGTH // 2, 0
    while world.now < end:
        number = chance.choices(range(WORKERS), weights)[0]
        worker = workers[number]
        for _ in range(chance.randint(1, 8)):
            admitted += (await worker.engine.charge(worker.policy("default", "/"))).allowed
        if chance.random() < 0.2:
            await worker.settle()
        if chance.random() < 0.001:
            workers[number] = Worker(world, said)
        world.pass_by(int(chance.expovariate(demand * QUOTA / 4.5 / LENGTH)))
    return admitted
