"""Units taken ahead: no interval holds more than the limit, and most of it can be used."""

import asyncio
import os
import random
from dataclasses import dataclass, field
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.cache.prefetch import Prefetch
from ratelimit_mw._internal.cache.prefetch_state import PART, PrefetchedBlock, PrefetchState, is_taken_ahead
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, NO_RESERVATION
from ratelimit_mw._internal.model.status import WindowStatus
from tests.conformance.test_contention import most_in
from tests.support.conformance import Clock, slots, window
from tests.support.statuses import peeked

LIFE = SECOND // PART
"""Microseconds for which units of a window of a second can be taken ahead."""
Spent = list[tuple[int, int]]
"""Times at which units were spent, in real microseconds, each with the number of units."""


@dataclass
class World:
    """Real time, a server whose clock may be stepped, and what was spent of it."""

    windows: tuple[Window, ...]
    now: int = 10**9
    clock: Clock = field(default_factory=Clock)
    spent: Spent = field(default_factory=list)
    refused: int = 0
    asked: int = 0

    def __post_init__(self) -> None:
        self.server = MemoryBackend(clock=self.clock)

    def pass_by(self, microseconds: int) -> None:
        """Let time pass for everybody."""
        self.now += microseconds
        self.clock.now += microseconds


class Slow:
    """The server as one worker sees it: its answers may take time, or be lost."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.there = 0
        """Microseconds until a question arrives; as long again for its answer."""
        self.loses = False

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Decide, while time passes."""
        self.world.asked += 1
        self.world.pass_by(self.there)
        outcome = await self.world.server.acquire(charge, lease_id, price)
        await asyncio.sleep(0)  # others have a turn
        self.world.pass_by(self.there)
        if self.loses:
            raise BackendError("lost")
        return outcome


class Worker:
    """A process: it has a charge on each of two routes, counted in the same windows."""

    def __init__(self, world: World, costs: tuple[int, ...] = (1,)) -> None:
        self.world = world
        self.server = Slow(world)
        self.tasks: set[asyncio.Future[None]] = set()
        self.prefetch = Prefetch(self.server, self.tasks, lambda: world.now / SECOND)  # type: ignore[arg-type]
        self.prefetch_states = [
            PrefetchState(Charge([Counter("me", "p", w) for w in world.windows], c)) for c in costs
        ]

    async def request(self, route: int = 0, *, ahead: bool = True) -> bool:
        """One request: from what is in hand, else by asking the server; whether it was admitted."""
        prefetch_state = self.prefetch_states[route % len(self.prefetch_states)]
        charge = prefetch_state.charge
        at = self.world.now
        if self.prefetch.spend(prefetch_state) is None:
            sent = self.world.now
            try:
                outcome = await self.server.acquire(charge, NO_LEASE_ID)
            except BackendError:
                return False
            charge.last = outcome
            if not outcome.admitted:
                self.world.refused += 1
                return False
            at = sent + self.server.there
            if ahead:
                self.prefetch.refill(prefetch_state)
        self.world.spent.append((at, charge.cost))
        return True

    async def settle(self) -> None:
        """Let the answers that are under way arrive."""
        while self.tasks:
            await asyncio.gather(*self.tasks)
            await asyncio.sleep(0)


COMMON = ("some", "some", "fill", "fill", "wait", "wait", "pass")
SELDOM = ("die", "lose", "slow", "back", "step", "clear")


@settings(max_examples=120)
@given(
    quotas=st.lists(st.integers(60, 300), min_size=1, max_size=2),
    costs=st.sampled_from([(1,), (1, 2)]),
    steps=st.integers(5, 40),
    seed=st.integers(0, 10**9),
)
def test_no_interval_holds_more_than_the_limit(
    quotas: list[int], costs: tuple[int, ...], steps: int, seed: int
) -> None:
    """Three workers ask as they like, pause, die with units in hand, lose answers; the clock is set back."""
    world = World(tuple(Window(quota * n, n, "second") for n, quota in enumerate(quotas, start=1)))
    asyncio.run(_live(world, costs, steps, random.Random(seed)))
    for each in world.windows:
        assert not world.spent or most_in(world.spent, each.length) <= each.quota


async def _live(world: World, costs: tuple[int, ...], steps: int, chance: random.Random) -> None:
    workers = [_busy(world, costs) for _ in range(3)]
    for _ in range(steps):
        what = chance.choice(COMMON * 2 + SELDOM)
        worker = chance.choice(workers)
        if what == "some":
            for n in range(40):
                await worker.request(n)
                world.pass_by(chance.randrange(200))
        elif what == "fill":
            for other in workers:
                for n in range(400):
                    if not await other.request(n):
                        break
        elif what == "die":
            workers[workers.index(worker)] = _busy(world, costs)
        else:
            _happen(what, world, worker, chance.randrange(SECOND))
        await worker.settle()


def _happen(what: str, world: World, worker: Worker, amount: int) -> None:
    if what == "wait":  # about as long as a block lives
        world.pass_by(amount % (2 * LIFE))
    elif what == "pass":
        world.pass_by(SECOND - amount % LIFE)
    elif what == "back":
        world.clock.now -= 2 * amount
    elif what == "step":
        world.clock.now -= amount % (2 * LIFE)
    elif what == "lose":
        worker.server.loses = not worker.server.loses
    elif what == "slow":
        worker.server.there = amount % LIFE
    else:
        worker.prefetch.clear()


def _busy(world: World, costs: tuple[int, ...] = (1,)) -> Worker:
    """A worker that has been at it for a while: whoever has spent little takes little."""
    worker = Worker(world, costs)
    for prefetch_state in worker.prefetch_states:
        prefetch_state._spent, prefetch_state._marked = 5_000, world.now / SECOND
    return worker


async def _in_hand(world: World, worker: Worker, there: int = 0) -> int:
    """Let a worker have a fresh block in hand, which took so long each way; for how many requests."""
    for _ in range(200):
        await worker.request()
        worker.server.there = there
        await worker.settle()
        worker.server.there = 0
        world.pass_by(1)
        block = worker.prefetch_states[0].block
        if block is not None and block.left == block.size and block.size >= 4:
            return block.size
    raise AssertionError("nothing was taken ahead")


async def _fill(world: World, worker: Worker) -> int:
    """Ask the server for units until it refuses; how many it gave."""
    given = 0
    while (await worker.server.acquire(worker.prefetch_states[0].charge, NO_LEASE_ID)).admitted:
        world.spent.append((world.now, 1))
        given += 1
    return given


@pytest.mark.parametrize("quota", [200, 5_000])
@pytest.mark.parametrize("there", [0, LIFE // 5])
async def test_units_spent_at_the_last_moment_count_for_a_whole_window(quota: int, there: int) -> None:
    """The worst case: a block is spent as late as can be, and others take what they can before and after."""
    world = World((Window(quota, 1, "second"),))
    worker, other = _busy(world), Worker(world)
    number = await _in_hand(world, worker, there)
    taken = world.now
    block = worker.prefetch_states[0].block
    assert block is not None
    world.pass_by(int(block.until * SECOND) - 1 - world.now)
    assert world.now - taken > 0.5 * LIFE
    for _ in range(number):
        assert worker.prefetch.spend(worker.prefetch_states[0]) is not None
        world.spent.append((world.now, 1))
    late = world.now
    assert await _fill(world, other) > 0
    while world.now < late + 2 * SECOND:
        world.pass_by(500)
        await _fill(world, other)
    assert most_in(world.spent, SECOND) == quota


async def test_a_worker_that_was_paused_spends_nothing_of_before() -> None:
    """After a pause of any length it asks, though it has units in hand."""
    world = World((Window(1_000, 1, "second"),))
    worker = _busy(world)
    await _in_hand(world, worker)
    world.pass_by(LIFE)
    assert worker.prefetch.spend(worker.prefetch_states[0]) is None


async def test_what_was_taken_is_forgotten_by_a_reset_also_if_it_comes_later() -> None:
    """Neither what is in hand nor what is on its way is spent any more."""
    world = World((Window(1_000, 1, "second"),))
    worker = _busy(world)
    await _in_hand(world, worker)
    worker.prefetch.clear()
    assert worker.prefetch.spend(worker.prefetch_states[0]) is None
    for _ in range(50):
        await worker.request()
        await asyncio.sleep(0)
        worker.prefetch.clear()
        await worker.settle()
        assert worker.prefetch.spend(worker.prefetch_states[0]) is None


async def test_figures_say_what_is_still_to_be_had() -> None:
    """Units left are those of the backend and those in hand, and no reset comes before it can be true."""
    world = World((Window(1_000, 1, "second"),))
    worker = _busy(world)
    number = await _in_hand(world, worker)
    prefetch_state = worker.prefetch_states[0]
    used = (await worker.server.acquire(Charge(prefetch_state.charge.counters), NO_LEASE_ID)).used(0) - 1
    for n in range(1, number + 1):
        world.pass_by(10)
        outcome = worker.prefetch.spend(prefetch_state)
        assert outcome is not None
        assert world.clock.now - 1 <= outcome.now <= world.clock.now
        assert outcome.used(0) == used - number + n
        assert (
            outcome.reset_after(0) + outcome.now
            >= world.clock.now + prefetch_state.life * SECOND - 10 * number
        )
        assert not any(each.refuses for each in prefetch_state.charge.statuses(outcome))


async def test_threads_never_spend_one_unit_twice() -> None:
    """Event loops in several threads draw on one block, and each unit goes to one of them."""
    world = World((Window(10**9, 1, "minute"),))
    worker = _busy(world)
    prefetch_state, charge = worker.prefetch_states[0], worker.prefetch_states[0].charge
    outcome = await world.server.acquire(
        Charge(charge.counters, 20_000, ahead=prefetch_state.ahead), NO_LEASE_ID
    )
    block = PrefetchedBlock(charge, outcome, 20_000, worker.prefetch.era)
    block.until, block.low = world.now / SECOND + 1, -1
    prefetch_state.add(block)

    def spend() -> list[int]:
        spent = []
        while (outcome := worker.prefetch.spend(prefetch_state)) is not None:
            spent.append(outcome.used(0))
        return spent

    spent = await asyncio.gather(*[asyncio.to_thread(spend) for _ in range(4)])
    assert sorted(chain.from_iterable(spent)) == list(range(1, 20_001))


def test_a_child_process_has_nothing_in_hand() -> None:
    """A forked process does not spend the units that its parent has taken ahead."""
    world = World((Window(1_000, 1, "second"),))
    worker = _busy(world)
    asyncio.run(_in_hand_of(world, worker))
    child = os.fork()
    if not child:
        os._exit(0 if worker.prefetch.spend(worker.prefetch_states[0]) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.prefetch.spend(worker.prefetch_states[0]) is not None


async def _in_hand_of(world: World, worker: Worker) -> None:
    await _in_hand(world, worker)


# how much of a limit can be used --------------------------------------------------------------------


@settings(max_examples=15)
@given(
    workers=st.integers(1, 8),
    quota=st.integers(100, 1_000),
    demand=st.floats(0.8, 4),
    burst=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_nine_tenths_of_a_limit_can_be_used(
    workers: int, quota: int, demand: float, burst: int, seed: int
) -> None:
    """However many workers there are and in whatever bursts requests come, while some of the workers die."""
    used = asyncio.run(_use(workers, quota, demand, burst, random.Random(seed), ahead=True))
    plainly = asyncio.run(_use(workers, quota, demand, burst, random.Random(seed), ahead=False))
    assert used >= 0.9 * plainly


SECONDS = 3


async def _use(
    number: int, quota: int, demand: float, burst: int, chance: random.Random, *, ahead: bool
) -> int:
    """Return the number of requests admitted of a window of a second in `SECONDS`.

    The demand is the same with and without prefetch.
    """
    world = World((Window(quota, 1, "second"),))
    workers, wanted, start = [Worker(world) for _ in range(number)], 0, world.now
    while world.now < start + SECONDS * SECOND:
        worker = chance.choice(workers)
        for _ in range(chance.randint(1, burst)):
            wanted += 1
            await worker.request(ahead=ahead)
            world.pass_by(chance.randint(0, 200))
            if wanted % 3 == 0:
                await worker.settle()
        if chance.random() < 0.002:
            workers[chance.randrange(number)] = Worker(world)
        pause = burst / 2 / (demand * quota) * SECOND
        world.pass_by(int(chance.expovariate(1 / pause)))
    return len(world.spent)


@pytest.mark.parametrize(
    ("spent", "lives", "left", "lost", "taken"),
    [
        pytest.param(10, 0.49, 10**6, 0, 10, id="as many as half a life takes at this pace"),
        pytest.param(10, 0.9, 10**6, 0, 5, id="a slower pace"),
        pytest.param(10, 0.01, 10**6, 0, 40, id="at most four times as many as were spent"),
        pytest.param(100, 0.01, 10**6, 0, 256, id="at most 256"),
        pytest.param(1_000, 0.01, 800, 0, 20, id="of 50 spent units one"),
        pytest.param(1_000, 0.01, 800, 15, 5, id="those included that were lost"),
        pytest.param(1_000, 0.01, 80, 0, 10, id="at most an eighth of what is left"),
        pytest.param(10, 0.01, 3_072, 0, 3, id="of 1,024 units left one, whatever was spent"),
        pytest.param(10, 0.01, 3_072, 2, 0, id="but none for one request alone"),
        pytest.param(10, 1.1, 10**6, 0, 0, id="none at a pace of long ago"),
    ],
)
def test_a_block_is_no_larger_than_what_is_soon_spent(
    spent: int, lives: float, left: int, lost: int, taken: int
) -> None:
    """Little is held of a limit that others need: by pace, by what was spent, and by what is left of it."""
    window = Window(2_000_000, 1, "second")
    prefetch_state = PrefetchState(Charge([Counter("me", "p", window)]))
    status = WindowStatus(window.quota - left, SECOND, 0)
    prefetch_state.charge.last = Outcome.from_statuses(True, 0, [status], NO_RESERVATION)
    assert prefetch_state.wanted(100.0) == 0
    for _ in range(spent):
        prefetch_state.admitted()
    prefetch_state.lose(lost)
    assert prefetch_state.wanted(100.0 + lives * prefetch_state.life) == taken


async def test_a_steady_worker_asks_seldom() -> None:
    """At one pace and far from the limit there are far fewer questions than requests, and little is lost."""
    world = World((Window(60_000, 1, "minute"),))
    worker = Worker(world)
    for _ in range(20_000):
        await worker.request()
        await worker.settle()
        world.pass_by(2_000)
    assert len(world.spent) == 20_000
    assert world.asked < 1_000
    counted = (await peeked(world.server, worker.prefetch_states[0].charge)).used(0)
    assert counted <= 20_000 * 1.02


async def test_whoever_comes_seldom_takes_nothing_ahead() -> None:
    """A caller of a few requests a minute costs what it has always cost."""
    world = World((Window(1_000, 1, "minute"),))
    worker = Worker(world)
    for _ in range(200):
        await worker.request()
        await worker.settle()
        world.pass_by(5 * SECOND)
    assert world.asked == 200


async def test_answers_that_never_come_stop_nothing() -> None:
    """While a question is under way requests ask for themselves, and it is asked again after a while."""
    world = World((Window(10_000, 1, "second"),))
    worker = _busy(world)
    worker.server.loses = True
    for _ in range(20):
        assert not await worker.request()
        world.pass_by(100)
    worker.server.loses = False
    await _in_hand(world, worker)


def test_only_a_callers_own_windows_are_taken_ahead() -> None:
    """Slots, money and limits of all callers can't be: their charges go on as ever."""
    assert is_taken_ahead(Charge([window(5), window(9, scope="r:1")]))
    assert not is_taken_ahead(Charge([]))
    assert not is_taken_ahead(Charge([window(5), slots(5)]))
    assert not is_taken_ahead(Charge([window(5), Counter("app", "app", Window(5, 1, "minute"), "everyone")]))
    assert not is_taken_ahead(Charge([Counter("ip:1", "a", Window(5, 1, "minute"), "address")]))
    with pytest.raises(ValueError, match="windows"):
        Charge([slots(5)], ahead=1)
    with pytest.raises(ValueError, match="at most 4294967295 us ahead"):
        Charge([window(5)], ahead=2**32)
