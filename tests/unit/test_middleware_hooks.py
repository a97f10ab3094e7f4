"""The app's own say: who is calling, and what a request will cost."""

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from starlette.types import Scope

from ratelimit_mw import Identity, RateLimitMiddleware
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from tests.support.asgi import FakeClock, client_of, limited, limiter_of, ok_app, settings_of, shown, statuses

PLANS = """
    plans.gold = {requests = ["99/minute"]}
    plans.team = {requests = ["9/minute"], share = "account"}
"""
BUDGET = 'plans.default.spending = {daily = "1.00"}\n'
PRICED = BUDGET + 'routes = [{path = "/{rest:path}", price = "0.40"}]'


def always(answer: Any) -> Callable[..., Any]:
    """A hook that always says the same."""

    def hook(*_: object) -> Any:
        return answer

    return hook


def header(scope: Scope, name: bytes) -> str | None:
    """A header of a scope, None where it has none."""
    return next((value.decode() for key, value in scope["headers"] if key == name), None)


async def test_identify_says_who_is_calling() -> None:
    """The caller is who the hook says, on the plan that it says; the headers' keys are not read."""

    def identify(scope: Scope) -> Identity | None:
        user = header(scope, b"x-user")
        return Identity(user, "gold") if user else None

    app = limited(PLANS, FakeClock(), identify=identify)
    for user, expected in [("ann", "98"), ("ann", "97"), ("bob", "98")]:
        async with client_of(app, x_user=user, x_api_key="a", authorization="Bearer b") as client:
            assert shown(await client.get("/"))[:2] == ("99", expected)


async def test_identify_may_be_async() -> None:
    """A hook may await, as one does that asks a database."""

    async def identify(scope: Scope) -> Identity | None:
        return Identity("ann", "gold")

    async with client_of(limited(PLANS, FakeClock(), identify=identify)) as client:
        assert shown(await client.get("/"))[:2] == ("99", "98")


async def test_identify_on_an_unknown_plan_is_the_apps_error() -> None:
    """A plan that doesn't exist is an error that names the nearest one, not a quota of some other plan."""
    app = limited(PLANS, FakeClock(), identify=always(Identity("ann", "glod")))
    async with client_of(app) as client:
        with pytest.raises(ValueError, match=r"'glod', which doesn't exist; did you mean 'gold'\?"):
            await client.get("/")


async def test_identify_with_an_account() -> None:
    """Callers of one account share its counts where their plan says so; without one each has its own."""

    def identify(scope: Scope) -> Identity:
        return Identity(header(scope, b"x-user") or "", "team", account=header(scope, b"x-account"))

    app = limited(PLANS, FakeClock(), identify=identify)
    remaining = []
    for user, account in [("ann", "acme"), ("bob", "acme"), ("ann", ""), ("bob", "")]:
        headers = {"x_user": user} | ({"x_account": account} if account else {})
        async with client_of(app, **headers) as client:
            remaining.append(shown(await client.get("/"))[1])
    assert remaining == ["8", "7", "8", "8"]


@pytest.mark.parametrize("name", ["ip:192.0.2.1", "a:acme", "k:0", "{x}*:\n", "", "ключ", "\udcff"])
async def test_identify_never_names_a_partition(name: str) -> None:
    """A caller of any name that a hook gives draws on no count of an address, a key or an account."""
    app = limited(PLANS, FakeClock(), identify=always(Identity(name, "anonymous")))
    plain = limited("", FakeClock())
    plain.limiter.engine.backend = app.limiter.engine.backend
    async with client_of(plain) as client:
        await client.get("/")
    async with client_of(app) as client:
        assert shown(await client.get("/"))[:2] == ("20", "19")


async def test_identify_errors_are_the_apps_own() -> None:
    """An exception of a hook reaches the server; the request is not let through unlimited."""

    def identify(scope: Scope) -> Identity:
        raise PermissionError("no database")

    async with client_of(limited("", FakeClock(), identify=identify)) as client:
        with pytest.raises(PermissionError, match="no database"):
            await client.get("/")


@pytest.mark.parametrize("amount", ["0.50", Decimal("0.5"), "0.4999999"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_price_hook(amount: str | Decimal, is_async: bool) -> None:
    """The hook's estimate takes the place of the route's; one finer than the unit is rounded up."""

    async def later(*_: object) -> str | Decimal:
        return amount

    app = limited(PRICED, FakeClock(), price=later if is_async else always(amount))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]
        error = (await client.get("/")).json()["error"]
    assert error["message"] == "Daily spending limit exceeded. 1.00/1.00 USD spent."


async def test_price_hook_none_leaves_the_routes_price() -> None:
    """The route's price counts if the hook doesn't know one."""
    app = limited(PRICED, FakeClock(), price=always(None))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]


@pytest.mark.parametrize(
    "amount", ["", "-1", "NaN", "1e", 0.5, True, Decimal("nan"), Decimal(-1), Decimal("inf"), b"1", [1]]
)
async def test_bad_price_counts_as_the_routes(amount: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A price that is not an amount is logged, and the route's price counts: no 500, never for nothing."""
    app = limited(PRICED, FakeClock(), price=always(amount))
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        async with client_of(app, x_api_key="a") as client:
            assert await statuses(client, 3) == [200, 200, 429]
    assert "price= returned something that is not an amount" in caplog.text


async def test_price_hook_is_told_who_pays() -> None:
    """The hook gets the scope and the caller, and is asked only where there is a budget to charge."""
    asked: list[tuple[str, str]] = []

    def price(scope: Scope, identity: Identity) -> str:
        asked.append((scope["path"], identity.plan))
        return "0.10"

    text = BUDGET + 'routes = [{path = "/health", exempt = true}]'
    app = limited(text, FakeClock(), price=price)
    async with client_of(app, x_api_key="a") as client:
        await statuses(client, 1, "/paid")
        await statuses(client, 1, "/health")
    async with client_of(app) as client:
        await statuses(client, 1, "/anonymous")
    assert asked == [("/paid", "default")]


@pytest.mark.parametrize(
    "text",
    [
        """plans.team = {share = "account", spending = {daily = "1.00"}}
        keys = [
          {key = "a", plan = "team", account = "acme"}, {key = "b", plan = "team", account = "acme"},
        ]""",
        """identity.unknown_keys = "anonymous"
        plans.anonymous.spending = {daily = "1.00"}""",
    ],
)
async def test_price_hook_is_told_the_very_caller(text: str) -> None:
    """Of callers who are counted together, the hook is told which one it is."""
    asked: list[str | None] = []

    def price(_: Scope, identity: Identity) -> str:
        asked.append(identity.api_key_hash)
        return "0.10"

    app = limited(text, FakeClock(), price=price)
    for key in ("a", "b", "a"):
        async with client_of(app, x_api_key=key) as client:
            assert await statuses(client, 1) == [200]
    assert asked == [hash_api_key(key, "") for key in (b"a", b"b", b"a")]


async def test_rules_that_change_while_a_hook_is_asked_hold_for_its_request() -> None:
    """A request is counted under the settings in force once the hook has answered, and their routes."""
    before = 'plans.default.requests = ["9/minute"]\nroutes = [{ path = "/other", cost = 3 }]'
    after = 'plans.default.requests = ["7/minute"]\nroutes = [{ path = "/x" }, { path = "/", cost = 2 }]'
    limiter = limiter_of(before, FakeClock())

    async def identify(_: Scope) -> Identity:
        limiter.apply(settings_of(after))
        return Identity("user", "default")

    app = RateLimitMiddleware(ok_app(), limiter=limiter, identify=identify)
    async with client_of(app) as client:
        assert shown(await client.get("/"))[:2] == ("7", "5")
