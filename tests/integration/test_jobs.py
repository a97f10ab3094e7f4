"""Jobs that outlive their request: detached by one limiter, gone on with by another."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ratelimit_mw import LeaseError, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus
from ratelimit_mw._internal.observe.events import Event, SettleIgnored, SlotLost
from ratelimit_mw._internal.policy.decision import LimitStatus
from tests.conftest import StartServer
from tests.support.asgi import START, Down, FakeClock, client_of, ok, settings_of
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.slots import until_async

pytestmark = pytest.mark.rerun

SETTINGS = """
[identity]
hash_secret = "secret"
[plans.default]
requests = ["1000/minute"]
concurrent = { limit = 2, unit = "prediction", lease = 30 }
spending = { daily = "1.00", monthly = "10.00" }
[[routes]]
path = "/free"
exempt = true
[[routes]]
path = "/{rest:path}"
price = "0.10"
"""
CENT = 10_000

MakeLimiter = Callable[..., Limiter]


@pytest.fixture
def clock() -> FakeClock:
    """A clock that only the test moves."""
    return FakeClock()


@pytest.fixture
async def make(server: StoreServer, clock: FakeClock) -> AsyncIterator[MakeLimiter]:
    """Make limiters as processes of their own would have them: on one server, with one clock."""
    async with AsyncExitStack() as stack:
        limiters: list[Limiter] = []

        def make(text: str = SETTINGS, on_event: Callable[[Event], object] | None = None) -> Limiter:
            backend = RedisBackend(server.url, timeout=5, clock=clock)
            limiters.append(Limiter(settings_of(text), backend=backend, on_event=on_event))
            stack.push_async_callback(limiters[-1].close)
            return limiters[-1]

        yield make


def limiter_on(url: str) -> Limiter:
    """A limiter on a server, by the server's own clock."""
    return Limiter(settings_of(f'{SETTINGS}[backend]\nurl = "{url}"\n'))


async def look(limiter: Limiter, key: str = "a") -> tuple[LimitStatus, ...]:
    """Return the status of the limits of a key."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key=key), "GET", "/")
    return (await limiter.engine.peek(policy)).limits


async def budget(limiter: Limiter, key: str = "a") -> BudgetStatus:
    """Return the status of today's budget of a key."""
    return next(each.status for each in await look(limiter, key) if isinstance(each.status, BudgetStatus))


async def active(limiter: Limiter, key: str = "a") -> int:
    """Return the number of slots that a key holds."""
    return next(
        each.status.active for each in await look(limiter, key) if isinstance(each.status, SlotStatus)
    )


async def job_of(limiter: Limiter, ttl: float = 600) -> str:
    """A token, as an API hands it to a queue: its request has ended."""
    lease = await limiter.acquire(api_key="a")
    assert lease.allowed
    token = await lease.detach(ttl=ttl)
    limiter.engine.leases.end(lease, failed=False)
    return token


async def test_a_detached_job_keeps_slot_and_price_until_a_worker_ends_it(make: MakeLimiter) -> None:
    """The request is over, the job counts on; the worker's settle and end are the job's."""
    api, worker = make(), make()
    token = await job_of(api)
    assert await active(api) == 1
    assert (await budget(api))[:2] == (0, 10 * CENT)
    async with worker.resume(token) as job:
        await job.settle("0.031")
        assert await active(api) == 1
    await worker.close()
    assert await active(api) == 0
    assert (await budget(api))[:2] == (31_000, 0)


async def test_a_job_waits_for_its_ttl_and_no_longer(make: MakeLimiter, clock: FakeClock) -> None:
    """Without a worker the slot is free when the ttl has passed; the estimate stays until settled."""
    api = make()
    token = await job_of(api, ttl=600)
    clock.set(599.9)
    assert await active(api) == 1
    clock.set(600)
    assert await active(api) == 0
    assert (await budget(api)).held == 10 * CENT
    assert not await api.renew(token)


async def test_a_resumed_job_lasts_for_its_lease(make: MakeLimiter, clock: FakeClock) -> None:
    """Once a worker has it, a long ttl is over: a worker that dies holds the slot for `lease` seconds."""
    api, worker = make(), make()
    token = await job_of(api, ttl=600)
    job = worker.resume(token)
    await job.__aenter__()
    clock.set(29.9)
    assert await active(api) == 1
    clock.set(30)
    assert await active(api) == 0
    await job.__aexit__(None, None, None)


async def test_renewing_by_hand_lasts_for_the_lease(make: MakeLimiter, clock: FakeClock) -> None:
    """A worker without `resume` renews as often as it likes."""
    api, worker = make(), make()
    token = await job_of(api, ttl=10)
    clock.set(9)
    assert await worker.renew(token)
    clock.set(38.9)
    assert await active(api) == 1
    clock.set(39)
    assert not await worker.renew(token)
    assert await active(api) == 0


async def test_releasing_by_hand_is_idempotent(make: MakeLimiter) -> None:
    """From any process, in any order, and after the end of a resumed job; another job keeps its slot."""
    api, worker = make(), make()
    token, other = await job_of(api), await job_of(api)
    async with worker.resume(token):
        await api.release(token)
        await worker.release(token)
        assert await active(api) == 1
    await worker.release(token)
    assert await active(api) == 1
    await worker.release(other)
    assert await active(api) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
async def test_a_worker_that_fails_frees_the_slot(make: MakeLimiter, error: type[BaseException]) -> None:
    """However a resumed job ends, its slot is free; the estimate stays charged."""
    api, worker = make(), make()
    token = await job_of(api)
    with pytest.raises(error):
        async with worker.resume(token):
            raise error
    await worker.close()
    assert await active(api) == 0
    assert (await budget(api)).held == 10 * CENT


async def test_a_lost_job_is_reported_and_takes_no_slot_again(
    make: MakeLimiter, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that comes too late works on uncounted, is told so, and frees nobody's slot."""
    events: list[Event] = []
    api, worker = make(), make(on_event=events.append)
    token = await job_of(api, ttl=1)
    clock.set(2)
    await job_of(api)
    await job_of(api)
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        async with worker.resume(token) as job:
            assert job.is_lost
            assert await active(api) == 2
    await worker.close()
    assert await active(api) == 2
    assert events == [SlotLost(job.id)]
    assert "slot lost" in caplog.text


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_job_delivered_twice_holds_its_slot_until_the_last_has_ended(
    make: MakeLimiter, clock: FakeClock, first: int, by_hand: bool
) -> None:
    """Whichever ends first, and however, frees nothing under the other, whose slot is renewed on."""
    api, worker = make(), make()
    token = await job_of(api)
    stacks = AsyncExitStack(), AsyncExitStack()
    jobs = [await stack.enter_async_context(worker.resume(token)) for stack in stacks]
    if by_hand:
        await jobs[first].release()
    await stacks[first].aclose()
    assert await active(api) == 1
    left = jobs[1 - first]
    for seconds in (20, 40, 60):
        clock.set(seconds)
        left.renew_at = 0.0
        worker.engine.leases.renewing()._look()
        await _settled(worker)
    assert await active(api) == 1
    assert not left.is_lost
    await stacks[1 - first].aclose()
    await worker.close()
    assert await active(api) == 0
    assert not worker.engine.leases._jobs


async def test_a_job_delivered_twice_is_lost_for_both(make: MakeLimiter, clock: FakeClock) -> None:
    """A job delivered twice is lost for both if its slot is gone, and the loss is told once."""
    events: list[Event] = []
    api, worker = make(), make(on_event=events.append)
    token = await job_of(api)
    async with worker.resume(token) as one, worker.resume(token) as other:
        await api.release(token)
        other.renew_at = 0.0
        worker.engine.leases.renewing()._look()
        await _settled(worker)
        assert (one.is_lost, other.is_lost) == (True, True)
    async with worker.resume(token) as late:
        assert late.is_lost
    await worker.close()
    assert events == [SlotLost(one.id), SlotLost(one.id)]


async def _settled(limiter: Limiter) -> None:
    """Wait until what a look at the leases has begun is over."""
    while limiter.engine.leases.renewing()._tasks:
        await asyncio.sleep(0.005)


async def test_detaching_twice_gives_the_same_token(make: MakeLimiter, clock: FakeClock) -> None:
    """The second call changes nothing, not even the ttl."""
    api = make()
    lease = await api.acquire(api_key="a")
    token = await lease.detach(ttl=10)
    clock.set(5)
    assert await lease.detach(ttl=600) == token
    clock.set(10)
    assert await active(api) == 0


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), True, "60", None])
async def test_a_ttl_that_is_none_is_an_error_and_harms_nothing(make: MakeLimiter, ttl: float) -> None:
    """The request goes on as if it had not asked, and its slot ends with it."""
    api = make()
    async with await api.acquire(api_key="a") as lease:
        with pytest.raises(LeaseError, match="ttl must be a positive number"):
            await lease.detach(ttl=ttl)
        assert not lease.is_detached
    await api.close()
    assert await active(api) == 0


async def test_a_token_of_another_secret_is_refused_by_every_verb(make: MakeLimiter) -> None:
    """A token that another deployment signed, or nobody, neither frees nor renews nor settles."""
    api, other = make(), make(SETTINGS.replace('"secret"', '"another"'))
    token = await job_of(api)
    for wrong in (token, "nonsense", ""):
        with pytest.raises(LeaseError):
            await other.release(wrong)
        with pytest.raises(LeaseError):
            await other.renew(wrong)
        with pytest.raises(LeaseError):
            await other.settle(wrong, "0.01")
        with pytest.raises(LeaseError):
            async with other.resume(wrong):
                pass
    assert await active(api) == 1
    assert (await budget(api))[:2] == (0, 10 * CENT)


async def test_a_job_goes_on_after_the_settings_changed(make: MakeLimiter) -> None:
    """A worker with other plans, other limits or none at all ends and settles the job all the same."""
    api = make()
    worker = make('[identity]\nhash_secret = "secret"\n[plans.default]\nrequests = ["1/day"]\n')
    token = await job_of(api)
    async with worker.resume(token) as job:
        assert await active(api) == 1
        await job.settle("0.20")
    await worker.close()
    assert await active(api) == 0
    assert (await budget(api))[:2] == (20 * CENT, 0)


async def test_a_job_of_an_account_is_counted_for_all_its_keys(make: MakeLimiter) -> None:
    """With a plan that shares by account, one key's job holds the slot of the others, too."""
    text = """
[identity]
hash_secret = "secret"
[plans.team]
concurrent = 1
share = "account"
spending = { daily = "1.00" }
[[keys]]
key = "a"
plan = "team"
account = "acme"
[[keys]]
key = "b"
plan = "team"
account = "acme"
[[routes]]
path = "/{rest:path}"
price = "0.10"
"""
    api, worker = make(text), make(text)
    token = await job_of(api)
    assert not (await api.acquire(api_key="b")).allowed
    async with worker.resume(token) as job:
        await job.settle("0.05")
    await worker.close()
    assert (await budget(api, key="b"))[:2] == (5 * CENT, 0)
    assert (await api.acquire(api_key="b")).allowed


async def test_a_settle_of_the_next_day_counts_for_the_day_of_admission(
    make: MakeLimiter, clock: FakeClock
) -> None:
    """A job that runs past midnight is charged to the day and month in which it was admitted."""
    api, worker = make(), make()
    token = await job_of(api)
    midnight = 86_400 - START % 86_400
    clock.set(midnight + 3_600)
    await worker.settle(token, "0.40")
    assert (await budget(api))[:2] == (0, 0)
    clock.set(midnight - 1)
    assert (await budget(api))[:2] == (40 * CENT, 0)


async def test_a_settle_counts_once_from_however_many_processes(make: MakeLimiter) -> None:
    """A settle with one amount is one charge, though two processes send it twenty times at once."""
    api, worker = make(), make()
    token = await job_of(api)
    await asyncio.gather(*[limiter.settle(token, "0.31") for limiter in (api, worker) * 10])
    assert (await budget(api))[:2] == (31 * CENT, 0)


async def test_of_two_amounts_the_first_counts_and_the_other_is_reported(make: MakeLimiter) -> None:
    """Unless it says `replace`."""
    events: list[Event] = []
    api, worker = make(), make(on_event=events.append)
    token = await job_of(api)
    await api.settle(token, "0.31")
    await worker.settle(token, "0.32")
    assert (await budget(api)).spent == 31 * CENT
    assert [type(event) for event in events] == [SettleIgnored]
    await worker.settle(token, "0.33", replace=True)
    assert (await budget(api)).spent == 33 * CENT


async def test_settling_nothing_gives_the_estimate_back(make: MakeLimiter) -> None:
    """`settle("0")` is how a job says that it did no work."""
    api = make()
    token = await job_of(api)
    await api.settle(token, "0")
    assert (await budget(api))[:2] == (0, 0)


async def test_where_nothing_was_charged_nothing_happens(make: MakeLimiter) -> None:
    """An exempt request detaches, settles, resumes, renews and releases, and nothing raises."""
    api, worker = make(), make()
    lease = await api.acquire(api_key="a", path="/free")
    await lease.settle("0.10")
    token = await lease.detach(ttl=60)
    async with worker.resume(token) as job:
        await job.settle("0.10")
        assert not job.is_lost
    assert await worker.renew(token)
    await worker.release(token)
    await worker.settle(token, "0.10")
    await lease.release()
    assert await active(api) == 0


async def test_where_the_settings_allow_without_a_backend_nothing_happens(clock: FakeClock) -> None:
    """A request let through while the backend is away has nothing to detach or settle, and nothing raises."""
    limiter = Limiter(settings_of(f'{SETTINGS}[backend]\non_failure = "allow"\n'), backend=Down(clock=clock))
    lease = await limiter.acquire(api_key="a")
    assert lease.allowed
    await lease.settle("0.10")
    async with limiter.resume(await lease.detach(ttl=60)) as job:
        await job.settle("0.10")


async def test_detaching_after_the_request_has_ended_holds_nothing(make: MakeLimiter) -> None:
    """A task that outlived its request gets a token of nothing: the slot is another's by now."""
    api = make()
    lease = await api.acquire(api_key="a")
    api.engine.leases.end(lease, failed=False)
    token = await lease.detach(ttl=60)
    async with api.resume(token) as job:
        assert not job.is_lost
    assert await active(api) == 0


async def test_a_request_below_400_or_not_leaves_a_detached_job_alone(make: MakeLimiter) -> None:
    """From `detach` on, only settle, release and renew change anything: also where the response fails."""
    limiter = make()
    tokens = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tokens.append(await scope["state"]["ratelimit"].detach(ttl=60))
        raise RuntimeError("after detaching")

    async with client_of(RateLimitMiddleware(app, limiter=limiter), x_api_key="a") as client:
        with pytest.raises(RuntimeError):
            await client.get("/")
    assert await active(limiter) == 1
    assert (await budget(limiter)).held == 10 * CENT
    await limiter.release(tokens[0])


async def test_two_limiters_of_two_kinds_of_work_share_the_slots(make: MakeLimiter) -> None:
    """A detached job counts against requests, and a request against jobs."""
    api = make()
    await job_of(api)
    async with await api.acquire(api_key="a") as lease:
        assert lease.allowed
        assert not (await api.acquire(api_key="a")).allowed
    await api.close()
    assert (await api.acquire(api_key="a")).allowed


async def test_a_settle_outlives_an_outage(kind: str, start_server: StartServer) -> None:
    """A server that hangs (SIGSTOP) while a job settles gets the amount once it goes on, and only once."""
    server = start_server(kind)
    async with limiter_on(server.url) as limiter:
        token = await job_of(limiter)
        server.stop_signal()
        await limiter.settle(token, "0.31")
        await limiter.settle(token, "0.31")
        await limiter.release(token)
        stranger = await limiter.acquire(api_key="a")
        assert stranger.decision.policy == "local"
        limiter.engine.leases.end(stranger, failed=True)  # or the server would hear of its estimate, too
        server.continue_signal()
        await until_async(lambda: not limiter.engine.backend.load.owed)
        assert (await budget(limiter))[:2] == (31 * CENT, 0)
        assert await active(limiter) == 0


async def test_a_settle_whose_answer_is_lost_counts_once(server: StoreServer) -> None:
    """It was written, the reply never came, it is sent again: the books say it once."""
    async with Proxy(server.port) as proxy, limiter_on(proxy.url) as limiter:
        token = await job_of(limiter)
        proxy.fault = "drop_replies"
        await limiter.settle(token, "0.31")
        assert proxy.lost > 0
        proxy.fault = "none"
        proxy.reset()
        await until_async(lambda: not limiter.engine.backend.load.owed)
        assert (await budget(limiter))[:2] == (31 * CENT, 0)


async def test_a_settle_that_cannot_be_written_before_the_close_is_reported(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At shutdown what is owed is tried for a bounded time, and what is lost then is logged."""
    monkeypatch.setattr("ratelimit_mw._internal.backends.redis.loops.CLOSE_TIMEOUT", 0.2)
    server = start_server("redis")
    async with limiter_on(server.url) as limiter:
        token = await job_of(limiter)
        server.kill()
        await limiter.settle(token, "0.31")
    assert not limiter.engine.backend.load.owed
    assert "did not reach the backend" in caplog.text


async def test_a_handler_that_ignores_it_all_leaks_nothing(make: MakeLimiter) -> None:
    """No handler has to know that it holds anything."""
    limiter = make()
    app = RateLimitMiddleware(Starlette(routes=[Route("/{rest:path}", ok)]), limiter=limiter)
    async with client_of(app, x_api_key="a") as client:
        for _ in range(5):
            assert (await client.get("/")).status_code == 200
    await limiter.close()
    assert await active(limiter) == 0
    assert (await budget(limiter))[:2] == (50 * CENT, 0)
