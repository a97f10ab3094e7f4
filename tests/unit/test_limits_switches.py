"""`[limits.NAME]`: amounts and switches of limits in code, which the settings have the last word over."""

import logging
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Scope

from ratelimit_mw import Identity, Limit, Limiter, RateLimited, RateLimitMiddleware, get_lease, limited
from tests.support.asgi import Down, FakeClock, client_of, limiter_of, settings_of, shown, statuses

PLANS = """
    plans.default.requests = ["100/minute"]
"""


def app_of(*early: Limit, late: Limit | None = None) -> Starlette:
    """An app with one route that has these limits."""

    async def handler(request: Request) -> Response:
        if late is not None:
            await get_lease(request).charge(late.on("k"))
        return PlainTextResponse("ok")

    return Starlette(
        routes=[Route("/", limited(*early)(handler) if early else handler, methods=["GET", "POST"])]
    )


def behind(app: Starlette, text: str = "", **hooks: Any) -> RateLimitMiddleware:
    """The app behind a middleware with these settings."""
    return RateLimitMiddleware(app, limiter=limiter_of(PLANS + text, FakeClock()), **hooks)


def placed(limit: Limit, where: str) -> Starlette:
    """An app that has the limit as an early or as a late one."""
    return app_of(limit) if where == "early" else app_of(late=limit)


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", [200, 200, 429, 429]),
        ('requests = ["3/minute"]', [200, 200, 200, 429]),
        ('requests = ["1/hour"]', [200, 429, 429, 429]),
        ("off = true", [200] * 4),
        ("shadow = true", [200] * 4),
    ],
)
async def test_the_settings_have_the_last_word(where: str, said: str, expected: list[int]) -> None:
    """Amounts and switches are the settings', also over `rates_for`; the key stays the code's."""
    limit = Limit("x", "2/minute", rates_for=lambda _: "2/minute")
    app = behind(placed(limit, where), f"[limits.x]\n{said}" if said else "")
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 4) == expected


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize("in_code", [False, True])
async def test_a_limit_that_only_reports_changes_nothing_else(
    where: str, caplog: pytest.LogCaptureFixture, *, in_code: bool
) -> None:
    """In shadow mode of a limit all others are charged as ever, and refuse; it only counts and logs."""
    x, y = Limit("x", "1/minute", shadow=in_code or None), Limit("y", "3/minute")
    app = app_of(x, y) if where == "early" else app_of(y, late=x)
    text = "" if in_code else "[limits.x]\nshadow = true"
    middleware = behind(app, text)
    async with client_of(middleware, x_api_key="a") as client:
        assert await statuses(client, 3) == [200] * 3
        answer = await client.get("/")
        assert (answer.status_code, answer.json()["error"]["details"]["policy"]) == (429, "y")
        assert shown(answer)[:2] == ("3", "0")
    totals = middleware.limiter.stats().totals
    assert totals["default", "", "shadow", "x"] == (3 if where == "early" else 2)
    assert totals["default", "", "rate", "y"] == 1
    assert "would have been refused" in caplog.text


@pytest.mark.parametrize("unit", ["requests", "tokens"])
async def test_headers_leave_out_a_limit_that_only_reports(unit: str) -> None:
    """`Remaining` is what is left of limits that refuse, before and after the shadowed limit is used up."""
    x = Limit("x", "2/minute", unit=unit, shadow=True)
    text = '[response]\nheaders = ["x-ratelimit", "ietf"]'
    for settings in ("", text):
        async with client_of(behind(app_of(x, Limit("y", "9/minute")), settings), x_api_key="a") as client:
            for left in range(8, 4, -1):
                answer = await client.get("/")
                assert (answer.status_code, *shown(answer)[:2]) == (200, "9", str(left))
                assert "x-ratelimit-limit-tokens" not in answer.headers
                assert '"x"' not in answer.headers.get("ratelimit", "")


async def test_changes_are_live() -> None:
    """Other settings apply to the next request, and what was counted is kept."""
    app = behind(app_of(Limit("x", "5/minute")))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2) == [200] * 2
        app.limiter.apply(settings_of(PLANS + '[limits.x]\nrequests = ["3/minute"]'))
        assert await statuses(client, 2) == [200, 429]
        app.limiter.apply(settings_of(PLANS + "[limits.x]\noff = true"))
        assert await statuses(client, 2) == [200] * 2


async def test_a_hook_that_takes_its_time_meets_the_settings_of_then() -> None:
    """Settings that change while a hook is asked hold for the request's limits in code, too."""

    async def identify(scope: Scope) -> Identity:
        app.limiter.apply(settings_of(PLANS + '[limits.x]\nrequests = ["3/minute"]'))
        return Identity("ann", "default")

    app = behind(app_of(Limit("x", "5/minute")), identify=identify)
    async with client_of(app) as client:
        assert shown(await client.get("/"))[:2] == ("3", "2")


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_late_limit_obeys_when(*, is_async: bool) -> None:
    """`when` is asked with the request's scope, or for a job with its method and path; no means no charge."""

    def applies(scope: Scope, identity: Identity) -> bool:
        return bool(scope["method"] == "POST" and identity.plan == "default")

    async def later(scope: Scope, identity: Identity) -> bool:
        return applies(scope, identity)

    limit = Limit("posts", "1/minute", when=later if is_async else applies)
    app = behind(app_of(Limit("y", "99/minute"), late=limit))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3) == [200] * 3
        assert await statuses(client, 3, "/", "POST") == [200, 429, 429]
        assert await statuses(client, 1) == [200]
    limiter = limiter_of("", FakeClock())
    for method, expected in (("GET", [True] * 3), ("POST", [True, False, False])):
        found = [await limiter.acquire(limit.on("k"), api_key="b", method=method) for _ in range(3)]
        assert [lease.allowed for lease in found] == expected


@pytest.mark.parametrize(
    ("own", "said", "expected"),
    [
        (None, "", 200),
        ("deny", "", 503),
        (None, 'on_failure = "deny"', 503),
        ("deny", 'on_failure = "allow"', 200),
    ],
)
@pytest.mark.parametrize("where", ["early", "late"])
async def test_while_the_backend_is_away(own: Any, said: str, expected: int, where: str) -> None:
    """The strictest of all limits of a request decides, and the settings come before the code."""
    limit = Limit("x", "9/minute", on_failure=own)
    settings = settings_of(PLANS + f"[limits.x]\n{said}")
    app = RateLimitMiddleware(placed(limit, where), limiter=Limiter(settings, backend=Down()))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 1) == [expected]
    await app.limiter.close()


async def test_units_and_slots() -> None:
    """Rates in the settings count the limit's own unit, and slots can be changed, too."""
    tokens = Limit("tokens", "10/minute", unit="tokens", concurrent=1)
    limiter = limiter_of('[limits.tokens]\nrequests = ["20/minute"]\nconcurrent = 2', FakeClock())
    lease = await limiter.acquire(tokens.on("k", cost=15))
    assert lease.allowed
    assert (await limiter.acquire(tokens.on("k", cost=5))).allowed
    with pytest.raises(RateLimited):
        (await limiter.acquire(tokens.on("k", cost=0))).raise_for_refusal()


def test_unknown_names_and_differing_declarations(caplog: pytest.LogCaptureFixture) -> None:
    """A name that no code declares is told with the nearest one, and so are declarations that differ."""
    limits = [
        Limit("tries-of-test", "2/minute"),
        Limit("twice-of-test", "2/minute"),
        Limit("twice-of-test", "3/minute"),
    ]
    alike = [Limit("alike-of-test", "2/minute", by=lambda *_: "x") for _ in range(2)]
    text = "[limits.trise-of-test]\noff = true\n[limits.tries-of-test]\nshadow = true"
    with caplog.at_level(logging.WARNING), TestClient(behind(app_of(*limits, *alike), text)):
        pass
    assert (
        "[limits.trise-of-test]: no code declares a limit of this name; did you mean 'tries-of-test'? ["
        in caplog.text
    )
    assert "'twice-of-test' is declared twice in code" in caplog.text
    assert "alike-of-test" not in caplog.text
    assert "[limits.tries-of-test]" not in caplog.text


async def test_rates_of_a_route_are_one_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Rates of a route and of routers around it are one limit, of which the stricter ones hold."""
    inner = APIRouter(dependencies=[Depends(limited("3/minute", "100/hour"))])
    outer = APIRouter(dependencies=[Depends(limited("2/minute", "200/day"))])

    @inner.get("/")
    async def handler() -> str:
        return "ok"

    outer.include_router(inner)
    app = FastAPI(dependencies=[Depends(limited("9/minute"))])
    app.include_router(outer)
    served = behind(app)
    with caplog.at_level(logging.WARNING), TestClient(served):
        pass
    assert "declared twice" not in caplog.text
    async with client_of(served, x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]
        served.limiter.apply(settings_of(PLANS + '[limits."GET /"]\nrequests = ["4/minute"]'))
        assert await statuses(client, 3) == [200, 200, 429]


def test_an_outage_decision_has_to_be_one() -> None:
    """A declaration says what `on_failure` may be."""
    with pytest.raises(ValueError, match="x: on_failure must be one of allow, local, deny, not 'open'"):
        Limit("x", "1/minute", on_failure="open")  # type: ignore[arg-type]
