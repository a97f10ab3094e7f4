"""Requests that can never fit, and operations that a healthy server refuses: neither is an outage."""

import math
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any, Literal

import pytest

from ratelimit_mw import Lease, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.policy.decision import Decision
from tests.support.asgi import Down, FakeClock, client_of, ok_app, settings_of
from tests.support.servers import StoreServer
from tests.support.statuses import counted, peeked
from tests.support.topologies import Cluster

OnFailure = Literal["local", "allow", "deny"]
COSTS = [6, 10**9, 2**32 - 1, 2**32, 2**53 + 1, 2**64, 10**400, 10**5000]
POLICIES: list[OnFailure] = ["local", "allow", "deny"]
HUGE = [pytest.param(cost, id=f"{cost:.0e}" if cost < 2**99 else "long") for cost in COSTS]
SETTINGS = """
backend = {{ url = "{url}", on_failure = "{on_failure}", timeout = 5 }}
identity = {{ hash_secret = "a secret of a test" }}
plans.default = {{ requests = ["5/hour"] }}
plans.slots = {{ concurrent = 1 }}
plans.money = {{ spending = {{ daily = "10.00" }} }}
plans.tokens = {{ spending = {{ daily = "1000", currency = "token" }} }}
keys = [
  {{ key = "slots", plan = "slots" }},
  {{ key = "money", plan = "money" }},
  {{ key = "tokens", plan = "tokens" }},
]
"""


@pytest.fixture(params=["memory", "redis", "down"])
def url(request: pytest.FixtureRequest, redis_server: StoreServer) -> str:
    """A backend in this process, a healthy Redis, and one that nobody answers for."""
    return {"memory": "memory://", "redis": redis_server.url, "down": "down"}[request.param]


@pytest.fixture(params=POLICIES)
def on_failure(request: pytest.FixtureRequest) -> OnFailure:
    """Each thing that settings can say about an outage."""
    policy: OnFailure = request.param
    return policy


@pytest.fixture
async def limiter(url: str, on_failure: OnFailure) -> AsyncIterator[Limiter]:
    """A limiter on that backend."""
    is_down = url == "down"
    settings = settings_of(SETTINGS.format(url="memory://" if is_down else url, on_failure=on_failure))
    async with Limiter(settings, backend=Down() if is_down else None) as limiter:
        yield limiter


def refused_for(decision: Decision) -> str | None:
    """Return the reason of a refusal; None for an admission."""
    return None if decision.refusal is None else decision.refusal.reason


@pytest.mark.parametrize("cost", HUGE)
async def test_a_cost_over_every_limit_never_fits(limiter: Limiter, cost: int) -> None:
    """However large it is, whoever decides and whatever outages would mean, it is refused with figures."""
    lease = await limiter.acquire(api_key="a", cost=cost)
    assert (lease.allowed, refused_for(lease.decision)) == (False, "cost")
    assert lease.decision.cost == cost
    ((counter, figures),) = lease.decision.limits
    assert (counter.limit.text, figures.used) == ("5/hour", 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("cost", HUGE)
async def test_a_cost_over_every_limit_never_fits_on_a_cluster(
    cost: int, shared_cluster: Callable[[str], Cluster]
) -> None:
    """A cost over every limit never fits, also if the limits of one request are counted on several nodes."""
    text = SETTINGS.format(url=shared_cluster("redis").url, on_failure="allow")
    text += 'application = { requests = ["100/hour"] }\n'
    async with Limiter(settings_of(text)) as limiter:
        lease = await limiter.acquire(api_key="a", cost=cost)
        slots = [await limiter.acquire(api_key="slots", cost=min(cost, 100)) for _ in range(3)]
    assert (lease.allowed, refused_for(lease.decision)) == (False, "cost")
    assert [counted(each) for each in lease.decision.limits] == [0, 0]
    assert sum(each.allowed for each in slots) == 1


@pytest.mark.parametrize("cost", HUGE)
async def test_a_cost_that_nothing_counts_changes_nothing(
    limiter: Limiter, url: str, on_failure: OnFailure, cost: int
) -> None:
    """Under slots alone a cost counts nowhere: one slot is one slot at any cost."""
    if url == "down" and on_failure != "local":
        pytest.skip("nobody counts: the settings say so")
    leases = [await limiter.acquire(api_key="slots", cost=cost) for _ in range(20)]
    assert [lease.allowed for lease in leases] == [True] + [False] * 19
    assert {refused_for(lease.decision) for lease in leases[1:]} == {"concurrency"}


@pytest.mark.parametrize(
    ("key", "price"),
    [
        ("money", "10.01"),
        ("money", 10**9 + 1),
        ("money", str(2**53)),
        ("money", 10**400),
        ("money", Decimal("1E+30")),
        ("tokens", 1001),
        ("tokens", 10**15 + 1),
        ("tokens", 2**64),
    ],
)
async def test_a_price_over_the_budget_never_fits(limiter: Limiter, key: str, price: Any) -> None:
    """However large an estimate is, it is refused as one that no waiting helps."""
    lease = await limiter.acquire(api_key=key, price=price)
    assert (lease.allowed, refused_for(lease.decision)) == (False, "cost")


@pytest.mark.parametrize("price", ["10.01", "3000000000", 2**64])
async def test_a_price_hook_s_huge_estimate_never_fits(price: Any) -> None:
    """An estimate that is larger than any budget is refused, not replaced by the route's smaller one."""
    text = 'plans.default = { spending = { daily = "10.00" } }\nroutes = [{ path = "/", price = "0.01" }]'
    app = RateLimitMiddleware(ok_app(), settings=settings_of(text), price=lambda *_: price)
    async with client_of(app, x_api_key="a") as client:
        response = await client.get("/")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "COST_EXCEEDS_LIMIT")


@pytest.mark.parametrize("cost", HUGE)
async def test_a_backend_itself_refuses_costs_of_any_size(redis_server: StoreServer, cost: int) -> None:
    """Also asked directly, with any other backend's answer: not admitted, and nothing raised."""
    limiter = Limiter(settings_of(""))
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/", max(cost, 61))
    answers = []
    backends = (MemoryBackend(), RedisBackend(redis_server.url, timeout=5))
    backend: MemoryBackend | RedisBackend
    for backend in backends:
        outcome = await peeked(backend, policy.charge)
        answers.append((outcome.admitted, outcome.counted))
        await backend.close()
    assert answers == [(False, [0, 0])] * 2


# what a server that is there refuses ------------------------------------------------------------


def out_of_memory(server: StoreServer) -> None:
    """Have the server refuse all that needs memory."""
    with server.client() as client:
        client.config_set("maxmemory", "1")


def with_memory(server: StoreServer) -> None:
    """Let the server do again whatever it is asked."""
    with server.client() as client:
        client.config_set("maxmemory", "0")


@pytest.mark.parametrize("is_web", [True, False])
async def test_what_a_healthy_server_refuses_is_never_uncounted(
    redis_server: StoreServer,
    on_failure: OnFailure,
    is_web: bool,
) -> None:
    """A server that was asked and could not decide is not away: `"allow"` counts here, `"deny"` refuses."""
    settings = settings_of(SETTINGS.format(url=redis_server.url, on_failure=on_failure))
    async with Limiter(settings) as limiter:
        assert await asked(limiter, 1, is_web=is_web) == [200]
        out_of_memory(redis_server)
        try:
            statuses = await asked(limiter, 20, is_web=is_web)
        finally:
            with_memory(redis_server)
        assert limiter.stats().backend_up
    # What this process knew counts: one was used of five.
    expected = [503] * 20 if on_failure == "deny" else [200] * 4 + [429] * 16
    assert statuses == expected


async def asked(limiter: Limiter, number: int, *, is_web: bool) -> list[int]:
    """Send so many requests, through the middleware or by hand; return their statuses."""
    if is_web:
        async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
            return [(await client.get("/")).status_code for _ in range(number)]
    leases = [await limiter.acquire(api_key="a") for _ in range(number)]
    return [status_of(lease) for lease in leases]


def status_of(lease: Lease) -> int:
    """The status that a response would have."""
    if lease.allowed:
        return 200
    return 503 if refused_for(lease.decision) == "unavailable" else 429


async def test_slots_and_money_that_a_server_refuses_to_count_are_counted_here(
    redis_server: StoreServer,
) -> None:
    """Under `"allow"` slots and budgets that a full server does not count admit no more than their limit."""
    settings = settings_of(SETTINGS.format(url=redis_server.url, on_failure="allow"))
    async with Limiter(settings) as limiter:
        for key, price in [("slots", None), ("money", "1.00")]:
            lease = await limiter.acquire(api_key=key, price=price)
            await lease.settle("0")
            await lease.release()
        out_of_memory(redis_server)
        try:
            slots = [await limiter.acquire(api_key="slots") for _ in range(20)]
            money = [await limiter.acquire(api_key="money", price="1.00") for _ in range(20)]
        finally:
            with_memory(redis_server)
    assert sum(lease.allowed for lease in slots) == 1
    assert sum(lease.allowed for lease in money) == 9  # of what was left when the server was last heard


async def test_an_outage_is_still_what_the_settings_say() -> None:
    """An outage admits all that can ever fit under `"allow"`, if nobody could be asked."""
    settings = settings_of(SETTINGS.format(url="memory://", on_failure="allow"))
    limiter = Limiter(settings, backend=Down(clock=FakeClock()))
    leases = [await limiter.acquire(api_key="a") for _ in range(math.prod((4, 5)))]
    assert {lease.decision.policy for lease in leases} == {"allow"}
