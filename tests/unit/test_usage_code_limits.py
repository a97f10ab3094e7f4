"""Limits in code that count by caller, where callers and operators read how a caller stands."""

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_mw import Identity, Limit, RateLimitMiddleware, by, get_lease, limited
from ratelimit_mw._internal.fleet.limit_figures import LimitFiguresReader
from ratelimit_mw._internal.limiter.inspect_caller import forget, overview
from ratelimit_mw.testing import fresh
from tests.support.asgi import START, FakeClock, client_of, limiter_of, settings_of, statuses

SETTINGS = """
    operations.usage_path = "/limits"
    plans.default.requests = ["60/minute"]
    plans.gold.requests = ["60/minute"]
    keys = [{ key = "rich", plan = "gold" }]
"""


def more_for_gold(identity: Identity) -> str | None:
    """Return other rates for one plan."""
    return "9/minute" if identity.plan == "gold" else None


EARLY = Limit("exports", "3/minute", "20/hour", concurrent=2, cost=2, rates_for=more_for_gold)
FAILED = Limit("fails", "5/minute", count="failures")
TOKENS = Limit("late-tokens", "100/minute", unit="tokens", cost=30)
KEYED = Limit("keyed", "9/minute")
OTHERS = Limit("others", "9/minute", by=by.address)


@pytest.fixture
def app() -> RateLimitMiddleware:
    """An app with limits by caller, on a route and in its handler, and others."""

    @limited(EARLY, FAILED, OTHERS)
    async def handler(request: Request) -> Response:
        await get_lease(request).charge(TOKENS, KEYED.on("x"))
        return PlainTextResponse("ok")

    @limited("7/minute")
    async def bare(request: Request) -> Response:
        return PlainTextResponse("ok")

    routes = [Route("/", handler), Route("/bare", bare)]
    return RateLimitMiddleware(Starlette(routes=routes), limiter=limiter_of(SETTINGS, FakeClock()))


async def told(app: RateLimitMiddleware, key: str = "a") -> dict[str, Any]:
    """Return the limits in code that a caller is told of, by name."""
    async with client_of(app, x_api_key=key) as client:
        usage = (await client.get("/limits")).json()
    return {each["name"]: each for each in usage["limits"]}


def used(found: dict[str, Any]) -> dict[str, list[int]]:
    """Return the units used of each limit, by name."""
    return {name: [rate["used"] for rate in each["rates"]] for name, each in found.items()}


async def test_callers_read_limits_in_code_that_count_by_caller(app: RateLimitMiddleware) -> None:
    """Each is told by its name, used or not; limits of other keys are not the caller's to know."""
    assert used(await told(app)) == {"exports": [0, 0], "fails": [0], "GET,HEAD /bare": [0]}
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2) == [200, 429]
    found = await told(app)
    assert used(found) == {"exports": [2, 2], "fails": [0], "GET,HEAD /bare": [0], "late-tokens": [30]}
    assert found["exports"] == {
        "name": "exports",
        "unit": "requests",
        "rates": [
            {"policy": "3/minute", "limit": 3, "used": 2, "remaining": 1, "window": 60, "reset": START + 60},
            {"policy": "20/hour", "limit": 20, "used": 2, "remaining": 18, "window": 3600}
            | {"reset": START + 3600},
        ],
        "concurrent": {"unit": "request", "limit": 2, "active": 0, "remaining": 2},
    }
    assert (found["late-tokens"]["unit"], found["fails"]["unit"]) == ("tokens", "requests")
    assert used(await told(app, "b"))["exports"] == [0, 0]


async def test_amounts_are_those_in_force(app: RateLimitMiddleware) -> None:
    """`rates_for` and the settings say how much it is; a limit that is off is not shown."""
    assert [each["limit"] for each in (await told(app, "rich"))["exports"]["rates"]] == [9]
    text = "[limits.exports]\nrequests = ['4/minute']\n[limits.fails]\noff = true"
    app.limiter.apply(settings_of(f"{SETTINGS}\n{text}"))
    found = await told(app)
    assert [each["limit"] for each in found["exports"]["rates"]] == [4]
    assert "fails" not in found


@pytest.mark.parametrize("kind", ["raises", "raises later", "nonsense"])
async def test_rates_that_cannot_be_told_are_the_limits_own(kind: str) -> None:
    """A function that fails does not break the answer."""

    def rates(identity: Identity) -> Any:
        if kind == "raises":
            raise ZeroDivisionError
        return later() if kind == "raises later" else 7.5

    async def later() -> str:
        raise ZeroDivisionError

    odd = app_of(Limit("odd", "3/minute", rates_for=rates))
    assert [each["limit"] for each in (await told(odd))["odd"]["rates"]] == [3]


async def test_rates_that_are_awaited_are_told_and_forgotten() -> None:
    """Rates of an async `rates_for` are what callers and operators see, and what a reset clears."""

    async def rates(identity: Identity) -> str | None:
        await asyncio.sleep(0)
        return more_for_gold(identity)

    app = app_of(Limit("awaited", "3/minute", rates_for=rates))
    async with client_of(app, x_api_key="rich") as client:
        assert await statuses(client, 2) == [200, 200]
    assert [each["limit"] for each in (await told(app, "rich"))["awaited"]["rates"]] == [9]
    assert [each["limit"] for each in (await told(app))["awaited"]["rates"]] == [3]
    lease = await app.limiter.acquire(api_key="rich", path="/")
    ((*_, figures),) = await LimitFiguresReader(app.limiter).read([lease.identity])
    assert (figures.used, figures.limit) == (2, 9)
    assert (await overview(app.limiter, lease.identity)).limits[-1].window is not None
    await forget(app.limiter, lease.identity)
    assert used(await told(app, "rich"))["awaited"] == [0]


def app_of(limit: Limit) -> RateLimitMiddleware:
    """An app with one route and a limit on it."""
    route = Route("/", limited(limit)(lambda _: PlainTextResponse("ok")))
    return RateLimitMiddleware(Starlette(routes=[route]), limiter=limiter_of(SETTINGS, FakeClock()))


async def test_without_any_nothing_is_added() -> None:
    """An app without limits in code is told of as before."""
    plain = RateLimitMiddleware(Starlette(), limiter=limiter_of(SETTINGS, FakeClock()))
    async with client_of(plain, x_api_key="a") as client:
        assert "limits" not in (await client.get("/limits")).json()


async def test_operators_see_and_clear_them(app: RateLimitMiddleware) -> None:
    """The dashboard's figures name each limit, and clearing a caller clears these as well."""
    async with client_of(app, x_api_key="a") as client:
        await statuses(client, 1)
    limiter = app.limiter
    who = limiter.engine.identity_of(api_key="a")
    (figures,) = await LimitFiguresReader(limiter).read([who])
    assert [(each.name, each.used) for each in figures if each.scope == "limit exports"] == [
        ("3/minute", 2),
        ("20/hour", 2),
        ("2 requests at once", 0),
    ]
    assert [each.used for each in figures if each.scope == "limit late-tokens"] == [30]
    await forget(limiter, who)
    stand = await overview(limiter, who)
    assert sum(each.window[1].used for each in stand.limits if each.window is not None) == 0


async def test_fresh_counts_tell_of_them_too(app: RateLimitMiddleware) -> None:
    """Under `fresh` a caller begins anew, and is told of the same limits."""
    async with client_of(app, x_api_key="a") as client:
        await statuses(client, 1)
    with fresh(app):
        assert used(await told(app)) == {"exports": [0, 0], "fails": [0], "GET,HEAD /bare": [0]}
