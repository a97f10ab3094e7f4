"""On its own while the backend is away: from what was last known, at a share, and told afterwards."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest

from ratelimit_mw import BackendError, Lease, LeaseError, Limit, Limiter, RateLimited
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import Status
from ratelimit_mw._internal.outage.fallback import LocalPolicy
from tests.support.asgi import FakeClock, settings_of
from tests.support.statuses import budget_status, counted

CENT = 10_000


class Shaky(MemoryBackend):
    """A backend that a test takes away and brings back."""

    away = False

    def decide(self, charge: Charge, lease_id: bytes | None, price: int) -> Outcome:
        """Decide, or fail as a backend does that is away."""
        if self.away:
            raise BackendError("nobody answers")
        return super().decide(charge, lease_id, price)


class Pair:
    """A limiter and its backend, on one clock."""

    def __init__(self, text: str) -> None:
        self.clock = FakeClock()
        self.backend = Shaky(clock=self.clock)
        self.limiter = Limiter(settings_of(text), backend=self.backend)
        engine = self.limiter.engine
        engine.decider.local = LocalPolicy(self.backend, clock=self.clock)
        engine.leases.token_store = engine.leases.settling.outage = engine.decider.local.reconciler

    async def admitted(self, number: int) -> int:
        """Send so many requests; return the number of those admitted."""
        return sum([(await self.limiter.acquire(api_key="a")).allowed for _ in range(number)])

    async def back(self) -> None:
        """The backend is back, and is told."""
        self.backend.away = False
        await self.limiter.engine.decider.local.reconciler.sync()

    async def statuses(self) -> list[Status]:
        """Return the status of the caller's limits in the shared backend."""
        policy = self.limiter.engine.policies.match(self.limiter.engine.identity_of(api_key="a"), "GET", "/")
        return [status for _, status in (await self.limiter.engine.peek(policy)).limits]


class MakePair:
    """Makes pairs, which are closed at the end."""

    def __init__(self) -> None:
        self.made: list[Pair] = []

    def __call__(self, text: str) -> Pair:
        """A pair with these settings."""
        self.made.append(Pair(text))
        return self.made[-1]


@pytest.fixture
async def make() -> AsyncIterator[MakePair]:
    """Make limiters whose backend can be taken away."""
    make = MakePair()
    yield make
    for pair in make.made:
        pair.backend.away = False  # or closing would wait for it
        await pair.limiter.close()


TEN = 'plans.default = {requests = ["10/minute"]}\n'
SHARED = """
[application]
requests = ["{}/minute"]
[plans.default]
application_share = 0.5
"""


@pytest.mark.parametrize(("share", "left"), [("1.0", 4), ("0.5", 2), ("0.3", 2), ("0.01", 1)])
async def test_a_window_goes_on_from_what_was_last_known(make: MakePair, share: str, left: int) -> None:
    """Six of ten are used when the backend goes: this process grants its share of the other four."""
    pair = make(f"backend.local_share = {share}\n{TEN}")
    assert await pair.admitted(6) == 6
    pair.backend.away = True
    lease = await pair.limiter.acquire(api_key="a")
    nearest = lease.decision.nearest()
    assert nearest is not None
    assert (nearest[0].quota, nearest[0].quota - nearest[1].used) == (10, left - 1)
    assert 1 + await pair.admitted(9) == left


async def test_what_was_known_leaves_its_window(make: MakePair) -> None:
    """Counts of others leave their window as they were counted: from the oldest to the newest."""
    pair = make(TEN)
    for second in range(0, 50, 5):
        pair.clock.set(second)
        assert await pair.admitted(1) == 1
    pair.backend.away = True
    assert await pair.admitted(1) == 0
    for second in range(60, 110, 5):
        pair.clock.set(second)
        assert await pair.admitted(2) == 1


@pytest.mark.parametrize("path", ["/a", "/b", "/c"])
async def test_what_was_used_on_one_route_is_known_on_all(make: MakePair, path: str) -> None:
    """Going to a route that the caller did not use while the backend was there opens no second quota."""
    pair = make(f'{TEN}\nroutes = [{{ path = "/a" }}, {{ path = "/b", requests = ["9/minute"] }}]')
    for used in ("/a", "/b", "/b", "/a", "/a"):
        pair.clock.now += 1
        assert (await pair.limiter.acquire(api_key="a", path=used)).allowed
    pair.backend.away = True
    admitted = [(await pair.limiter.acquire(api_key="a", path=path)).allowed for _ in range(9)]
    assert sum(admitted) == 5
    assert not (await pair.limiter.acquire(api_key="a", path="/b")).allowed


async def test_each_outage_knows_all_routes_anew(make: MakePair) -> None:
    """Use of another route between two outages is known in the second one."""
    pair = make(f'{TEN}\nroutes = [{{ path = "/a" }}, {{ path = "/b", requests = ["9/minute"] }}]')

    async def admitted(path: str, number: int) -> int:
        return sum([(await pair.limiter.acquire(api_key="a", path=path)).allowed for _ in range(number)])

    assert await admitted("/a", 1) == 1
    pair.backend.away = True
    assert await admitted("/a", 1) == 1
    await pair.back()
    pair.clock.set(2)
    assert await admitted("/b", 5) == 5
    pair.backend.away = True
    pair.clock.set(4)
    assert await admitted("/a", 9) == 3


async def test_who_spends_and_who_does_not_may_differ_in_an_outage(make: MakePair) -> None:
    """`spending` has a policy of its own for outages, which holds for requests with a price alone."""
    pair = make("""
    plans.default = { requests = ["9/minute"], spending = { daily = "1.00", on_failure = "deny" } }
    routes = [{ path = "/draw", price = "0.10" }]
    """)
    pair.backend.away = True
    assert (await pair.limiter.acquire(api_key="a")).allowed
    refused = await pair.limiter.acquire(api_key="a", path="/draw")
    assert refused.decision.refusal is not None
    assert refused.decision.refusal.reason == "unavailable"


async def test_a_caller_never_seen_has_the_whole_share(make: MakePair) -> None:
    """The share of a caller of whom nothing is known is of the limit itself, rounded up and exactly."""
    pair = make('backend.local_share = 0.07\nplans.default = {requests = ["100/minute"]}')
    pair.backend.away = True
    assert await pair.admitted(20) == 7


async def test_the_smallest_share_of_a_share_is_one(make: MakePair) -> None:
    """A plan that may use one tenth of a limit has one request of the tenth that is granted here."""
    text = SHARED.format(10).replace("0.5", "0.1")
    pair = make(f"backend.local_share = 0.1\n{text}")
    pair.backend.away = True
    assert await pair.admitted(5) == 1


async def test_no_second_quota_when_the_backend_is_back(make: MakePair) -> None:
    """Admissions of an outage are charged to the shared backend, and remembered there from then on."""
    pair = make(TEN)
    assert await pair.admitted(3) == 3
    pair.backend.away = True
    pair.clock.set(10)
    assert await pair.admitted(20) == 7
    pair.clock.set(20)
    await pair.back()
    assert counted((await pair.statuses())[0]) == 10
    assert await pair.admitted(1) == 0
    pair.clock.set(60)
    assert await pair.admitted(20) == 3
    pair.clock.set(80)
    assert await pair.admitted(20) == 7


@pytest.mark.parametrize("also_admitted", [False, True])
async def test_another_outage_begins_with_what_was_known_last(make: MakePair, also_admitted: bool) -> None:
    """Another outage begins with the counts known last, and not with those that a first one began with."""
    pair = make('plans.default.requests = ["10/second", "30/hour"]')
    assert await pair.admitted(10) == 10
    pair.backend.away = True
    assert await pair.admitted(1) == 0
    pair.clock.set(1)
    if also_admitted:
        assert await pair.admitted(3) == 3
    await pair.back() if also_admitted else setattr(pair.backend, "away", False)
    for second in (3, 5):
        pair.clock.set(second)
        assert await pair.admitted(10) == (10 if second == 3 or not also_admitted else 7)
    pair.backend.away = True
    for later in (5.4, 7.0):
        pair.clock.set(later)
        assert await pair.admitted(10) == 0


async def test_what_the_backend_was_not_told_yet_counts_in_the_next_outage(make: MakePair) -> None:
    """Admissions that the backend was not told of yet are added to the counts known in the next outage."""
    pair = make(TEN)
    assert await pair.admitted(2) == 2
    pair.backend.away = True
    pair.clock.set(1)
    assert await pair.admitted(4) == 4
    pair.backend.away = False
    pair.clock.set(2)
    assert await pair.admitted(1) == 1
    pair.backend.away = True
    pair.clock.set(3)
    assert await pair.admitted(9) == 10 - 2 - 4 - 1


async def test_a_flapping_backend_grants_nothing_twice(make: MakePair) -> None:
    """However often it goes and comes, nobody gets more than the limit."""
    pair = make(TEN)
    admitted = 0
    for second in range(12):
        pair.clock.set(second)
        pair.backend.away = not pair.backend.away
        if not pair.backend.away:
            await pair.back()
        admitted += await pair.admitted(3)
    assert admitted == 10
    assert counted((await pair.statuses())[0]) == 10


@pytest.mark.parametrize("apart_ms", [0, 10, 100])
@pytest.mark.parametrize(
    "text",
    [TEN, TEN.replace("10/", "20000/"), SHARED.format(20), SHARED.format(20_000)],
    ids=["plan", "many", "shared", "many shared"],
)
async def test_what_is_refused_late_costs_nothing_here(make: MakePair, text: str, apart_ms: int) -> None:
    """A request that a late limit refuses in an outage is given back, under every window that counted it."""
    pair = make(f"backend.local_share = 1.0\n{text}")
    pair.backend.away = True
    failing = Limit("failing", "1/minute").on("a")
    first, refused = [await pair.limiter.acquire(api_key="a") for _ in range(2)]
    pair.clock.now += apart_ms * 1000
    await pair.limiter.acquire(api_key="a")
    await first.charge(failing)
    with pytest.raises(RateLimited):
        await refused.charge(failing)
    last = await pair.limiter.acquire(api_key="a")
    assert {counted(status) for _, status in last.decision.limits} == {3}
    await pair.back()
    assert {counted(status) for status in await pair.statuses()} == {3}


async def test_units_that_have_left_their_window_are_not_told(make: MakePair) -> None:
    """After an outage longer than the window nothing of it is left to count."""
    pair = make(TEN)
    pair.backend.away = True
    assert await pair.admitted(20) == 10
    pair.clock.set(61)
    await pair.back()
    assert counted((await pair.statuses())[0]) == 0


MONEY = """
plans.default = {requests = ["99/minute"], concurrent = 3, spending = {daily = "1.00"}}
routes = [{path = "/", price = "0.10"}]
"""


async def test_a_budgets_share_is_of_what_was_left(make: MakePair) -> None:
    """Of 1.00, 0.60 was spent by everybody when last seen: half of what was left is 0.20."""
    pair = make("backend.local_share = 0.5\n" + MONEY)
    for _ in range(6):
        async with await pair.limiter.acquire(api_key="a"):
            pass
    pair.backend.away = True
    leases = [await pair.limiter.acquire(api_key="a") for _ in range(4)]
    assert [lease.allowed for lease in leases] == [True, True, False, False]
    _, _, day = leases[1].decision.limits
    assert budget_status(day.status).taken == 100 * CENT


async def test_yesterdays_spending_is_not_todays(make: MakePair) -> None:
    """Spending that was seen in another period says nothing of this one."""
    pair = make(MONEY)
    async with await pair.limiter.acquire(api_key="a", price="1.00"):
        pass
    pair.backend.away = True
    assert not (await pair.limiter.acquire(api_key="a")).allowed
    pair.clock.set(86_400)
    assert (await pair.limiter.acquire(api_key="a", price="1.00")).allowed


async def test_what_was_spent_meanwhile_is_told(make: MakePair) -> None:
    """Settled, kept, given back or still running: the shared backend show each as if they had been there."""
    pair = make(MONEY.replace("concurrent = 3", "concurrent = 9"))
    pair.backend.away = True
    settled, kept, failed, running = [await pair.limiter.acquire(api_key="a") for _ in range(4)]
    await settled.settle("0.04")
    pair.limiter.engine.leases.end(settled, failed=False)
    pair.limiter.engine.leases.end(kept, failed=False)
    pair.limiter.engine.leases.end(failed, failed=True)
    await pair.back()
    _, slots, day = await pair.statuses()
    assert (counted(slots), *budget_status(day)[:2]) == (1, 14 * CENT, 10 * CENT)
    await running.settle("0.03")
    pair.limiter.engine.leases.end(running, failed=False)
    _, slots, day = await pair.statuses()
    assert (counted(slots), *budget_status(day)[:2]) == (0, 17 * CENT, 0)
    assert len(pair.limiter.engine.decider.local.reconciler) == 0


@pytest.mark.parametrize("price", ["", ', price = "0"'])
@pytest.mark.parametrize("is_late", [False, True])
async def test_what_was_admitted_meanwhile_is_settled_with_and_without_a_price(
    make: MakePair, price: str, is_late: bool
) -> None:
    """A request of an outage is charged what it costs, in the outage or after it, by lease or by token."""
    pair = make(MONEY.replace(', price = "0.10"', price))
    pair.backend.away = True
    by_lease, by_token = [await pair.limiter.acquire(api_key="a") for _ in range(2)]
    with pytest.raises(LeaseError):
        await by_token.detach(ttl=-1)
    token = await by_token.detach(ttl=60)
    if is_late:
        await pair.back()
    await by_lease.settle("0.03")
    await by_lease.settle("0.03")
    await pair.limiter.settle(token, "0.04")
    await pair.back()
    assert pair.limiter.stats().settles_ignored == 0
    assert counted((await pair.statuses())[2]) == 7 * CENT


@pytest.mark.parametrize("concurrent", ["", "concurrent = 3, "])
@pytest.mark.parametrize("is_late", [False, True])
async def test_what_was_admitted_before_is_settled_without_a_price(
    make: MakePair, concurrent: str, is_late: bool
) -> None:
    """A request that the backend has admitted may settle or detach in an outage; its slot stays."""
    pair = make(MONEY.replace("concurrent = 3, ", concurrent).replace(', price = "0.10"', ""))
    by_lease, by_token = [await pair.limiter.acquire(api_key="a") for _ in range(2)]
    pair.backend.away = True
    token = await by_token.detach(ttl=60)
    if not is_late:
        await by_lease.settle("0.03")
        await pair.limiter.settle(token, "0.04")
    await pair.back()
    await by_lease.settle("0.03")
    async with pair.limiter.resume(token) as job:
        await job.settle("0.04")
        assert not job.is_lost
    pair.limiter.engine.leases.end(by_lease, failed=True)
    assert pair.limiter.stats().settles_ignored == 0
    _, *slots, day = await pair.statuses()
    assert [counted(each) for each in [*slots, day]] == [0] * len(slots) + [7 * CENT]


async def test_what_was_spent_without_a_price_is_spent_in_the_outage(make: MakePair) -> None:
    """A budget that requests without a price have used up refuses those with one, also meanwhile."""
    pair = make(MONEY.replace(', price = "0.10"', ""))
    assert (await pair.limiter.acquire(api_key="a", price="0.10")).allowed
    pair.backend.away = True
    await (await pair.limiter.acquire(api_key="a")).settle("0.95")
    assert not (await pair.limiter.acquire(api_key="a", price="0.10")).allowed


async def test_a_second_outage_grants_no_money_twice(make: MakePair) -> None:
    """Spending that was told is known in the next outage, and not counted a second time either."""
    pair = make(MONEY)
    for number in (7, 3, 0):
        pair.backend.away = True
        admitted = 0
        for _ in range(7):
            with contextlib.suppress(RateLimited):
                async with await pair.limiter.acquire(api_key="a"):
                    admitted += 1
        assert admitted == number
        await pair.back()
    assert counted((await pair.statuses())[2]) == 100 * CENT


@pytest.mark.parametrize("detached", [True, False])
async def test_an_estimate_held_here_lasts_like_one_held_there(make: MakePair, detached: bool) -> None:
    """An estimate that is told to the backend lasts with its request, or until it is settled if detached."""
    pair = make(MONEY)
    pair.backend.away = True
    lease = await pair.limiter.acquire(api_key="a")
    if detached:
        await lease.detach(ttl=5)
    await pair.back()
    assert budget_status((await pair.statuses())[2]).held == 10 * CENT
    pair.clock.set(31)
    assert budget_status((await pair.statuses())[2]).held == (10 * CENT if detached else 0)


async def test_what_the_backend_was_told_of_is_renewed_there(make: MakePair) -> None:
    """A request that outlives an outage keeps its slot beside one that began when the backend was back."""
    pair = make("plans.default = { concurrent = { limit = 5, lease = 30 } }")
    pair.backend.away = True
    told = await pair.limiter.acquire(api_key="a")
    await pair.back()
    pair.backend.away = True
    here = await pair.limiter.acquire(api_key="a")
    pair.clock.set(29)
    reconciler = pair.limiter.engine.decider.local.reconciler
    assert (
        await reconciler.renew_all([(lease.reservation, 30.0) for lease in (told, here, told)]) == [True] * 3
    )
    pair.backend.away = False
    pair.clock.set(58)
    assert [counted(status) for status in await pair.statuses()] == [1]
    assert await reconciler.renew_all([(here.reservation, 30.0)]) == [True]


def test_a_child_process_owes_the_backend_nothing() -> None:
    """A process tells of its own admissions before a fork; its children begin anew."""
    pair = Pair(TEN)
    reconciler = pair.limiter.engine.decider.local.reconciler

    pair.backend.away = True
    assert asyncio.run(pair.admitted(3)) == 3
    reconciler.lost = 7
    child = os.fork()
    if not child:
        os._exit(0 if (len(reconciler), reconciler.lost) == (0, 0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (len(reconciler), reconciler.lost) == (1, 7)

    async def end() -> None:
        await pair.back()
        assert [counted(status) for status in await pair.statuses()] == [3]
        await pair.limiter.close()

    asyncio.run(end())


async def test_an_end_while_it_is_told(make: MakePair) -> None:
    """A request that ends in the very moment in which the backend learns of it leaves nothing behind."""
    pair = make(MONEY)
    pair.backend.away = True
    lease = await pair.limiter.acquire(api_key="a")
    pair.backend.away = False
    decide = pair.backend.decide
    ended: list[Lease] = []

    async def slow(charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        outcome = decide(charge, lease_id, price)
        if charge.slots:
            await lease.settle("0.02")
            pair.limiter.engine.leases.end(lease, failed=False)
            ended.append(lease)
        return outcome

    pair.backend.restore = slow  # type: ignore[method-assign]
    telling = pair.limiter.engine.decider.local.reconciler._syncing._task
    assert telling is not None
    await telling
    assert ended == [lease]
    _, slots, day = await pair.statuses()
    assert (counted(slots), *budget_status(day)[:2]) == (0, 2 * CENT, 0)


async def test_the_backend_is_told_without_being_asked(make: MakePair) -> None:
    """Nobody has to call: it is noticed that the backend is back, and nothing runs on after that."""
    pair = make(TEN)
    pair.backend.away = True
    assert await pair.admitted(2) == 2
    await asyncio.sleep(0.15)
    pair.backend.away = False
    telling = pair.limiter.engine.decider.local.reconciler._syncing._task
    assert telling is not None
    await asyncio.wait_for(telling, 10)
    assert counted((await pair.statuses())[0]) == 2


async def test_closing_tells_what_is_lost(make: MakePair, caplog: pytest.LogCaptureFixture) -> None:
    """Counts that the backend could not be told before the end are lost, and the log says how many."""
    pair = make(MONEY)
    pair.backend.away = True
    async with await pair.limiter.acquire(api_key="a"):
        pass
    await pair.limiter.close()
    assert "2 counts of this process never reached the backend" in caplog.text
    assert pair.limiter.engine.decider.local.reconciler.lost == 2


async def test_what_waits_is_bounded(
    make: MakePair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The oldest is given up where too much waits for the backend, and that is counted, and said once."""
    monkeypatch.setattr("ratelimit_mw._internal.outage.reconcile.MAX_UNSYNCED", 5)
    pair = make(MONEY)
    pair.backend.away = True
    for number in range(8):
        async with await pair.limiter.acquire(api_key=f"{number}"):
            pass
    reconciler = pair.limiter.engine.decider.local.reconciler
    assert (len(reconciler), reconciler.lost) == (10, 6)
    assert [
        record.levelname for record in caplog.records if "will never reach the backend" in record.message
    ] == ["ERROR"]


async def test_what_is_admitted_while_the_backend_is_told_is_told_next(make: MakePair) -> None:
    """A backend that goes again in the middle of it learns of everything, once."""
    pair = make(TEN)
    pair.backend.away = True
    assert await pair.admitted(3) == 3
    restore = pair.backend.restore

    async def slow(charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        outcome = await restore(charge, lease_id, price)
        pair.backend.away = True
        assert await pair.admitted(2) == 2
        return outcome

    pair.backend.restore = slow  # type: ignore[method-assign]
    await pair.back()
    pair.backend.restore = restore  # type: ignore[method-assign]
    await pair.back()
    assert [counted(status) for status in await pair.statuses()] == [5]


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers come and go; what is known of them does not grow without end."""
    monkeypatch.setattr("ratelimit_mw._internal.outage.fallback.MAX_KNOWN", 5)
    clock = FakeClock()
    local = LocalPolicy(MemoryBackend(clock=clock), clock=clock)
    for number in range(9):
        charge = Charge([Counter(f"k:{number}", "p", Window(10, 1, "minute"))])
        local.remember(charge, await MemoryBackend(clock=clock).acquire(charge, bytes(16)))
    assert 0 < len(local._known) <= 5


async def test_decisions_are_counted_by_policy(make: MakePair) -> None:
    """Decisions are counted by the policy that made them."""
    pair = make('routes = [{path = "/a", on_failure = "allow"}, {path = "/d", on_failure = "deny"}]')
    pair.backend.away = True
    for path in ("/", "/a", "/a", "/d"):
        await pair.limiter.acquire(api_key="a", path=path)
    assert pair.limiter.engine.decider.local.decisions == {"local": 1, "allow": 2, "deny": 1}


async def test_clocks_that_disagree_cost_exactness_only(make: MakePair) -> None:
    """Counts from a server whose clock is ahead leave their window one length from now at the latest."""
    pair = make(TEN)
    pair.clock.set(3600)
    assert await pair.admitted(10) == 10
    pair.backend.away = True
    pair.clock.set(0)
    assert await pair.admitted(1) == 0
    pair.clock.now += 60 * SECOND
    assert await pair.admitted(1) == 1


async def test_a_slot_taken_during_an_outage_is_held_as_long_as_its_work() -> None:
    """It is renewed as any other, so that nobody else gets it while its holder runs."""
    settings = settings_of("""
        plans.default.concurrent = { limit = 1, lease = 1 }
        backend.local_share = 1.0
    """)
    backend = Shaky()
    backend.away = True
    async with Limiter(settings, backend=backend) as limiter:
        async with await limiter.acquire(api_key="a") as lease:
            assert (lease.allowed, lease.decision.policy) == (True, "local")
            for _ in range(5):
                await asyncio.sleep(0.5)
                assert not (await limiter.acquire(api_key="a")).allowed
        assert (await limiter.acquire(api_key="a")).allowed
