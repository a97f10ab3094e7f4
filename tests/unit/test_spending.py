"""Spending budgets over HTTP: held, settled, given back, refused, warned of."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import Identity, LeaseError, Limiter, RateLimited, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.limits import Slots
from ratelimit_mw._internal.observe.events import BudgetWarning, Event, SettleIgnored
from tests.support.asgi import START, FakeClock, client_of, limiter_of, scope_of, settings_of
from tests.support.statuses import budget_status, counted

if TYPE_CHECKING:
    from tests.support.servers import StoreServer
    from tests.support.topologies import Cluster

SETTINGS = """
[plans.default]
requests = ["1000/minute"]
spending = { daily = "1.00", monthly = "3.00", warn_at = 0.5 }
[[routes]]
path = "/free"
[[routes]]
path = "/{rest:path}"
price = "0.10"
"""
DAY = 86_400
TOMORROW = (START // DAY + 1) * DAY
"""The next midnight in UTC, in seconds since 1970."""


async def serve(request: Request) -> Response:
    """Settle, fail or answer, as the query says."""
    query = request.query_params
    for amount in query.getlist("settle"):
        await request.state.ratelimit.settle(amount, replace="replace" in query)
    if "boom" in query:
        raise RuntimeError("boom")
    return PlainTextResponse("ok", status_code=int(query.get("status", "200")))


def app_of(limiter: Limiter, **hooks: Any) -> RateLimitMiddleware:
    """An app that does as the query says, behind this limiter."""
    routes = [Route("/{rest:path}", serve, methods=["GET", "POST"])]
    return RateLimitMiddleware(Starlette(routes=routes), limiter=limiter, **hooks)


async def start_of_none(app: RateLimitMiddleware) -> int:
    """Send a request with the key `k`; how many messages the app sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope_of(b"k", "/"), receive, send)
    return len(sent)


async def spent(client: httpx.AsyncClient, limiter: Limiter, key: str = "k") -> tuple[int, int]:
    """Return the amounts that a key has spent and that are held for it today, in micro-units."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key=key), "GET", "/")
    daily = next(s for s in (await limiter.engine.peek(policy)).limits if s.counter.limit == DAILY)
    status = budget_status(daily.status)
    return status.spent, status.held


DAILY = settings_of(SETTINGS).plans["default"].spending.budget.allowances[0]  # type: ignore[union-attr]


async def test_a_budget_admits_no_more_than_it_holds() -> None:
    """60 requests at once at 0.10 against 1.00 admit exactly 10."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        answers = await asyncio.gather(*[client.get("/") for _ in range(60)])
        assert [a.status_code for a in answers].count(200) == 10
        assert await spent(client, limiter) == (1_000_000, 0)


@pytest.mark.parametrize("plan", ['{ daily = "0.20" }', '{ daily = "5.00", currency = "EUR" }', None])
async def test_a_listed_key_has_its_own_budget(plan: str | None) -> None:
    """A key's own `spending` holds in place of its plan's, be that smaller, larger or none."""
    text = f"""
    [plans.default]
    {f"spending = {plan}" if plan else ""}
    [[keys]]
    key = "own"
    plan = "default"
    spending = {{ daily = "0.30" }}
    [[keys]]
    key = "other"
    plan = "default"
    [[routes]]
    path = "/{{rest:path}}"
    price = "0.10"
    """
    limiter = limiter_of(text, FakeClock())
    async with client_of(app_of(limiter), x_api_key="own") as client:
        answers = [await client.get("/") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        details = answers[-1].json()["error"]["details"]
        assert (details["limit"], details["currency"]) == ("0.30", "USD")
        others = [(await client.get("/", headers={"x-api-key": "other"})).status_code for _ in range(4)]
        assert others.count(200) == (2 if plan and "0.20" in plan else 4)


async def test_tenths_add_up_exactly() -> None:
    """3 x 0.10 fits 0.30 exactly, which binary fractions would miss."""
    limiter = limiter_of(SETTINGS.replace('daily = "1.00", monthly = "3.00"', 'daily = "0.30"'), FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        assert [(await client.get("/")).status_code for _ in range(4)] == [200, 200, 200, 429]


async def test_a_refusal_says_what_was_spent_and_when_the_period_ends() -> None:
    """The 429 of an exhausted budget is that of the contract, and waits for the next day."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        for _ in range(10):
            await client.get("/")
        refused = await client.get("/")
    wait = TOMORROW - START
    assert refused.status_code == 429
    assert refused.json()["error"] == {
        "type": "rate_limit_error",
        "code": "SPENDING_LIMIT_EXCEEDED",
        "message": "Daily spending limit exceeded. 1.00/1.00 USD spent.",
        "details": {
            "period": "daily",
            "limit": "1.00",
            "spent": "1.00",
            "held": "0.00",
            "currency": "USD",
            "reset": TOMORROW,
            "retry_after": wait,
        },
    }
    assert refused.headers["retry-after"] == str(wait)
    assert refused.headers["x-should-retry"] == "false"


async def test_the_next_day_is_a_new_budget_and_the_month_goes_on() -> None:
    """At midnight the daily budget is whole again; the monthly one remembers."""
    clock = FakeClock()
    limiter = limiter_of(SETTINGS, clock)
    async with client_of(app_of(limiter), x_api_key="k") as client:
        for day in range(4):
            clock.set(day * DAY)
            statuses = [(await client.get("/")).status_code for _ in range(11)]
            assert statuses.count(200) == (10 if day < 3 else 0)
        assert (await client.get("/")).json()["error"]["details"]["period"] == "monthly"


async def test_only_held_estimates_in_the_way_are_worth_a_short_wait() -> None:
    """A refusal by nothing but unsettled estimates has the wait of the slots' hint, not of a day."""
    limiter = limiter_of(SETTINGS, FakeClock())
    leases = [await limiter.acquire(api_key="k", path="/") for _ in range(10)]
    async with client_of(app_of(limiter), x_api_key="k") as client:
        refused = await client.get("/")
        assert refused.json()["error"]["details"]["held"] == "1.00"
        assert 1 <= int(refused.headers["retry-after"]) <= 3
        for lease in leases:
            await lease.settle("0")
        assert (await client.get("/")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/free"])
async def test_what_shadow_lets_through_settles_nothing(path: str) -> None:
    """A request that shadow lets through is charged nothing, priced or not, so it settles nothing."""
    text = SETTINGS.replace('requests = ["1000/minute"]', 'requests = ["1/minute"]\nshadow = true')
    limiter = limiter_of(text, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        await limiter.acquire(api_key="k", path="/free")
        response = await client.get(path, params={"settle": "0.70"})
        assert response.headers["x-ratelimit-shadow"] == "refused"
        assert await spent(client, limiter) == (0, 0)


async def test_of_an_overspent_budget_nothing_is_left() -> None:
    """Work that cost more than was left is charged in full, and headers tell of nothing less than nothing."""
    async with client_of(app_of(limiter_of(SETTINGS, FakeClock())), x_api_key="k") as client:
        await client.get("/", params={"settle": "1.75"})
        refused = await client.get("/")
    assert refused.json()["error"]["details"]["spent"] == "1.75"
    assert (refused.headers["x-spending-limit"], refused.headers["x-spending-remaining"]) == ("1.00", "0.00")


@pytest.mark.parametrize("sent", [[], ["http.response.debug"]])
async def test_a_response_that_never_started_is_charged_no_money(sent: list[str]) -> None:
    """The server answers 500 where the app says nothing: nobody got what the estimate was for."""

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        for kind in sent:
            await send({"type": kind})

    limiter = limiter_of(SETTINGS, FakeClock())
    assert await start_of_none(RateLimitMiddleware(silent, limiter=limiter)) == len(sent)
    async with client_of(app_of(limiter), x_api_key="k") as client:
        assert await spent(client, limiter) == (0, 0)


@pytest.mark.parametrize("query", ["status=400", "status=503", "boom"])
async def test_a_failed_request_costs_nothing(query: str) -> None:
    """A request that raises, or answers 400 or above, unsettled, is charged no money."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        if query == "boom":
            with pytest.raises(RuntimeError):
                await client.get("/?boom")
        else:
            await client.get(f"/?{query}")
        assert await spent(client, limiter) == (0, 0)


async def test_a_settled_request_that_fails_keeps_its_price() -> None:
    """A settled price stays charged, also if the answer is an error."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        await client.get("/?settle=0.05&status=500")
        assert await spent(client, limiter) == (50_000, 0)


async def test_the_first_of_several_amounts_counts() -> None:
    """Repeats change nothing, another amount is ignored and reported, `replace=True` corrects."""
    events: list[Event] = []
    limiter = Limiter(settings_of(SETTINGS), backend=MemoryBackend(clock=FakeClock()), on_event=events.append)
    async with client_of(app_of(limiter), x_api_key="k") as client:
        await client.get("/?settle=0.05&settle=0.05&settle=0.07")
        assert await spent(client, limiter) == (50_000, 0)
        await client.get("/?settle=0.05&settle=0.07&replace")
        assert await spent(client, limiter) == (120_000, 0)
    await asyncio.sleep(0)
    ignored = [event for event in events if isinstance(event, SettleIgnored)]
    assert [(event.amount, event.reason) for event in ignored] == [("0.07", "different")]


async def test_a_price_above_its_estimate_is_charged_in_full() -> None:
    """The work was done: it may pass the limit, and the next request is refused."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        assert (await client.get("/?settle=2.50")).status_code == 200
        assert await spent(client, limiter) == (2_500_000, 0)
        assert (await client.get("/")).status_code == 429


async def test_amounts_finer_than_a_micro_unit_are_rounded_up() -> None:
    """Three tokens at 0.15 per million are a real price."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        await client.get("/?settle=0.00000045")
        assert await spent(client, limiter) == (1, 0)


@pytest.mark.parametrize("amount", ["-1", "NaN", "1e400", "", "abc", "1" * 30, "inf", True, 0.1])
async def test_a_malformed_amount_is_an_error_at_the_call(amount: Any) -> None:
    """It raises where it is settled, changes nothing, and the response is up to the handler."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with await limiter.acquire(api_key="k", path="/") as lease:
        with pytest.raises(LeaseError):
            await lease.settle(amount)
    async with client_of(app_of(limiter)) as client:
        assert await spent(client, limiter) == (100_000, 0)


async def test_a_late_settle_belongs_to_the_day_of_its_admission() -> None:
    """Settled the next day, it is charged to the day before, in its own time zone."""
    clock = FakeClock()
    limiter = limiter_of(SETTINGS, clock)
    lease = await limiter.acquire(api_key="k", path="/")
    token = await lease.detach(ttl=60)
    clock.set(DAY)
    await limiter.settle(token, "0.40")
    async with client_of(app_of(limiter)) as client:
        assert await spent(client, limiter) == (0, 0)
        clock.set(0)
        assert await spent(client, limiter) == (400_000, 0)


async def test_a_request_without_a_price_is_not_refused_for_money() -> None:
    """An exhausted budget stops what costs, not what is free."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        await client.get("/?settle=2")
        assert (await client.get("/")).status_code == 429
        assert (await client.get("/free")).status_code == 200


async def test_a_price_that_never_fits_is_told_at_once() -> None:
    """A price above the whole budget is not a question of waiting."""
    limiter = limiter_of(SETTINGS.replace('"0.10"', '"1.50"'), FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        refused = await client.get("/")
    assert refused.json()["error"]["code"] == "COST_EXCEEDS_LIMIT"
    assert refused.json()["error"]["details"] == {
        "period": "daily",
        "limit": "1.00",
        "currency": "USD",
        "price": "1.50",
    }
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"


async def test_responses_warn_from_the_configured_share_on() -> None:
    """From `warn_at` on, responses tell limit, remaining and reset of the budget nearest its end."""
    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        answers = [await client.get("/") for _ in range(5)]
    assert all("x-spending-limit" not in a.headers for a in answers[:4])
    headers = answers[4].headers
    told = (headers["x-spending-limit"], headers["x-spending-remaining"], headers["x-spending-reset"])
    assert told == ("1.00", "0.50", str(TOMORROW))


async def test_the_budget_with_the_least_share_left_is_told() -> None:
    """Not the one with the least money left: a fifth of a month is nearer its end than half of a day."""
    text, clock = SETTINGS.replace('monthly = "3.00"', 'monthly = "7.00"'), FakeClock()
    answers: list[httpx.Response] = []
    async with client_of(app_of(limiter_of(text, clock)), x_api_key="k") as client:
        for day in range(6):
            clock.set(day * DAY)
            answers = [await client.get("/") for _ in range(10 if day < 5 else 6)]
        headers = answers[-1].headers
    assert (headers["x-spending-limit"], headers["x-spending-remaining"]) == ("7.00", "1.40")


async def test_hooks_hear_of_a_budget_once_per_period() -> None:
    """One event a period, from one of all processes that share the backend."""
    clock, events = FakeClock(), list[Event]()
    shared = MemoryBackend(clock=clock)
    limiters = [Limiter(settings_of(SETTINGS), backend=shared, on_event=events.append) for _ in range(2)]
    for day in range(2):
        clock.set(day * DAY)
        for at in range(10):
            with contextlib.suppress(RateLimited):
                async with await limiters[at % 2].acquire(api_key="k", path="/"):
                    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    warnings = [event for event in events if isinstance(event, BudgetWarning)]
    # The first two are the days; the month reaches its half on the second day.
    assert sorted((w.period, w.limit) for w in warnings) == [
        ("daily", "1.00"),
        ("daily", "1.00"),
        ("monthly", "3.00"),
    ]


async def test_the_price_hook_estimates_each_request() -> None:
    """`price=` is given the scope and the identity; None leaves the route's price."""

    def estimate(scope: Any, identity: Identity) -> str | None:
        return "0.60" if b"big" in scope["query_string"] else None

    limiter = limiter_of(SETTINGS, FakeClock())
    async with client_of(app_of(limiter, price=estimate), x_api_key="k") as client:
        assert (await client.get("/?big")).status_code == 200
        assert (await client.get("/?big")).status_code == 429
        assert (await client.get("/")).status_code == 200
        assert await spent(client, limiter) == (700_000, 0)


async def test_a_slot_or_rate_refusal_holds_no_money() -> None:
    """All or nothing: what another limit refuses leaves the budget as it was."""
    text = SETTINGS.replace('requests = ["1000/minute"]', 'requests = ["2/minute"]')
    limiter = limiter_of(text, FakeClock())
    async with client_of(app_of(limiter), x_api_key="k") as client:
        assert [(await client.get("/")).status_code for _ in range(3)] == [200, 200, 429]
        assert await spent(client, limiter) == (200_000, 0)


UNPRICED = SETTINGS.replace('price = "0.10"', "slot = true")


@pytest.fixture(params=["memory", "redis", "valkey", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    """Of each kind of backend."""
    if request.param == "memory":
        return "memory://"
    if request.param == "cluster":
        cluster: Cluster = request.getfixturevalue("shared_cluster")("valkey")
        return cluster.url
    server: StoreServer = request.getfixturevalue("shared_server")(request.param)
    return server.url


def unpriced(url: str, concurrent: str = "") -> Limiter:
    """A limiter whose callers have a budget, and whose routes have no price."""
    text = UNPRICED.replace("[plans.default]", f"[plans.default]\n{concurrent}")
    return Limiter(
        settings_of(f'backend = {{ url = "{url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n{text}')
    )


@pytest.mark.parametrize("concurrent", ["", "concurrent = 5"])
async def test_what_had_no_price_is_charged_when_it_is_settled(url: str, concurrent: str) -> None:
    """The actual price of a request counts, also where its route has none, once however often it is sent.

    It needs no room in the budget beforehand; what costs is refused afterwards.
    """
    limiter = unpriced(url, concurrent)
    async with limiter, client_of(app_of(limiter), x_api_key="k") as client:
        for query in ("settle=0.70&settle=0.70", "settle=0.80&status=500", "", "settle=0.10"):
            await client.get(f"/?{query}")
        assert await spent(client, limiter) == (1_600_000, 0)
        lease = await limiter.acquire(api_key="k")
        await asyncio.gather(lease.settle("0.25"), lease.settle("0.25"))
        with pytest.raises(LeaseError):
            await lease.settle("much")
        await lease.release()
        assert await spent(client, limiter) == (1_850_000, 0)
        assert limiter.stats().settles_ignored == limiter.stats().leases == 0
        in_use = await limiter.engine.peek(
            limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
        )
        assert [counted(each) for each in in_use.limits if each.counter.limit == Slots(5)] in ([], [0])


@pytest.mark.parametrize("concurrent", ["", "concurrent = 5"])
async def test_nothing_is_left_of_an_estimate_that_a_request_has_settled(concurrent: str) -> None:
    """Whichever way a request goes through the middleware, its record ends with it."""
    limiter = unpriced("memory://", concurrent)
    async with limiter, client_of(app_of(limiter), x_api_key="k") as client:
        await client.get("/?settle=0.70")
        assert await spent(client, limiter) == (700_000, 0)
        assert isinstance(limiter.engine.backend, MemoryBackend)
        assert not limiter.engine.backend._records


async def test_a_settle_after_the_end_of_a_request_without_a_price_is_said_to_be_late() -> None:
    """A settle after the end of a request without a price is not passed over in silence."""
    limiter = limiter_of(UNPRICED, FakeClock())
    async with await limiter.acquire(api_key="k") as lease:
        pass
    limiter.engine.leases.end(lease, failed=False)
    await lease.settle("0.30")
    assert limiter.stats().settles_ignored == 1


async def test_a_job_of_a_request_without_a_price_is_settled_by_its_token(url: str) -> None:
    """A detached job is settled once by whoever has the token, whether it had an estimate or not."""
    limiter = unpriced(url)
    async with limiter, client_of(app_of(limiter), x_api_key="k") as client:
        lease = await limiter.acquire(api_key="k")
        assert lease.decision.allowed
        token = await lease.detach(ttl=60)
        for _ in range(2):
            await limiter.settle(token, "0.30")
        assert limiter.stats().settles_ignored == 0
        await limiter.settle(token, "0.40")
        assert limiter.stats().settles_ignored == 1
        assert await spent(client, limiter) == (300_000, 0)


async def test_what_was_never_charged_never_raises() -> None:
    """Detach and settle do nothing on an exempt route, whatever they are given."""
    limiter = limiter_of('routes = [{ path = "/", exempt = true }]', FakeClock())
    lease = await limiter.acquire(api_key="k")
    await lease.settle("much")
    assert await lease.detach(ttl=-1)


async def test_what_was_charged_is_told_of_a_bad_argument() -> None:
    """Whatever was charged counts as that: a rate alone, which holds nothing, as much as money."""
    limiter = limiter_of('plans.default.requests = ["9/minute"]', FakeClock())
    lease = await limiter.acquire(api_key="k")
    with pytest.raises(LeaseError):
        await lease.detach(ttl=-1)
