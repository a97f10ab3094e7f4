"""Estimates of running requests last like their slots; from `detach` on they are kept until settled."""

import asyncio
import gc

import pytest
from starlette.types import Receive, Scope, Send

from ratelimit_mw import Lease, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import EstimateAction
from tests.support.asgi import Down, FakeClock, limiter_of, start_of
from tests.support.statuses import budget_status

CENT = 10_000
LATE = 31
"""Seconds after which what was not renewed has lapsed: a lease of 30 s, and a part of it."""
BUDGET = """
[plans.default]
spending = { daily = "1.00" }
[[routes]]
path = "/{rest:path}"
price = "0.10"
"""
WITH_SLOT = BUDGET.replace("spending", "concurrent = { limit = 3, lease = 30, max_hold = 100 }\nspending")
WITHOUT_SLOT = WITH_SLOT.replace('path = "/', 'slot = false\npath = "/')
ALL = pytest.mark.parametrize(
    "text", [BUDGET, WITH_SLOT, WITHOUT_SLOT], ids=["no slots", "slot", "slotless route"]
)


class Bench:
    """A limiter on a clock that only the test moves."""

    def __init__(self, text: str) -> None:
        self.clock = FakeClock()
        self.now = 0.0
        self.backend = MemoryBackend(clock=self.clock)
        self.limiter = limiter_of(text, self.clock, self.backend)

    async def wait(self, seconds: float, *, renewing: bool = True) -> None:
        """Let time pass, with the renewals of a process that lives or without."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 10, end)
            self.clock.set(self.now)
            renewals = self.limiter.engine.leases.renewing()
            for lease in renewals.live() if renewing else ():
                lease.renew_at = 0.0
            renewals._look()
            for _ in range(5):
                await asyncio.sleep(0)

    async def day(self, limiter: Limiter | None = None) -> tuple[int, int]:
        """Return the amounts that the day has spent and holds."""
        limiter = limiter or self.limiter
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
        status = budget_status((await limiter.engine.peek(policy)).limits[-1].status)
        return status.spent, status.held

    async def acquire(self) -> Lease:
        """Make a request."""
        lease = await self.limiter.acquire(api_key="a")
        assert lease.allowed
        return lease


@ALL
async def test_an_estimate_is_renewed_as_long_as_its_request_runs(text: str) -> None:
    """Without a slot, too; when the process is gone it lapses a lease later."""
    bench = Bench(text)
    lease = await bench.acquire()
    await bench.wait(90)
    assert await bench.day() == (0, 10 * CENT)
    await bench.wait(LATE, renewing=False)
    assert await bench.day() == (0, 0)
    assert not lease.is_ended
    assert all([(await bench.limiter.acquire(api_key="a", price="0.50")).allowed for _ in range(2)])


@ALL
@pytest.mark.parametrize(("failed", "spent"), [(False, 10 * CENT), (True, 0)])
async def test_a_request_that_was_cut_off_is_charged_as_it_ends(text: str, failed: bool, spent: int) -> None:
    """Its process lived and could not say so for longer than a lease: the end decides, as for any other."""
    bench = Bench(text)
    lease = await bench.acquire()
    await bench.wait(LATE, renewing=False)
    assert await bench.day() == (0, 0)
    bench.limiter.engine.leases.end(lease, failed=failed)
    bench.limiter.engine.leases.end(lease, failed=failed)
    assert await bench.day() == (spent, 0)


@ALL
async def test_a_settle_after_the_estimate_lapsed_counts_in_full_once(text: str) -> None:
    """The work was done, whatever became of the connection meanwhile."""
    bench = Bench(text)
    lease = await bench.acquire()
    await bench.wait(LATE, renewing=False)
    for _ in range(2):
        await lease.settle("0.03")
    bench.limiter.engine.leases.end(lease, failed=False)
    assert await bench.day() == (3 * CENT, 0)


@ALL
async def test_a_detached_estimate_is_kept_until_it_is_settled(text: str) -> None:
    """Nobody renews it, and no worker has to come; a resumed job neither shortens nor frees it."""
    bench = Bench(text)
    lease = await bench.acquire()
    token = await lease.detach(ttl=5)
    bench.limiter.engine.leases.end(lease, failed=False)
    assert not bench.limiter.engine.leases.number
    await bench.wait(3_600)
    assert await bench.day() == (0, 10 * CENT)
    async with bench.limiter.resume(token):
        await bench.wait(60)
    await bench.wait(LATE)
    assert await bench.day() == (0, 10 * CENT)
    await bench.limiter.settle(token, "0.02")
    assert await bench.day() == (2 * CENT, 0)


async def test_a_slot_that_is_freed_before_the_end_leaves_the_estimate(make_loss: str) -> None:
    """Released by hand, lost or held for its `max_hold`: the request runs on, and so does its estimate."""
    bench = Bench(WITH_SLOT)
    lease = await bench.acquire()
    if make_loss == "released":
        await lease.release()
    elif make_loss == "lost":
        bench.backend.finish(lease.reservation, EstimateAction.UNTOUCHED)
    else:
        bench.limiter.engine.leases.renewing()._give_up(lease)
    await bench.wait(90)
    assert lease.is_lost is (make_loss != "released")
    assert await bench.day() == (0, 10 * CENT)
    bench.limiter.engine.leases.end(lease, failed=False)
    assert await bench.day() == (10 * CENT, 0)
    assert not bench.limiter.engine.leases.number


@pytest.fixture(params=["released", "lost", "given up"])
def make_loss(request: pytest.FixtureRequest) -> str:
    """Return the way in which a slot goes before its request ends."""
    kind: str = request.param
    return kind


async def test_the_lease_of_an_estimate_is_the_plans_also_where_its_route_takes_no_slot() -> None:
    """While the backend is away as while it is there; without any in the plan it is 30 s."""
    for text, seconds in ((WITHOUT_SLOT.replace("lease = 30", "lease = 7"), 7.0), (BUDGET, 30.0)):
        bench = Bench(text)
        there = await bench.acquire()
        away = limiter_of(text, bench.clock, Down(clock=bench.clock))
        here = await away.acquire(api_key="a")
        assert here.decision.policy == "local"
        assert (there.reservation.lease_seconds, here.reservation.lease_seconds) == (seconds, seconds)
        await away.close()


async def test_who_forgets_a_lease_lets_its_estimate_lapse() -> None:
    """Nothing is renewed for what was dropped without a word, and nothing is remembered of it."""
    bench = Bench(WITHOUT_SLOT)
    await bench.acquire()
    gc.collect()
    assert not bench.limiter.engine.leases.number
    kept = await bench.acquire()
    await bench.wait(60)
    assert await bench.day() == (0, 10 * CENT)
    await kept.settle("0.01")
    assert not bench.limiter.engine.leases.number
    assert await bench.day() == (CENT, 0)


async def test_a_lease_that_is_only_released_keeps_its_estimate() -> None:
    """A consumer that leaves it so pays for it like a request that ends unsettled."""
    bench = Bench(WITH_SLOT)
    lease = await bench.acquire()
    await lease.release()
    assert not bench.limiter.engine.leases.number
    await bench.wait(3_600)
    assert await bench.day() == (0, 10 * CENT)
    await lease.settle("0.02")
    assert await bench.day() == (2 * CENT, 0)


@pytest.mark.parametrize("lives", [True, False])
async def test_a_request_that_frees_its_slot_early_keeps_its_estimate_as_long_as_it_runs(lives: bool) -> None:
    """No process of it that is killed afterwards holds a budget to the end of its period."""
    bench = Bench(WITH_SLOT)
    released, over = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        await scope["state"]["ratelimit"].release()
        released.set()
        await over.wait()

    middleware = RateLimitMiddleware(app, limiter=bench.limiter)
    request = asyncio.create_task(start_of(middleware, b"a"))
    await released.wait()
    gc.collect()
    await bench.wait(90, renewing=lives)
    assert await bench.day() == (0, 10 * CENT if lives else 0)
    request.cancel()
    await asyncio.wait([request])
    assert await bench.day() == (0, 0)
    assert not bench.limiter.engine.leases.number


async def test_what_holds_no_money_is_not_renewed() -> None:
    """A price of nothing, or none, leaves nothing to be renewed where there is no slot."""
    bench = Bench(BUDGET.replace('"0.10"', '"0"'))
    free = await bench.acquire()
    assert free.reservation.periods
    assert not bench.limiter.engine.leases.number
    bench = Bench(BUDGET)
    lease = await bench.acquire()
    assert bench.limiter.engine.leases.number == 1
    bench.limiter.engine.leases.end(lease, failed=False)
    assert not bench.limiter.engine.leases.number
