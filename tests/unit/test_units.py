"""Metered units as apps and clients see them: estimates, settles, headers, refusals."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ratelimit_mw import Identity, LeaseError, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from tests.support.asgi import START, FakeClock, settings_of

SETTINGS = """
identity.default_plan = "llm"
response.headers = ["x-ratelimit", "ietf"]
[plans.llm]
requests = ["600/minute"]
concurrent = 50
units = { tokens = ["100000/minute", "2000000/day"], images = ["50/minute"] }
[[routes]]
path = "/chat"
units = { tokens = 2000 }
[[routes]]
path = "/draw"
units = { images = 2, tokens = 0 }
"""

Endpoint = Callable[[Request], Awaitable[Response]]


async def nothing(_: Request) -> Response:
    """Answer, and settle nothing."""
    return Response()


class Served:
    """An app behind the middleware, on a clock that stands still."""

    def __init__(self, endpoint: Endpoint = nothing, text: str = SETTINGS, **hooks: Any) -> None:
        self.clock = FakeClock()
        self.limiter = Limiter(settings_of(text), backend=MemoryBackend(clock=self.clock))
        app = Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST"])])
        self.app = RateLimitMiddleware(app, limiter=self.limiter, **hooks)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://x", headers={"x-api-key": "a key"}
        )

    async def post(self, path: str = "/chat", **headers: str) -> httpx.Response:
        """Send one request."""
        return await self.client.post(path, headers=headers)

    async def used(self, unit: str = "tokens") -> list[int]:
        """Return the amount that each window of a unit has counted of the caller."""
        policy = self.limiter.engine.policies.match(
            self.limiter.engine.identity_of(api_key="a key"), "GET", "/else"
        )
        decision = await self.limiter.engine.peek(policy)
        return [status.used for _, status in decision.windows(unit)]


def settling(**units: int) -> Endpoint:
    """An endpoint that settles these."""

    async def endpoint(request: Request) -> Response:
        await request.state.ratelimit.settle(units=units)
        return Response()

    return endpoint


async def test_headers_tell_of_each_unit() -> None:
    """Beside those of requests: of a unit's window under which the fewest more of this estimate fit."""
    response = await Served().post()
    told = {name: value for name, value in response.headers.items() if name.startswith("x-ratelimit")}
    assert told == {
        "x-ratelimit-limit": "600",
        "x-ratelimit-remaining": "599",
        "x-ratelimit-reset": str(START + 60),
        "x-ratelimit-limit-tokens": "100000",
        "x-ratelimit-remaining-tokens": "98000",
        "x-ratelimit-reset-tokens": str(START + 60),
        "x-ratelimit-limit-images": "50",
        "x-ratelimit-remaining-images": "50",
        "x-ratelimit-reset-images": str(START),
    }
    assert response.headers["ratelimit-policy"] == (
        '"600/minute";q=600;w=60, "100000/minute";q=100000;w=60;qu="tokens", '
        '"2000000/day";q=2000000;w=86400;qu="tokens", "50/minute";q=50;w=60;qu="images"'
    )
    assert response.headers["ratelimit"] == (
        '"600/minute";r=599;t=60, "100000/minute";r=98000;t=60, "2000000/day";r=1998000;t=86400, '
        '"50/minute";r=50;t=0'
    )


async def test_two_rates_of_one_text_have_names_of_their_own() -> None:
    """A client can tell `1000/minute` of requests from `1000/minute` of tokens."""
    text = SETTINGS.replace('"600/minute"', '"100000/minute"')
    policy = (await Served(text=text).post()).headers["ratelimit-policy"]
    assert policy.startswith(
        '"100000/minute";q=100000;w=60, "100000 tokens/minute";q=100000;w=60;qu="tokens"'
    )


async def test_a_refusal_names_the_unit() -> None:
    """With the figures of its window, what the request needs, and the moment at which it fits."""
    served = Served()
    for _ in range(49):
        await served.post()
    served.clock.set(20)
    lease = await served.limiter.acquire(
        api_key="a key", path="/chat", method="POST", units={"tokens": 1_800}
    )
    assert lease.allowed
    response = await served.post()
    assert response.status_code == 429
    assert response.json()["error"] == {
        "type": "rate_limit_error",
        "code": "RATE_LIMIT_EXCEEDED",
        "message": "Rate limit exceeded. 99800/100000 tokens used in 1 minute; this request needs 2000.",
        "details": {
            "policy": "100000/minute",
            "limit": 100_000,
            "remaining": 200,
            "window": 60,
            "reset": START + 60,
            "unit": "tokens",
            "cost": 2_000,
            "retry_after": 40,
        },
    }
    assert response.headers["retry-after"] == "40"
    assert response.headers["x-ratelimit-remaining-tokens"] == "200"
    assert response.headers["x-ratelimit-limit"] == "600"
    served.clock.set(60)
    assert (await served.post()).status_code == 200


async def test_what_is_used_up_says_so() -> None:
    """A request without an estimate is refused once nothing is left, and not before."""
    served = Served(settling(tokens=100_000))
    assert (await served.post("/other")).status_code == 200
    refused = await served.post("/other")
    message = refused.json()["error"]["message"]
    assert message == "Rate limit exceeded. 100000/100000 tokens used in 1 minute."


async def test_an_estimate_that_never_fits_is_told_so() -> None:
    """Waiting is no use."""
    served = Served(text=SETTINGS.replace("tokens = 2000 ", "tokens = 100001 "))
    response = await served.post()
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["details"]["unit"]) == (
        429,
        "COST_EXCEEDS_LIMIT",
        "tokens",
    )
    assert "retry-after" not in response.headers
    assert response.headers["x-should-retry"] == "false"
    assert error["message"] == "This request needs 100001 tokens; the limit is 100000 in 1 minute."


async def test_a_handler_settles_what_was_used() -> None:
    """In place of the estimate, in all windows of the unit."""
    served = Served(settling(tokens=812, images=1))
    assert (await served.post()).status_code == 200
    assert (await served.used(), await served.used("images")) == ([812, 812], [1])


async def test_a_stream_settles_at_its_end() -> None:
    """And a background task after it: both are within the request."""

    async def endpoint(request: Request) -> Response:
        lease = request.state.ratelimit

        async def body() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"token "
            await lease.settle(units={"tokens": 40})

        return StreamingResponse(body(), background=BackgroundTask(lease.settle, units={"images": 3}))

    served = Served(endpoint)
    assert (await served.post()).text == "token " * 40
    assert (await served.used(), await served.used("images")) == ([40, 40], [3])


@pytest.mark.parametrize(("status", "left"), [(200, 2_000), (399, 2_000), (400, 0), (500, 0), (0, 0)])
async def test_what_becomes_of_an_estimate_that_nobody_settles(status: int, left: int) -> None:
    """Kept below 400; given back from there on, and where the app raises."""

    async def endpoint(_: Request) -> Response:
        if not status:
            raise RuntimeError("no model")
        return Response(status_code=status)

    served = Served(endpoint)
    await served.post()
    assert await served.used() == [left, left]


async def test_a_settle_stands_whatever_becomes_of_the_request() -> None:
    """A request that fails after it has settled has used what it said."""

    async def endpoint(request: Request) -> Response:
        await request.state.ratelimit.settle(units={"tokens": 7})
        return Response(status_code=500)

    served = Served(endpoint)
    await served.post()
    assert await served.used() == [7, 7]


async def test_a_detached_job_settles_by_its_token() -> None:
    """However late, once, and with the price in one call; an unsettled estimate waits."""

    async def endpoint(request: Request) -> Response:
        return JSONResponse({"token": await request.state.ratelimit.detach(ttl=600)})

    text = SETTINGS.replace("concurrent = 50", 'concurrent = 50\nspending = { daily = "1.00" }')
    served = Served(endpoint, text)
    token = (await served.post()).json()["token"]
    assert await served.used() == [2_000, 2_000]
    served.clock.set(3_600)
    await served.limiter.settle(token, units={"tokens": 2_500})
    await served.limiter.settle(token, units={"tokens": 2_500})
    await served.limiter.settle(token, units={"tokens": 9})
    assert await served.used() == [500, 2_500]
    async with served.limiter.resume(token) as job:
        await job.settle(units={"tokens": 100}, replace=True)
    assert await served.used() == [0, 100]


async def test_price_and_units_are_settled_in_one_call() -> None:
    """Each of them once."""

    async def endpoint(request: Request) -> Response:
        await request.state.ratelimit.settle("0.031", units={"tokens": 5})
        return Response()

    text = SETTINGS.replace("concurrent = 50", 'concurrent = 50\nspending = { daily = "1.00" }')
    served = Served(
        endpoint, text.replace("units = { tokens = 2000 }", 'price = "0.02"\nunits = { tokens = 2000 }')
    )
    assert (await served.post()).status_code == 200
    policy = served.limiter.engine.policies.match(
        served.limiter.engine.identity_of(api_key="a key"), "GET", "/else"
    )
    decision = await served.limiter.engine.peek(policy)
    assert [each.budget[1].spent for each in decision.limits if each.budget] == [31_000]
    assert await served.used() == [5, 5]


async def test_a_hook_estimates_in_place_of_the_route() -> None:
    """For what it names and what not; None leaves the route's; what is none is reported and the route's."""
    answers: list[Any] = [
        {"tokens": 70},
        {"images": 1},
        {},
        None,
        {"tokens": -1},
        {"tokens": 1.5},
        7,
        {"else": 3},
    ]
    told = []

    def estimate(scope: Any, identity: Identity) -> Any:
        told.append((scope["path"], identity.plan))
        return answers[len(told) - 1]

    served = Served(estimate=estimate)
    expected = [70, 70, 70, 2_070, 4_070, 6_070, 8_070, 8_070]
    for used in expected:
        assert (await served.post()).status_code == 200
        assert await served.used() == [used, used]
    assert await served.used("images") == [1]
    assert told == [("/chat", "llm")] * len(answers)


async def test_a_hook_may_be_awaited_and_refuse() -> None:
    """An estimate beyond the limit is told that it never fits."""

    async def estimate(_: Any, __: Identity) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"tokens": 100_001}

    served = Served(estimate=estimate)
    assert (await served.post()).json()["error"]["code"] == "COST_EXCEEDS_LIMIT"
    assert await served.used() == [0, 0]


@pytest.mark.parametrize("amount", [-1, 1.5, 10**10, float("nan"), float("inf"), True, "7", None, [1]])
async def test_what_is_no_number_of_units_is_an_error(amount: Any) -> None:
    """It raises in the handler, and the estimate stays."""

    async def endpoint(request: Request) -> Response:
        with pytest.raises(LeaseError, match="whole number from 0"):
            await request.state.ratelimit.settle(units={"tokens": amount})
        return Response()

    served = Served(endpoint)
    assert (await served.post()).status_code == 200
    assert await served.used() == [2_000, 2_000]


async def test_a_unit_that_nothing_limits_is_settled_to_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    """An app serves plans with and without it; one that no plan has is named once, with the nearest."""
    served = Served(settling(token=3, tokens=5))
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        for _ in range(3):
            assert (await served.post()).status_code == 200
    assert await served.used() == [15, 15]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["settle ignored: no plan limits the unit 'token'; did you mean 'tokens'?"]


async def test_an_estimate_of_a_unit_that_nothing_limits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Such an answer of the hook takes the route's estimate away, so a name that is misspelt is said once."""
    served = Served(estimate=lambda *_: {"token": 3})
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        for _ in range(2):
            assert (await served.post()).status_code == 200
        async with await served.app.limiter.acquire(api_key="k", path="/chat", units={"imagse": 1}):
            pass
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "estimate ignored: no plan limits the unit 'token'; did you mean 'tokens'?",
        "estimate ignored: no plan limits the unit 'imagse'; did you mean 'images'?",
    ]


async def test_a_plan_without_units_settles_nothing() -> None:
    """Nor where nothing was charged: a handler need not know."""
    for text in ('plans.default.requests = ["5/minute"]', '[[routes]]\npath = "/chat"\nexempt = true'):
        served = Served(settling(tokens=-5), text)
        assert (await served.post()).status_code == 200


async def test_a_key_has_units_in_place_of_its_plans() -> None:
    """All of them; so what it doesn't write is not limited."""
    served = Served(
        text=SETTINGS + '[[keys]]\nkey = "a key"\nplan = "llm"\nunits = { tokens = ["3000/minute"] }'
    )
    first, second = await served.post(), await served.post()
    assert (first.headers["x-ratelimit-remaining-tokens"], second.status_code) == ("1000", 429)
    assert "x-ratelimit-limit-images" not in first.headers


async def test_all_callers_together_are_limited() -> None:
    """`[application] units`: what they share is told to nobody."""
    served = Served(text=SETTINGS + '[application]\nunits = { tokens = ["3000/minute"] }')
    assert (await served.post()).status_code == 200
    refused = await served.post(**{"x-api-key": "another"})
    assert refused.json()["error"]["code"] == "CAPACITY_EXCEEDED"
    assert "x-ratelimit-limit-tokens" in refused.headers


async def test_shadow_estimates_and_refuses_nobody() -> None:
    """A would-be refusal charges nothing, and its settle does nothing."""
    served = Served(settling(tokens=60_000), "shadow = true\n" + SETTINGS)
    responses = [await served.post() for _ in range(3)]
    assert [response.headers.get("x-ratelimit-shadow") for response in responses] == [None, None, "refused"]
    assert await served.used() == [120_000, 120_000]


async def test_thirty_at_once_are_bounded_by_what_they_use() -> None:
    """Estimates of ten times the use hold others back only until they are settled."""
    served = Served(settling(tokens=1_000), SETTINGS.replace("tokens = 2000 ", "tokens = 10000 "))

    async def until_served() -> int:
        for attempt in range(1_000):
            if (await served.post()).status_code == 200:
                return attempt
            await asyncio.sleep(0)
        raise AssertionError("never served")

    await asyncio.gather(*[until_served() for _ in range(90)])
    assert await served.used() == [90_000, 90_000]
