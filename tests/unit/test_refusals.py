"""Refusals over HTTP: status, headers and body, as clients have to understand them."""

from typing import Any

import httpx
import pytest

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from tests.support.asgi import (
    START,
    FakeClock,
    client_of,
    limited_client,
    limiter_of,
    ok_app,
    shown,
    statuses,
)

SPENT = 'plans.default = {requests = ["1/minute"], spending = {daily = "1"}}\n'
ONE_A_MINUTE = 'plans.default.requests = ["1/minute"]\n'


async def refused_at(text: str, second: float, *, before: int = 1, path: str = "/") -> httpx.Response:
    """The answer to a request `second` seconds after so many others."""
    clock = FakeClock()
    async with limited_client(text, clock, x_api_key="a") as client:
        assert await statuses(client, before, path) == [200] * before
        clock.set(second)
        return await client.get(path)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of the body, which holds nothing else."""
    body: dict[str, dict[str, Any]] = response.json()
    assert list(body) == ["error"]
    return body["error"]


async def test_a_refusal_never_tells_less_than_nothing() -> None:
    """Of a limit that was lowered below what is used, nothing is left, and what is used is told as it is."""
    clock = FakeClock()
    backend = MemoryBackend(clock=clock)
    async with limited_client(
        'plans.default.requests = ["9/minute"]', clock, backend=backend, x_api_key="a"
    ) as client:
        assert await statuses(client, 5) == [200] * 5
    async with limited_client(
        'plans.default.requests = ["2/minute"]', clock, backend=backend, x_api_key="a"
    ) as client:
        error = error_of(await client.get("/"))
    assert error["message"] == "Rate limit exceeded. 5/2 requests used in 1 minute."
    assert error["details"]["remaining"] == 0


async def test_rate_refusal() -> None:
    """Too many requests: 429, with the wait in every form clients know, and the window in the body."""
    response = await refused_at('plans.default.requests = ["60/minute"]', 48, before=60)
    assert response.status_code == 429
    assert dict(response.headers) == {
        "content-type": "application/json",
        "content-length": str(len(response.content)),
        "cache-control": "no-store",
        "retry-after": "12",
        "retry-after-ms": "12000",
        "x-ratelimit-limit": "60",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": str(START + 60),
    }
    assert error_of(response) == {
        "type": "rate_limit_error",
        "code": "RATE_LIMIT_EXCEEDED",
        "message": "Rate limit exceeded. 60/60 requests used in 1 minute.",
        "details": {
            "policy": "60/minute",
            "limit": 60,
            "remaining": 0,
            "window": 60,
            "reset": START + 60,
            "retry_after": 12,
        },
    }


async def test_documentation_url() -> None:
    """The body names the documentation where the settings do."""
    url = "https://example.com/docs/rate-limits"
    text = ONE_A_MINUTE + f'response.documentation_url = "{url}"\n'
    assert error_of(await refused_at(text, 1))["documentation_url"] == url
    assert "documentation_url" not in error_of(await refused_at(ONE_A_MINUTE, 1))
    problem = await refused_at(text + 'response.body = "problem"', 1)
    assert problem.json()["documentation_url"] == url


async def test_cost_is_said() -> None:
    """A request that needs more than one unit is told how much, and what is left for smaller ones."""
    text = """
        plans.default.requests = ["60/minute"]
        routes = [{path = "/batch", cost = 10}, {path = "/five", cost = 5}]
    """
    clock = FakeClock()
    async with limited_client(text, clock, x_api_key="a") as client:
        assert await statuses(client, 5, "/batch") == [200] * 5
        clock.set(1)
        await client.get("/five")
        refused = await client.get("/batch")
        error = error_of(refused)
        assert await statuses(client, 1, "/five") == [200]
    expected = "Rate limit exceeded. 55/60 requests used in 1 minute; this request needs 10."
    assert error["message"] == expected
    assert (error["details"]["cost"], error["details"]["remaining"]) == (10, 5)
    assert shown(refused) == ("60", "5", str(START + 60))


async def test_reset_in_seconds_holds_for_bodies() -> None:
    """The reset of the body is of the same kind as that of the headers."""
    response = await refused_at(ONE_A_MINUTE + 'response.reset = "seconds"', 20)
    assert error_of(response)["details"]["reset"] == 40
    assert shown(response) == ("1", "0", "40")


@pytest.mark.parametrize(
    ("second", "seconds", "milliseconds"),
    [(0, 60, 60_000), (0.5, 60, 59_500), (59.000_001, 1, 1_000), (59.2, 1, 800), (59.999_999, 1, 1)],
)
async def test_waits_are_rounded_up(second: float, seconds: int, milliseconds: int) -> None:
    """A wait is never shorter than true and at least 1 of its unit."""
    response = await refused_at(ONE_A_MINUTE, second)
    assert response.headers["retry-after"] == str(seconds)
    assert response.headers["retry-after-ms"] == str(milliseconds)
    assert error_of(response)["details"]["retry_after"] == seconds


@pytest.mark.parametrize(("window", "retries"), [("minute", True), ("61 seconds", False), ("hour", False)])
async def test_long_waits_are_not_worth_retrying(window: str, retries: bool) -> None:
    """`x-should-retry: false` stands where the wait exceeds 60 seconds, and nowhere else."""
    response = await refused_at(f'plans.default.requests = ["1/{window}"]', 0)
    assert response.headers.get("x-should-retry") == (None if retries else "false")


async def test_retry_after_is_true() -> None:
    """At the time promised the same request is admitted; not a millisecond before the precise one."""
    text = 'plans.default.requests = ["5/10 seconds"]\nroutes = [{path = "/big", cost = 3}]'
    clock = FakeClock()
    async with limited_client(text, clock, x_api_key="a") as client:
        for second in (0, 1.3, 2.7, 4.1, 5.9):
            clock.set(second)
            assert (await client.get("/")).status_code == 200
        clock.set(6.001)
        refused = await client.get("/big")
        assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("7", "6699")
        clock.set(6.001 + 6.698)
        assert (await client.get("/big")).status_code == 429
        clock.set(6.001 + 7)
        assert (await client.get("/big")).status_code == 200


async def test_concurrency_refusal() -> None:
    """No free slot: how many are taken, in the unit's words, and a hint of 1 to 3 seconds."""
    text = 'plans.default = {requests = ["9/minute"], concurrent = {limit = 1, unit = "prediction"}}'
    limiter = limiter_of(text, FakeClock())
    await limiter.acquire(api_key="a")
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
        response = await client.get("/")
    wait = int(response.headers["retry-after"])
    assert 1 <= wait <= 3
    assert error_of(response) == {
        "type": "rate_limit_error",
        "code": "CONCURRENT_LIMIT_EXCEEDED",
        "message": "Concurrent prediction limit exceeded. 1/1 prediction running.",
        "details": {"limit": 1, "active": 1, "retry_after": wait},
    }
    assert shown(response)[:2] == ("9", "8")


async def test_hints_to_come_back_for_a_slot_are_spread() -> None:
    """Callers refused at one moment come back between one and three seconds later, each at its own time."""
    limiter = limiter_of("plans.default.concurrent = 1", FakeClock())
    await limiter.acquire(api_key="a")
    waits = [(await limiter.acquire(api_key="a")).decision.retry_after or 0 for _ in range(200)]
    assert 1 <= min(waits) < 1.5
    assert 2.5 < max(waits) <= 3


async def test_spending_refusal() -> None:
    """The budget is used up: amounts as decimal strings, and the wait is the next period."""
    text = """
        plans.default.spending = {daily = "0.03"}
        routes = [{path = "/{rest:path}", price = "0.015"}]
    """
    response = await refused_at(text, 0, before=2)
    wait = -START % 86_400
    assert error_of(response) == {
        "type": "rate_limit_error",
        "code": "SPENDING_LIMIT_EXCEEDED",
        "message": "Daily spending limit exceeded. 0.03/0.03 USD spent.",
        "details": {
            "period": "daily",
            "limit": "0.03",
            "spent": "0.03",
            "held": "0.00",
            "currency": "USD",
            "reset": START + wait,
            "retry_after": wait,
        },
    }
    assert response.headers["retry-after"] == str(wait)
    assert response.headers["x-should-retry"] == "false"


async def test_cost_that_never_fits() -> None:
    """A cost above a limit is told so, and that waiting is no use, whatever else would refuse."""
    text = """
        plans.default.requests = ["5/minute", "20/hour"]
        application.requests = ["1/minute"]
        routes = [{path = "/huge", cost = 10}]
    """
    async with limited_client(text, FakeClock(), x_api_key="a") as client:
        assert await statuses(client, 2) == [200, 429]
        response = await client.get("/huge")
    assert response.status_code == 429
    assert response.headers["x-should-retry"] == "false"
    assert not [name for name in response.headers if name.startswith("retry-after")]
    assert shown(response)[:2] == ("5", "4")
    assert error_of(response) == {
        "type": "rate_limit_error",
        "code": "COST_EXCEEDS_LIMIT",
        "message": "This request needs 10 units; the limit is 5 in 1 minute.",
        "details": {"policy": "5/minute", "limit": 5, "window": 60, "cost": 10},
    }


async def test_price_that_never_fits() -> None:
    """A price above a budget is told so, with both amounts."""
    text = 'plans.default.spending = {daily = "1.00"}\nroutes = [{path = "/{rest:path}", price = "1.50"}]'
    response = await refused_at(text, 0, before=0)
    error = error_of(response)
    assert error["code"] == "COST_EXCEEDS_LIMIT"
    assert error["message"] == "This request needs 1.50 USD; the daily limit is 1.00."
    assert error["details"] == {"period": "daily", "limit": "1.00", "currency": "USD", "price": "1.50"}
    assert "retry-after" not in response.headers


async def test_cost_above_a_shared_limit_tells_no_figures() -> None:
    """A cost that a limit of all callers never admits is refused for good, without that limit's figures."""
    text = 'application.requests = ["7/minute"]\nroutes = [{path = "/{rest:path}", cost = 10}]'
    error = error_of(await refused_at(text, 0, before=0))
    assert (error["code"], error["details"]) == ("COST_EXCEEDS_LIMIT", {"cost": 10})
    assert "7" not in error["message"]
    text = (
        'application.units.tokens = ["7/minute"]\nroutes = [{path = "/{rest:path}", units = {tokens = 10}}]'
    )
    error = error_of(await refused_at(text, 0, before=0))
    assert (error["code"], error["details"]) == ("COST_EXCEEDS_LIMIT", {"cost": 10, "unit": "tokens"})


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("shared", ["application.requests", "routes"])
async def test_capacity_refusal(status: int, shared: str) -> None:
    """Of a limit that all callers share nothing but the wait is told, under the status of the settings."""
    text = f"response.capacity_status = {status}\n"
    total = 'routes = [{path = "/{rest:path}", total = ["2/minute"]}]'
    text += total if shared == "routes" else 'application.requests = ["2/minute"]'
    response = await refused_at(text, 20, before=2)
    assert response.status_code == status
    assert response.headers["retry-after"] == "40"
    assert response.headers["cache-control"] == "no-store"
    assert shown(response)[:2] == ("60", "58")
    assert error_of(response) == {
        "type": "capacity_error",
        "code": "CAPACITY_EXCEEDED",
        "message": "The service is at capacity. Please try again later.",
        "details": {"retry_after": 40},
    }


async def test_shared_slots_are_capacity() -> None:
    """A slot of the whole application that is not free is a matter of capacity, too."""
    text = "application.concurrent = 1\nplans.default.concurrent = 2"
    limiter = limiter_of(text, FakeClock())
    await limiter.acquire(api_key="b")
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
        response = await client.get("/")
    assert error_of(response)["code"] == "CAPACITY_EXCEEDED"
    assert response.headers["retry-after"] in {"1", "2", "3"}


@pytest.mark.parametrize(
    ("text", "code", "policy", "wait"),
    [
        ('plans.default.requests = ["1/second", "1/minute"]', "RATE_LIMIT_EXCEEDED", "1/minute", "60"),
        ('plans.default.requests = ["1/minute", "1/second"]', "RATE_LIMIT_EXCEEDED", "1/minute", "60"),
        (
            'plans.default.requests = ["1/second"]\napplication.requests = ["1/minute"]',
            "RATE_LIMIT_EXCEEDED",
            "1/second",
            "60",
        ),
        (
            'plans.default.requests = ["1/10 seconds"]\nroutes = [{path = "/", requests = ["1/minute"]}]',
            "RATE_LIMIT_EXCEEDED",
            "1/minute",
            "60",
        ),
        (
            SPENT + 'routes = [{path = "/", price = "1"}]',
            "SPENDING_LIMIT_EXCEEDED",
            None,
            str(-START % 86_400),
        ),
        (
            'plans.default.requests = ["9/minute"]\napplication.requests = ["1/minute"]',
            "CAPACITY_EXCEEDED",
            None,
            "60",
        ),
        (
            'plans.default.requests = ["9/minute"]\nidentity.per_address = ["1/minute"]',
            "RATE_LIMIT_EXCEEDED",
            "1/minute",
            "60",
        ),
    ],
    ids=["longest", "longest first", "own first", "route", "spending", "shared", "address"],
)
async def test_which_limit_is_named(text: str, code: str, policy: str | None, wait: str) -> None:
    """The caller's own limits before shared ones, among those the longest wait; wait for all of them."""
    response = await refused_at(text, 0)
    error = error_of(response)
    assert (error["code"], error["details"].get("policy")) == (code, policy)
    assert response.headers["retry-after"] == wait
    assert error["details"]["retry_after"] == int(wait)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('plans.default = {requests = ["1/minute"], concurrent = 1}', "RATE_LIMIT_EXCEEDED"),
        ('plans.default.concurrent = 1\napplication.requests = ["1/minute"]', "CONCURRENT_LIMIT_EXCEEDED"),
    ],
)
async def test_slots_among_other_limits(text: str, code: str) -> None:
    """A slot's short hint never hides a longer wait: it names another code, or stretches the wait."""
    limiter = limiter_of(text, FakeClock())
    await limiter.acquire(api_key="a")
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
        response = await client.get("/")
    assert (error_of(response)["code"], response.headers["retry-after"]) == (code, "60")


@pytest.mark.parametrize(("cost", "needs"), [(1, False), (2, True)])
async def test_a_request_that_needs_more_than_one_unit_says_so(cost: int, needs: bool) -> None:
    """From two units on, message and details tell what the request needs."""
    text = f'plans.anonymous.requests = ["2/minute"]\nroutes = [{{ path = "/", cost = {cost} }}]'
    async with limited_client(text, FakeClock()) as client:
        *_, refused = [await client.get("/") for _ in range(3)]
    error = refused.json()["error"]
    assert (f"; this request needs {cost}." in error["message"]) == ("cost" in error["details"]) == needs


async def test_no_wait_is_rounded_down() -> None:
    """A microsecond more than a second is two seconds in `Retry-After`, and one millisecond more."""
    clock = FakeClock()
    async with limited_client('plans.anonymous.requests = ["1/2 seconds"]', clock) as client:
        await client.get("/")
        clock.set(0.999_999)
        refused = await client.get("/")
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("2", "1001")
