"""Limits in code with keys that only a handler or a job knows: charged in one more step, or nothing is."""

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ratelimit_mw import (
    Decision,
    Identity,
    LeaseError,
    Limit,
    Limiter,
    RateLimited,
    RateLimitMiddleware,
    by,
    get_lease,
    limited,
)
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.status import Status
from tests.support.asgi import Counting, Down, FakeClock, client_of, limiter_of, shown, statuses

PLANS = """
    [plans.default]
    requests = ["100/minute"]
    concurrent = 9
    units = { tokens = ["1000/minute"] }
    spending = { daily = "9.00" }
    [plans.anonymous]
    requests = ["50/minute"]
    [application]
    requests = ["500/minute"]
    [[routes]]
    path = "/"
    price = "0.40"
    units = { tokens = 100 }
    total = ["400/minute"]
"""
EMAIL = Limit("email", "2/minute")


def app_of(charge: Callable[[Request], Any], *early: Limit | str) -> Starlette:
    """An app whose handler charges what this does, with early limits on its route."""

    async def handler(request: Request) -> Response:
        await charge(request)
        return PlainTextResponse("ok")

    return Starlette(
        routes=[Route("/", limited(*early)(handler) if early else handler), Route("/free", handler)]
    )


def by_email(*others: Limit) -> Callable[[Request], Any]:
    """Charge a limit for the e-mail address in the query, and others for everybody."""

    async def charge(request: Request) -> None:
        email = request.query_params.get("email", "")
        await get_lease(request).charge(EMAIL.on(email), *[other.on("x") for other in others])

    return charge


def behind(app: ASGIApp, clock: FakeClock | None = None, **hooks: Any) -> RateLimitMiddleware:
    """The app behind a middleware with `PLANS`."""
    return RateLimitMiddleware(app, limiter=limiter_of(PLANS, clock or FakeClock()), **hooks)


async def counted(app: RateLimitMiddleware) -> list[Status]:
    """Return how the limits stand that a caller with the key `a` meets on the route `/`."""
    return [each.status for each in (await _peeked(app)).limits]


async def _peeked(app: RateLimitMiddleware) -> Decision:
    engine = app.limiter.engine
    return await engine.peek(engine.policies.match(engine.identity_of(api_key="a"), "GET", "/"))


async def test_a_key_of_the_handlers_has_a_count_of_its_own() -> None:
    """Each e-mail address has two requests a minute, whoever asks; the refusal is the contract's 429."""
    app = behind(app_of(by_email()))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2, "/?email=a") == [200, 200]
    async with client_of(app, x_api_key="b") as client:
        answer = await client.get("/?email=a")
        assert await statuses(client, 1, "/?email=b") == [200]
    assert answer.status_code == 429
    error = answer.json()["error"]
    assert (error["code"], error["details"]["policy"]) == ("RATE_LIMIT_EXCEEDED", "email")
    assert (answer.headers["retry-after"], answer.headers["cache-control"]) == ("60", "no-store")
    assert shown(answer)[:2] == ("100", "100"), "the plan's window, as it stands once all is given back"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"


async def test_a_refused_request_costs_nothing() -> None:
    """Plan, units, money, slot, shared limits and early limits are given back if a late limit refuses."""
    early = [Limit("early", "50/minute"), Limit("path", "50/minute", by=by.address, cost=3)]
    app = behind(app_of(by_email(), *early))
    before = await counted(app)
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2, "/?email=a") == [200, 200]
        after = await counted(app)
        assert after != before
        assert await statuses(client, 5, "/?email=a") == [429] * 5
        assert await counted(app) == after
        answer = await client.get("/?email=b")
        assert answer.headers["x-ratelimit-remaining"] == "47", "of the early limit: three were admitted"


async def test_one_more_step_for_all_of_a_call() -> None:
    """A call charges all of its limits in one step, all or none."""
    backend = Counting(clock=FakeClock())
    one, many = Limit("one", "1/minute"), Limit("many", "9/minute")

    async def charge(request: Request) -> None:
        await get_lease(request).charge(many.on("x"), one.on(request.query_params["email"]))

    app = RateLimitMiddleware(app_of(charge), limiter=limiter_of(PLANS, FakeClock(), backend))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2, "/?email=a") == [200, 429]
        assert backend.asked == 4
        assert await statuses(client, 9, "/?email=a") == [429] * 9
        assert [await statuses(client, 1, f"/?email={n}") for n in range(9)] == [[200]] * 8 + [[429]]


async def test_several_calls_are_given_back_together() -> None:
    """Each call is a step of its own; the first that refuses gives back all that came before it."""
    first, second = Limit("first", "9/minute"), Limit("second", "1/minute", concurrent=5)

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        await lease.charge(first.on("x"))
        await lease.charge(second.on("x"))

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 20) == [200] + [429] * 19
        limiter = app.limiter
        assert [(await limiter.acquire(first.on("x"))).allowed for _ in range(9)] == [True] * 8 + [False]


async def test_an_app_that_handles_refusals_itself() -> None:
    """A handler of the app's own answers; the headers tell of the refusal, and everything is given back."""
    app = app_of(by_email())

    async def handler(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RateLimited)
        return JSONResponse({"limit": error.decision.refusal.limit.name}, 429)  # type: ignore[union-attr]

    app.add_exception_handler(RateLimited, handler)
    middleware = behind(app)
    async with client_of(middleware, x_api_key="a") as client:
        assert await statuses(client, 2, "/?email=a") == [200, 200]
        before = await counted(middleware)
        answer = await client.get("/?email=a")
    assert (answer.status_code, answer.json()) == (429, {"limit": "email"})
    assert shown(answer)[:2] == ("100", "98")
    assert await counted(middleware) == before


async def test_a_refusal_that_was_raised_elsewhere_costs_nothing_either() -> None:
    """A refusal that `raise_for_refusal` lets out of the app gives the request back, too."""
    jobs = limiter_of(PLANS, FakeClock())

    async def charge(request: Request) -> None:
        (await jobs.acquire(EMAIL.on("x"))).raise_for_refusal()

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2) == [200, 200]
        before = await counted(app)
        assert await statuses(client, 3) == [429] * 3
        assert await counted(app) == before


@pytest.mark.parametrize("is_raised", [False, True])
async def test_what_was_detached_stays_with_its_job(*, is_raised: bool) -> None:
    """A late refusal takes back nothing that a job goes on with: that ends by `settle` and `release`."""
    tokens: list[str] = []

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        tokens.append(await lease.detach(ttl=60))
        if is_raised:
            (await app.limiter.acquire(EMAIL.on("a"))).raise_for_refusal()
        else:
            await lease.charge(EMAIL.on("a"))

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        answers = [await client.get("/") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].headers.get("x-ratelimit-remaining") == (None if is_raised else "97")
    limits = {each.name: each.remaining for each in (await _peeked(app)).limits}
    assert (limits["100/minute"], limits["slots"], limits["daily"]) == (97, 6, Decimal("7.80"))
    for token in tokens:
        await app.limiter.release(token)
    assert {each.name: each.remaining for each in (await _peeked(app)).limits}["slots"] == 9


async def test_slots_of_a_late_limit_end_with_the_request() -> None:
    """A slot of a model, say, is held while the request runs, and free again at its end."""
    slots = Limit("gpu", concurrent=1)
    running, go_on = asyncio.Event(), asyncio.Event()

    async def charge(request: Request) -> None:
        await get_lease(request).charge(slots.on("gpu-1"))
        running.set()
        await go_on.wait()

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        first = asyncio.create_task(client.get("/"))
        await running.wait()
        answer = await client.get("/")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "CONCURRENT_LIMIT_EXCEEDED")
        assert answer.json()["error"]["details"]["policy"] == "gpu"
        go_on.set()
        assert (await first).status_code == 200
        assert (await client.get("/")).status_code == 200


async def test_slots_of_a_late_limit_are_released_with_the_others() -> None:
    """`release` frees all slots at once: those of the plan, and those that the handler has charged."""
    slots = Limit("gpu", concurrent=1)
    answers: list[int] = []

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        await lease.charge(slots.on("gpu-1"))
        await lease.release()
        if not answers:
            answers.append(0)
            answers.append((await client.get("/")).status_code)

    async with client_of(behind(app_of(charge)), x_api_key="a") as client:
        assert (await client.get("/")).status_code == 200
    assert answers == [0, 200]


async def test_a_malformed_amount_of_what_late_limits_alone_count() -> None:
    """It is a `LeaseError` as ever, and a right amount can follow."""
    model = Limit("model", "500/minute", unit="images", cost=200)

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        await lease.charge(model.on("m"))
        with pytest.raises(LeaseError, match="must be a whole number"):
            await lease.settle(units={"images": -1})
        await lease.settle(units={"images": 10})

    async with client_of(behind(app_of(charge))) as client:  # of a plan without units
        assert await statuses(client, 5) == [200] * 5


async def test_a_unit_that_another_limit_of_the_request_counts_is_no_unknown_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two late limits of two units, settled together: no warning says that no limit counts one of them."""
    model = Limit("model", "500/minute", unit="images", cost=200)
    sound = Limit("sound", "500/minute", unit="minutes", cost=200)

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        await lease.charge(model.on("m"), sound.on("m"))
        await lease.charge(sound.on("n"))
        await lease.settle(units={"images": 10, "minutes": 10})

    async with client_of(behind(app_of(charge)), x_api_key="a") as client:
        assert await statuses(client, 2) == [200] * 2
    assert "no plan limits the unit" not in caplog.text


async def test_units_of_a_late_limit_are_settled_with_the_others() -> None:
    """`settle` puts the actual use in place of all estimates of the unit, late ones too."""
    model = Limit("model", "500/minute", unit="tokens", cost=200)

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        await lease.charge(model.on("m"))
        await lease.settle(units={"tokens": 10})

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 20) == [200] * 20
    assert (await app.limiter.acquire(api_key="a", units={"tokens": 800})).allowed
    assert not (await app.limiter.acquire(model.on("m", cost=301))).allowed
    assert (await app.limiter.acquire(model.on("m", cost=300))).allowed


async def test_exempt_routes_and_shadow_mode() -> None:
    """An exempt request is charged nothing; in shadow mode a late limit refuses nobody."""
    for text in ('routes = [{ path = "/", exempt = true }]', "shadow = true"):
        app = RateLimitMiddleware(app_of(by_email()), limiter=limiter_of(text, FakeClock()))
        async with client_of(app, x_api_key="a") as client:
            assert await statuses(client, 4, "/?email=a") == [200] * 4


async def test_a_handler_that_goes_on_after_a_refusal_is_refused_again() -> None:
    """Whoever catches the refusal has nothing left, and further charges meet the same refusal."""
    seen = []

    async def charge(request: Request) -> None:
        lease = get_lease(request)
        for key in ("x", "x", "x", "y"):
            try:
                await lease.charge(EMAIL.on(key))
            except RateLimited as error:
                seen.append(error.decision)
        assert not lease.allowed
        await lease.settle("0.40", units={"tokens": 5})  # which changes nothing

    app = behind(app_of(charge))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 1) == [200]
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert all(each[:2] == (0, 0) for each in await counted(app))


async def test_after_the_request_nothing_can_be_charged() -> None:
    """A lease that is kept beyond its request raises, and says why."""
    kept = []

    async def charge(request: Request) -> None:
        kept.append(get_lease(request))

    async with client_of(behind(app_of(charge)), x_api_key="a") as client:
        await client.get("/")
    with pytest.raises(LeaseError, match="the request is over"):
        await kept[0].charge(EMAIL.on("x"))


@pytest.mark.parametrize("key", [None, 1.5, True, ["x"]])
def test_what_is_no_key_raises(key: Any) -> None:
    """A key of a handler's has to be one."""
    with pytest.raises(TypeError, match="a key must be text, bytes, a whole number or a UUID, not"):
        EMAIL.on(key)


@pytest.mark.parametrize("cost", [0, -1, 1.5, float("nan"), 10**10, "1"])
def test_a_cost_with_a_key_has_to_be_one(cost: Any) -> None:
    """So has its cost."""
    with pytest.raises(ValueError, match="email: a cost must be a whole number from 1 to 1000000000, not"):
        EMAIL.on("x", cost=cost)


async def test_a_limit_that_needs_a_key_says_so() -> None:
    """A limit by address or function can't be charged without a key; one by caller or everyone can."""
    limiter = limiter_of(PLANS, FakeClock())
    lease = await limiter.acquire(api_key="a")
    for limit in (Limit("a", "1/minute", by=by.address), Limit("b", "1/minute", by=lambda *_: "x")):
        with pytest.raises(TypeError, match="needs a key here"):
            await lease.charge(limit)
    with pytest.raises(TypeError, match=r"expected a limit, limit\.on\(key\) or an Identity, not str"):
        await lease.charge("1/minute")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a function for its cost"):
        await lease.charge(Limit("c", "1/minute", cost=lambda *_: 1).on("x"))
    own, all_of_us = Limit("own", "1/minute"), Limit("all", "1/minute", by=by.everyone)
    await lease.charge(own, all_of_us)
    other = await limiter.acquire(api_key="b")
    await other.charge(own)
    with pytest.raises(RateLimited):
        await other.charge(all_of_us)


# jobs -------------------------------------------------------------------------------------------


async def test_acquire_with_limits_of_keys() -> None:
    """`acquire` decides about the caller's limits and those of keys in one step, all or none."""
    limiter = limiter_of(PLANS, FakeClock())
    leases = [await limiter.acquire(EMAIL.on("x"), api_key="a") for _ in range(3)]
    assert [lease.allowed for lease in leases] == [True, True, False]
    refusal = leases[2].decision.refusal
    assert refusal is not None
    assert refusal.limit is not None
    assert refusal.limit.name == "email"
    assert leases[2].decision.remaining == 98
    who = Identity("ann", "default")
    assert (await limiter.acquire(EMAIL.on("y"), identity=who)).decision.remaining == 99
    assert (await limiter.acquire(who)).decision.remaining == 98


async def test_acquire_is_told_whose_cost_it_is() -> None:
    """A cost of nobody would be dropped, and so would a second identity."""
    limiter, mails = limiter_of("", FakeClock()), Limit("mails", "3/minute")
    with pytest.raises(ValueError, match=r"name that of a limit with its key, as in \.on\(key, cost=3\)"):
        await limiter.acquire(mails.on("ann"), cost=3)
    one, two = Identity("one", "default"), Identity("two", "default")
    with pytest.raises(TypeError, match="one identity is asked about, not 2"):
        await limiter.acquire(one, mails.on("ann"), identity=two)


async def test_acquire_for_nobody() -> None:
    """Limits of keys alone decide where nobody is named."""
    limiter = limiter_of(PLANS, FakeClock())
    leases = [await limiter.acquire(EMAIL.on("x"), Limit("other", "9/minute").on("x")) for _ in range(3)]
    assert [lease.allowed for lease in leases] == [True, True, False]
    assert [each.name for each in leases[0].decision.limits] == ["email", "other"]
    with pytest.raises(RateLimited):
        leases[2].raise_for_refusal()
    with pytest.raises(ValueError, match="acquire needs an identity"):
        await limiter.acquire()


async def test_a_block_runs_for_admissions_alone() -> None:
    """`raise_for_refusal` says by design that a refused job doesn't run."""
    limiter = limiter_of(PLANS, FakeClock())
    ran = []
    for number in range(3):
        try:
            lease = await limiter.acquire(EMAIL.on("x"))
            lease.raise_for_refusal()
            async with lease:
                ran.append(number)
        except RateLimited:
            pass
    assert ran == [0, 1]


async def test_many_keys_of_one_attacker_are_bounded() -> None:
    """Ten thousand keys are counted while their window lasts, and what is kept of them is bounded."""
    clock = FakeClock()
    backend = MemoryBackend(clock=clock, max_windows=1_000)
    limiter = limiter_of(PLANS, clock, backend)
    for number in range(10_000):
        assert (await limiter.acquire(EMAIL.on(f"{number}@example.com"))).allowed
    assert sum(len(store) for store in backend._logs.values()) <= 2_000
    assert not any("example" in partition for store in backend._logs.values() for partition, _ in store)


# outages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_failure", "expected"), [("local", [200, 200, 429]), ("allow", [200] * 3), ("deny", [503] * 3)]
)
async def test_while_the_backend_is_away(on_failure: str, expected: list[int]) -> None:
    """Late limits are decided as the settings say of outages, and what refuses gives back here, too."""
    text = f'backend.on_failure = "{on_failure}"\n{PLANS}'
    limiter = Limiter(limiter_of(text, FakeClock()).settings, backend=Down())
    app = RateLimitMiddleware(app_of(by_email()), limiter=limiter)
    async with client_of(app, x_api_key="a") as client:
        found = await statuses(client, 3, "/?email=a")
        assert found == expected
        if on_failure == "local":
            before = shown(await client.get("/?email=b"))[1]
            assert await statuses(client, 3, "/?email=a") == [429] * 3
            after = shown(await client.get("/?email=b"))[1]
            assert (before, after) == ("97", "96"), "what was refused in between cost nothing"
    await limiter.close()
