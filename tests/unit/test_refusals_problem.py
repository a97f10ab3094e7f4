"""Refusals as problem details (RFC 9457), refusals that no limit made, and what a refusal leaves behind."""

from typing import Any

import httpx
import pytest

from ratelimit_mw import Decision
from ratelimit_mw._internal.responses.refusals import RefusalWriter
from ratelimit_mw._internal.settings import ResponseSettings
from tests.support.asgi import START, Counting, Down, FakeClock, limited_client, shown, statuses

BUDGET = 'plans.anonymous = {requests = ["9/minute"], spending = {daily = "9"}}\n'
PROBLEM = 'response.body = "problem"\n'
TYPES = "https://iana.org/assignments/http-problem-types#"
ADMITTED = Decision(True, 0)


async def last_of(
    text: str, count: int, *, path: str = "/", headers: list[tuple[str, str]] | None = None
) -> httpx.Response:
    """The answer to the last of so many requests at one moment."""
    async with limited_client(PROBLEM + text, FakeClock()) as client:
        await statuses(client, count - 1, path)
        return await client.get(path, headers=headers)


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The body, which is a problem."""
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == response.status_code
    return problem


async def test_quota_problem() -> None:
    """A rate that is used up is the draft's `quota-exceeded`, with the policies that were violated."""
    text = 'plans.anonymous.requests = ["2/minute", "2/hour", "9/day"]'
    response = await last_of(text, 3)
    assert problem_of(response) == {
        "type": f"{TYPES}quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "detail": "Rate limit exceeded. 2/2 requests used in 1 hour.",
        "code": "RATE_LIMIT_EXCEEDED",
        "violated-policies": ["2/minute", "2/hour"],
        "details": {
            "policy": "2/hour",
            "limit": 2,
            "remaining": 0,
            "window": 3_600,
            "reset": START + 3_600,
            "retry_after": 3_600,
        },
    }
    assert response.headers["retry-after"] == "3600"
    assert response.headers["cache-control"] == "no-store"


async def test_problem_names_no_shared_policy() -> None:
    """A problem lists the caller's own policies only, though a shared limit refuses, too."""
    text = 'plans.anonymous.requests = ["1/minute"]\napplication.requests = ["1/hour"]'
    assert problem_of(await last_of(text, 2))["violated-policies"] == ["1/minute"]


async def test_capacity_problem() -> None:
    """A limit that all callers share is the draft's `temporary-reduced-capacity`."""
    text = 'application.requests = ["1/minute"]\nresponse.capacity_status = 503'
    assert problem_of(await last_of(text, 2)) == {
        "type": f"{TYPES}temporary-reduced-capacity",
        "title": "Request cannot be satisfied due to temporary server capacity constraints",
        "status": 503,
        "detail": "The service is at capacity. Please try again later.",
        "code": "CAPACITY_EXCEEDED",
        "details": {"retry_after": 60},
    }


async def test_cost_problem() -> None:
    """A cost that never fits violates the policies it exceeds."""
    text = 'plans.anonymous.requests = ["5/minute", "50/hour"]\nroutes = [{path = "/", cost = 10}]'
    problem = problem_of(await last_of(text, 1))
    assert (problem["code"], problem["violated-policies"]) == ("COST_EXCEEDS_LIMIT", ["5/minute"])


async def test_identity_problem() -> None:
    """A refusal that is not a matter of limits is an untyped problem, whose title is the status in words."""
    headers = [("x-api-key", "a"), ("authorization", "Bearer b")]
    problem = problem_of(await last_of("", 1, headers=headers))
    assert (problem["type"], problem["title"]) == ("about:blank", "Bad Request")
    assert problem["code"] == "AMBIGUOUS_API_KEY"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ([("x-api-key", "a"), ("authorization", "Bearer b")], 400, "AMBIGUOUS_API_KEY"),
        ([("x-api-key", "k" * 16_385)], 431, "API_KEY_TOO_LONG"),
        ([("authorization", "Bearer " + "k" * 16_385)], 431, "API_KEY_TOO_LONG"),
    ],
    ids=["two keys", "long", "long bearer"],
)
async def test_identity_errors(headers: list[tuple[str, str]], status: int, code: str) -> None:
    """A request that doesn't say clearly who is calling is told why, and never reaches the app."""
    async with limited_client("", FakeClock()) as client:
        response = await client.get("/", headers=headers)
    error = response.json()["error"]
    assert response.status_code == status
    assert (error["type"], error["code"], error["details"]) == ("invalid_request_error", code, {})
    assert "kkk" not in response.text
    assert shown(response) == (None, None, None)


async def test_backend_away_under_deny() -> None:
    """A refusal by the settings while the backend is away is a 503 with a wait, and no figures."""
    async with limited_client('backend.on_failure = "deny"', FakeClock(), backend=Down()) as client:
        response = await client.get("/")
    assert response.status_code == 503
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "1000")
    assert response.headers["cache-control"] == "no-store"
    assert shown(response) == (None, None, None)
    error = response.json()["error"]
    assert error["type"] == "rate_limit_unavailable"
    assert error["message"] == "Rate limits cannot be checked at the moment. Please try again."


async def test_backend_away_under_deny_in_shadow() -> None:
    """Shadow never refuses, also not what `deny` would while the backend is away."""
    text = 'shadow = true\nbackend.on_failure = "deny"'
    async with limited_client(text, FakeClock(), backend=Down()) as client:
        response = await client.get("/")
    assert (response.status_code, response.headers["x-ratelimit-shadow"]) == (200, "refused")


@pytest.mark.parametrize(
    "text",
    [
        'plans.anonymous.requests = ["1/second", "9/minute"]',
        'plans.anonymous.requests = ["9/minute"]\napplication.requests = ["1/second"]',
        BUDGET + 'routes = [{path = "/", price = "1", requests = ["1/second"]}]',
    ],
    ids=["own", "shared", "route"],
)
async def test_refused_requests_change_nothing(text: str) -> None:
    """A refused request is charged nowhere, neither in the limit that refused nor in those that didn't."""
    clock = FakeClock()
    async with limited_client(text, clock) as client:
        assert await statuses(client, 20) == [200] + [429] * 19
        clock.set(1)
        assert shown(await client.get("/"))[:2] in {("1", "0"), ("9", "7")}
        for second in range(2, 9):
            clock.set(second)
            assert (await client.get("/")).status_code == 200


async def test_exempt_costs_no_round_trip() -> None:
    """An exempt route asks the backend nothing and says nothing."""
    backend = Counting()
    text = 'routes = [{path = "/health", exempt = true}]'
    async with limited_client(text, FakeClock(), backend=backend) as client:
        responses = [await client.get("/health") for _ in range(30)]
        assert backend.asked == 0
        assert [r.status_code for r in responses] == [200] * 30
        assert shown(responses[0]) == (None, None, None)
        await client.get("/other")
    assert backend.asked == 1


def test_only_refusals_are_written() -> None:
    """Writing a refusal about an admitted request is a mistake, not a 429."""
    with pytest.raises(ValueError, match="not refused"):
        RefusalWriter(ResponseSettings())(ADMITTED)
