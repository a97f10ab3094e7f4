"""The memory backend is bounded whatever callers send, and forgets nothing that still counts."""

import gc
import tracemalloc
from collections.abc import Iterator

import pytest

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.memory.bounded_store import Store, StoredState
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.status import BudgetStatus
from tests.support.asgi import ok_app, scope_of, settings_of, start_of
from tests.support.conformance import Clock, daily, monthly, new_id, slots, window
from tests.support.statuses import peeked


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
def backend(clock: Clock) -> MemoryBackend:
    """A backend that remembers a hundred of each kind."""
    return MemoryBackend(clock=clock, max_windows=100)


@pytest.fixture
def traced() -> Iterator[None]:
    """Count what is allocated."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def strangers(number: int, name: str) -> Iterator[list[Counter]]:
    """The limits of so many callers who are never seen again."""
    for each in range(number):
        of = f"{name} {each}"
        yield [window(5, of=of), window(5, 1, "hour", of=of), slots(5, of=of), daily(500, of=of)]


async def test_any_number_of_callers_takes_bounded_memory(
    backend: MemoryBackend, clock: Clock, traced: None
) -> None:
    """Windows, slots, budgets and records of callers who come once don't pile up (invariant 8)."""
    sizes = []
    for turn in range(4):
        for counters in strangers(300, f"caller of turn {turn}"):
            outcome = await backend.acquire(Charge(counters), new_id(), 1)
            await backend.finish(outcome.reservation, EstimateAction.KEEP)
            await backend.acquire(Charge(counters), new_id(), 1)  # a crash: it never ends
            clock.now += 300_000
        sizes.append(tracemalloc.get_traced_memory()[0])
    assert sizes[3] < 1.3 * sizes[1]
    assert sizes[3] < 2_500_000  # half of it the probes that measure coverage


async def test_a_flood_of_keys_takes_bounded_memory(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch, traced: None
) -> None:
    """Memory of callers who come once is freed as others come, without the garbage collector."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_POLICIES", 100)
    monkeypatch.setattr("ratelimit_mw._internal.policy.identity._MAX_REMEMBERED", 100)
    limiter = Limiter(
        settings_of('plans.default = { requests = ["5/minute"], concurrent = 5 }'), backend=backend
    )
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    sizes = []
    gc.disable()
    try:
        for turn in range(3):
            for number in range(1_000):
                assert (await start_of(app, f"{turn} {number}".encode()))["status"] == 200
            limiter.engine.decision_counts.take_callers()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        gc.enable()
    assert sizes[2] - sizes[1] < 100_000, "less than 100 bytes of each"


async def test_the_refused_and_the_curious_leave_nothing_behind(backend: MemoryBackend, traced: None) -> None:
    """Callers that are refused, and those one only looks at, push nobody out."""
    mine, shared = window(5, of="mine"), window(5, of="app")
    await backend.acquire(Charge([mine, shared], 5), new_id())
    sizes = []
    for turn in range(2):  # Python keeps some memory of its own for tuples, the first time that it needs it
        for counters in strangers(2_000, f"refused in turn {turn}"):
            assert not (await backend.acquire(Charge([*counters, shared]), new_id(), 1)).admitted
            await backend.peek(Charge(counters), 1)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    assert sizes[1] - sizes[0] < 20_000
    assert (await peeked(backend, Charge([mine]))).used(0) == 5


async def test_who_comes_often_is_not_pushed_out(backend: MemoryBackend, clock: Clock) -> None:
    """The callers not seen for longest are forgotten if there are too many, and no others."""
    regular = [window(99, 1, "hour", of="regular"), daily(999, of="regular"), monthly(999, of="regular")]
    for number, counters in enumerate(strangers(1_000, "flood")):
        await backend.acquire(Charge(counters), new_id(), 1)
        if number % 25 == 0:
            assert (await backend.acquire(Charge(regular), new_id(), 1)).admitted
        clock.now += 1_000
    answer = await peeked(backend, Charge(regular))
    assert [answer.used(0), answer.held(1), answer.held(2)] == [40, 40, 40]


async def test_nobody_loses_a_slot_to_a_flood(backend: MemoryBackend, clock: Clock) -> None:
    """Held leases stay, however many others come and go; expired ones make room."""
    reservations = [
        (await backend.acquire(Charge([slots(2, of=f"holder {each}")]), new_id())).reservation
        for each in range(300)
    ]
    for number in range(3_000):
        outcome = await backend.acquire(Charge([slots(2, of=f"passer-by {number}")]), new_id())
        if number % 2:
            await backend.finish(outcome.reservation, EstimateAction.KEEP)
        clock.now += 5_000
    for reservation in reservations:
        assert await backend.renew(reservation, 30)
    clock.now += 30_000_000
    for number in range(1_000):
        outcome = await backend.acquire(Charge([slots(2, of=f"late {number}")]), new_id())
        await backend.finish(outcome.reservation, EstimateAction.KEEP)
    assert len(backend.slots) <= 100, "as many as may be spare"


async def test_a_slot_set_is_kept_as_long_as_one_of_its_leases_lasts(
    backend: MemoryBackend, clock: Clock
) -> None:
    """Expired leases beside a live one don't make others forget it."""
    mine = slots(2, of="mine")
    crashed, live = [(await backend.acquire(Charge([mine]), new_id())).reservation for _ in range(2)]
    assert await backend.renew(live, 600)
    clock.now += 60_000_000
    for number in range(300):
        await backend.acquire(Charge([slots(2, of=f"passer-by {number}")]), new_id())
    assert (await peeked(backend, Charge([mine]))).used(0) == 1
    assert not await backend.renew(crashed, 30)
    assert await backend.renew(live, 30)


async def test_records_of_old_days_go_though_that_of_a_month_stays(
    backend: MemoryBackend, clock: Clock
) -> None:
    """Records of charges that never ended are forgotten once they are past settling, and no earlier."""
    held = (await backend.acquire(Charge([monthly(999, of="mine")]), new_id(), 7)).reservation
    for _ in range(60):
        await backend.acquire(Charge([daily(999, of="crashed")]), new_id(), 1)
    clock.now += 4 * 86_400_000_000
    for _ in range(30):
        await backend.acquire(Charge([daily(999, of="another")]), new_id(), 1)
    assert len(backend._records) == 31
    assert await backend.settle(held, 5) is Settlement.SETTLED


async def test_a_flood_after_midnight_clears_old_budgets(backend: MemoryBackend, clock: Clock) -> None:
    """Days are forgotten two days after they ended, and not before; a month outlives its days."""
    month, first = monthly(999, of="mine"), daily(999, of="mine")
    reservation = (await backend.acquire(Charge([first, month]), new_id(), 7)).reservation
    for _ in range(2):
        clock.now += 86_400_000_000
        for number in range(40):
            await backend.acquire(Charge([daily(9, of=f"{clock.now} {number}")]), new_id(), 1)
    assert await backend.settle(reservation, 5) is Settlement.SETTLED
    assert (await peeked(backend, Charge([month]))).statuses[0] == BudgetStatus(5, 0, is_short=False)
    clock.now += 86_400_000_000
    for number in range(90):
        await backend.acquire(Charge([daily(9, of=f"{clock.now} {number}")]), new_id(), 1)
    assert len(backend._days) <= 100
    assert (await peeked(backend, Charge([month]))).statuses[0] == BudgetStatus(5, 0, is_short=False)


async def test_old_days_are_forgotten_though_a_month_was_there_before(
    backend: MemoryBackend, clock: Clock
) -> None:
    """Budgets of days leave when they are past settling; that of a month, older and living, stays."""
    await backend.acquire(Charge([monthly(9, of="mine")]), new_id(), 1)
    for number in range(60):
        await backend.acquire(Charge([daily(9, of=f"before {number}")]), new_id(), 1)
    clock.now += 4 * 86_400_000_000
    for number in range(30):
        await backend.acquire(Charge([daily(9, of=f"after {number}")]), new_id(), 1)
    assert len(backend._days) + len(backend._months) == 31


async def test_what_settles_after_its_budget_was_forgotten_counts(backend: MemoryBackend) -> None:
    """A flood may push a budget out of memory; a job that settles then is charged all the same."""
    reservation = (await backend.acquire(Charge([daily(999, of="mine")]), new_id(), 100)).reservation
    for number in range(150):
        outcome = await backend.acquire(Charge([daily(9, of=f"flood {number}")]), new_id(), 1)
        await backend.finish(outcome.reservation, EstimateAction.KEEP)
    assert await backend.settle(reservation, 70) is Settlement.SETTLED
    statuses = (await peeked(backend, Charge([daily(999, of="mine")]))).statuses
    assert statuses == [BudgetStatus(70, 0, is_short=False)]


async def test_each_backend_counts_a_charge_for_itself(clock: Clock) -> None:
    """State that one backend has found for a charge, to use it again, is not used by another backend."""
    charge = Charge([window(2)])
    backends = [MemoryBackend(clock=clock) for _ in range(2)]
    admitted = [(await backend.acquire(charge, new_id())).admitted for _ in range(3) for backend in backends]
    assert admitted == [True, True, True, True, False, False]


class State(StoredState):
    """Dead from a time on."""

    def __init__(self, dies: int) -> None:
        super().__init__()
        self.dies = dies

    def is_dead(self, now: int) -> bool:
        """Whether its time has come."""
        return self.dies <= now


def test_the_dead_go_before_the_living() -> None:
    """Each newcomer looks at a few old ones, and takes the place of a dead one if there is one."""
    store: Store[int, State] = Store(3, rotates=True)
    for number, dies in enumerate([5, 1, 9]):
        store.add(number, State(dies), 0)
    store.add(3, State(9), 2)
    assert [store.find(number) is not None for number in range(4)] == [True, False, True, True]


def test_without_any_dead_the_least_used_goes() -> None:
    """Finding counts as use."""
    store: Store[int, State] = Store(3)
    for number in range(3):
        store.add(number, State(9), 0)
    store.find(0)
    store.add(3, State(9), 0)
    assert [number for number in range(4) if store.forget(number)] == [0, 2, 3]
    assert len(store) == 0


@pytest.mark.parametrize("rotates", [False, True])
def test_a_store_never_has_more_than_its_bound(rotates: bool) -> None:
    """Each newcomer beyond the bound takes the place of another, though none is dead."""
    store: Store[int, State] = Store(3, rotates=rotates)
    states = [State(9) for _ in range(10)]
    sizes = []
    for number, state in enumerate(states):
        store.add(number, state, 0)
        sizes.append(len(store))
    assert sizes == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert sum(state.is_stored for state in states) == 3
    assert states[9].is_stored


def test_the_dead_are_let_be_as_long_as_there_is_room_to_spare() -> None:
    """Below `spare` states none is looked for; from then on each newcomer drops as many as four."""
    store: Store[int, State] = Store(spare=10)
    for number in range(10):
        store.add(number, State(1), 5)
    assert len(store) == 10
    store.add(10, State(9), 5)
    assert list(store) == [4, 5, 6, 7, 8, 9, 10]


def test_the_dead_behind_the_living_are_found_where_the_search_goes_round() -> None:
    """A state that lives long hides those behind it only from a search that begins anew each time."""
    for rotates, left in ((False, [0, 1, 2, 3, 4]), (True, [4, 0])):
        store: Store[int, State] = Store(spare=4, rotates=rotates)
        for number, dies in enumerate([9, 1, 1, 1]):
            store.add(number, State(dies), 0)
        store.add(4, State(9), 5)
        assert sorted(store) == sorted(left)


def test_who_was_used_gets_one_more_chance() -> None:
    """A use saves a state once, and no number of used ones makes a newcomer look at all of them."""
    store: Store[int, State] = Store(1_000)
    states = [State(9) for _ in range(1_002)]
    for number in range(1_000):
        store.add(number, states[number], 0)
    for number in range(1_000):
        store.find(number)
    store.add(1_000, states[1_000], 0)
    assert sum(state.is_used for state in states[:1_000]) > 900
    assert len(store) == 1_000
    gone = [number for number, state in enumerate(states[:1_001]) if not state.is_stored]
    assert len(gone) == 1
    assert store.find(0) is not None, "used, so it went to the end"


async def test_what_was_forgotten_counts_no_more_wherever_it_is_known(backend: MemoryBackend) -> None:
    """Routes that share a window go on sharing it when it was forgotten, or reset, in between."""
    limiter = Limiter(
        settings_of(
            'plans.default = { requests = ["2/hour"], concurrent = 5 }\n'
            '[[routes]]\npath = "/one"\n[[routes]]\npath = "/two"'
        ),
        backend=backend,
    )
    app = RateLimitMiddleware(ok_app(), limiter=limiter)

    async def statuses() -> list[int]:
        return [(await start_of(app, b"mine", path=path))["status"] for path in ("/one", "/two", "/one")]

    assert await statuses() == [200, 200, 429]
    for number in range(150):
        assert (await start_of(app, f"flood {number}".encode(), path="/one"))["status"] == 200
    assert await statuses() == [200, 200, 429], "it was forgotten, for both routes alike"
    await limiter.engine.reset(
        limiter.engine.policies.match(limiter.engine.identify(scope_of(b"mine")), "GET", "/one")
    )
    assert await statuses() == [200, 200, 429]


async def test_a_window_that_its_own_charge_pushes_out_starts_anew(clock: Clock) -> None:
    """An older window that is pushed out by a new window of its own charge is empty, not full for ever."""
    backend = MemoryBackend(clock=clock, max_windows=1)
    old, new = window(5), window(5, of="app")
    await backend.acquire(Charge([old], 3), new_id())
    assert (await backend.acquire(Charge([new, old], 2), new_id())).admitted
    assert (await peeked(backend, Charge([old]))).used(0) == 0
    assert (await backend.acquire(Charge([old], 5), new_id())).admitted
    clock.now += 60_000_000
    assert (await backend.acquire(Charge([old], 5), new_id())).admitted


@pytest.mark.parametrize(("cost", "price"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -1), (1, float("nan"))])
async def test_what_is_no_cost_is_refused(backend: MemoryBackend, cost: float, price: float) -> None:
    """The memory backend fails where the script does, and frees nothing."""
    with pytest.raises(BackendError):
        await backend.acquire(Charge([window(5)], cost), new_id(), price)  # type: ignore[arg-type]
    with pytest.raises(BackendError):
        await backend.settle((await backend.acquire(Charge([daily(5)]), new_id(), 1)).reservation, -1)
    assert (await peeked(backend, Charge([window(5)]))).used(0) == 0
