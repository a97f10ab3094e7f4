"""Limits in code that count failures, or other answers: charged when a request comes, given back if not."""

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ratelimit_mw import Limit, RateLimitMiddleware, by, get_lease, limited
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import EstimateAction, Known, Settlement, UnderWay
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.asgi import FakeClock, client_of, limiter_of, shown, statuses

PLANS = """
    [plans.default]
    requests = ["1000/minute"]
    units = { tokens = ["9000/minute"] }
    spending = { daily = "9.00" }
    [plans.anonymous]
    requests = ["10000/minute"]
    [[routes]]
    path = "/priced/{status}"
    price = "0.10"
    units = { tokens = 100 }
"""


async def answer(request: Request) -> Response:
    """Answer with the status in the path; 0 raises."""
    status = int(request.path_params["status"])
    if not status:
        raise ZeroDivisionError
    return PlainTextResponse("answered", status)


def app_of(*limits: Limit) -> Starlette:
    """An app on whose routes these limits are."""

    @limited(*limits)
    async def marked(request: Request) -> Response:
        return await answer(request)

    return Starlette(routes=[Route("/{status:int}", marked), Route("/priced/{status:int}", marked)])


def behind(app: ASGIApp, clock: FakeClock | None = None, text: str = PLANS) -> RateLimitMiddleware:
    """The app behind a middleware."""
    return RateLimitMiddleware(app, limiter=limiter_of(text, clock or FakeClock()))


@pytest.mark.parametrize(
    ("count", "counted", "free"),
    [
        ("failures", [401, 500, 404], [200, 302, 204]),
        (lambda status: status == 401, [401, 401, 401], [200, 404, 500]),
        (lambda status: status < 400, [200, 201, 302], [401, 404, 500]),
    ],
)
async def test_only_such_answers_count(count: Any, counted: list[int], free: list[int]) -> None:
    """Answers that don't count are given back; once as many as the limit came that do, all are refused."""
    app = behind(app_of(Limit("x", "3/minute", count=count)))
    async with client_of(app, x_api_key="a") as client:
        for status in [*free * 3, *counted]:
            assert (await client.get(f"/{status}")).status_code == status
        answer = await client.get(f"/{free[0]}")
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert error["message"] == "Rate limit exceeded. 3/3 requests used in 1 minute."
        assert error["details"]["policy"] == "x"
        assert "unit" not in error["details"]
        assert shown(answer)[:2] == ("1000", "988")


async def test_an_exception_is_a_failure() -> None:
    """A handler that raises has failed."""
    app = behind(app_of(Limit("x", "1/minute", count="failures")))
    async with client_of(app, x_api_key="a") as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/0")
        assert await statuses(client, 1, "/200") == [429]


class Watched(MemoryBackend):
    """Remembers what ends of requests ask of it."""

    def __init__(self) -> None:
        super().__init__(clock=FakeClock())
        self.asked: list[str] = []

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """End a reservation, and remember how."""
        self.asked.append(action.name)
        return super().finish(reservation, action)

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> Known[Settlement]:
        """Settle, and remember what."""
        self.asked.append("settle")
        return super().settle_units(reservation, units, replace=replace)


@pytest.mark.parametrize(
    ("text", "path", "asked"),
    [
        ("", "/200", ["GIVE_BACK"]),
        ("", "/401", ["KEEP"]),
        (PLANS, "/priced/200", ["settle", "KEEP"]),
        (PLANS, "/priced/401", ["settle", "GIVE_BACK"]),
    ],
)
async def test_an_end_asks_the_backend_as_little_as_can_be(text: str, path: str, asked: list[str]) -> None:
    """One operation says what becomes of an answer; one more where price or units end otherwise."""
    backend = Watched()
    app = app_of(Limit("x", "9/minute", count="failures"))
    limited_app = RateLimitMiddleware(app, limiter=limiter_of(text, FakeClock(), backend))
    async with client_of(limited_app, x_api_key="a") as client:
        await client.get(path)
    assert backend.asked == asked


async def test_tries_at_once_cannot_overshoot() -> None:
    """Of a hundred wrong tries at once as many as the limit reach the handler; right ones make room again."""
    clock, reached = FakeClock(), 0

    @limited(Limit("x", "5/minute", count="failures", by=by.everyone))
    async def handler(request: Request) -> Response:
        nonlocal reached
        reached += 1
        await asyncio.sleep(0)
        return PlainTextResponse("", int(request.query_params["status"]))

    app = behind(Starlette(routes=[Route("/", handler)]), clock)
    async with client_of(app) as client:
        for status, expected in [(200, 5), (401, 5), (401, 0)]:
            reached = 0
            await asyncio.gather(*[client.get(f"/?status={status}") for _ in range(100)])
            assert reached == expected
        clock.set(60)
        reached = 0
        assert await statuses(client, 7, "/?status=200") == [200] * 7


@pytest.mark.parametrize("status", [200, 401])
async def test_money_and_units_end_as_ever(status: int) -> None:
    """A failure that counts still gives price and tokens back; a success that doesn't count keeps them."""
    app = behind(
        app_of(Limit("x", "3/minute", count="failures"), Limit("y", "3/minute", count=lambda s: s < 400))
    )
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2, f"/priced/{status}") == [status] * 2
        answer = await client.get(f"/priced/{status}")
        assert answer.headers["x-ratelimit-remaining-tokens"] == ("8700" if status == 200 else "8900")
        assert await statuses(client, 1, f"/{status}") == [429]
    engine = app.limiter.engine
    decision = await engine.peek(engine.policies.match(engine.identity_of(api_key="a"), "GET", "/"))
    (budget,) = [each.budget for each in decision.limits if each.budget is not None]
    assert (budget[1].spent, budget[1].held) == (300_000 if status == 200 else 0, 0)


async def test_a_late_limit_counts_by_the_answer_too() -> None:
    """A limit that the handler charges is settled by the answer that the handler gives."""
    login = Limit("login", "2/15 minutes", count="failures")

    async def handler(request: Request) -> Response:
        await get_lease(request).charge(login.on("a@example.com"))
        return PlainTextResponse("", int(request.query_params["status"]))

    app = behind(Starlette(routes=[Route("/", handler)]))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 5, "/?status=200") == [200] * 5
        assert await statuses(client, 3, "/?status=401") == [401, 401, 429]
        assert await statuses(client, 1, "/?status=200") == [429]


async def test_a_job_fails_by_an_exception() -> None:
    """Of an acquired lease the block decides: it counts if it raises."""
    limiter, limit = limiter_of(PLANS, FakeClock()), Limit("x", "1/minute", count="failures")
    for _ in range(3):
        async with await limiter.acquire(limit.on("k")) as lease:
            assert lease.allowed
    with pytest.raises(ZeroDivisionError):
        async with await limiter.acquire(limit.on("k")):
            raise ZeroDivisionError
    assert not (await limiter.acquire(limit.on("k"))).allowed


async def test_a_predicate_that_fails_counts(caplog: pytest.LogCaptureFixture) -> None:
    """A function that raises lets nobody off, and the log says so."""

    def fails(status: int) -> bool:
        raise ZeroDivisionError

    app = behind(app_of(Limit("x", "1/minute", count=fails)))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2, "/200") == [200, 429]
    assert "count= of limit x failed; the request is counted" in caplog.text


async def late(status: int) -> bool:
    """A predicate that would have to be awaited."""
    return status == 400


def test_a_predicate_that_would_have_to_be_awaited_is_an_error() -> None:
    """An async predicate would count every answer, so it says so when it is handed in."""
    count: Any = late
    with pytest.raises(TypeError, match="x: count must be a plain function, not a coroutine function"):
        Limit("x", "1/minute", count=count)


async def test_a_predicate_that_returns_what_would_have_to_be_awaited_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that only looks like a plain function is found out when it is called; the log names its limit."""
    count: Any = lambda status: late(status)  # noqa: E731, PLW0108 - which no look at it can tell
    async with client_of(behind(app_of(Limit("x", "1/minute", count=count)))) as client:
        assert await statuses(client, 2, "/200") == [200, 429]
    assert "count= of limit x failed; the request is counted" in caplog.text
    assert "count must be a plain function" in caplog.text


async def test_a_late_refusal_counts_nowhere() -> None:
    """A request that a late limit refuses is not a failure: its early limits are given back."""
    early, late = Limit("early", "2/minute", count="failures"), Limit("late", "1/minute")

    @limited(early)
    async def handler(request: Request) -> Response:
        await get_lease(request).charge(late.on("x"))
        return PlainTextResponse("ok")

    app = behind(Starlette(routes=[Route("/", handler)]))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 5) == [200] + [429] * 4
        assert (await client.get("/")).json()["error"]["details"]["policy"] == "late"


@pytest.mark.parametrize("count", ["some", 5, None])
def test_a_count_has_to_be_one(count: Any) -> None:
    """A declaration says what a count may be."""
    with pytest.raises(ValueError, match="x: count must be 'all', 'failures' or a function, not"):
        Limit("x", "1/minute", count=count)
    with pytest.raises(ValueError, match="x: count is for requests alone; the app settles tokens"):
        Limit("x", "1/minute", unit="tokens", count="failures")


async def test_keys_are_gone_after_their_window() -> None:
    """Nothing is kept of ten thousand keys that failed once their window is over."""
    clock = FakeClock()
    backend = MemoryBackend(clock=clock, max_windows=500)
    limiter, limit = limiter_of(PLANS, clock, backend), Limit("x", "5/minute", count="failures")
    for number in range(3_000):
        lease = await limiter.acquire(limit.on(number))
        limiter.engine.leases.end(lease, failed=True)
    assert len(backend._meters.records) == 0
    assert sum(map(len, backend._logs.values())) <= 1_000
