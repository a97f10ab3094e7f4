"""Named tokens of the dashboard: who may look, who may change, and whose change it was."""

import tomllib
from typing import Any

import httpx
import pytest

from ratelimit_mw import RateLimitMiddleware, Settings
from tests.support.asgi import client_of, ok_app, settings_of
from tests.support.dashboard_client import log_in

TEXT = """
[plans.default]
[plans.small]
[[keys]]
key = "k"
plan = "default"
[operations]
dashboard_path = "/ops"
dashboard_changes = true
"""
OPERATORS = """
[[operations.dashboard_tokens]]
name = "Anna"
token = "anna's"
changes = true
[[operations.dashboard_tokens]]
name = "screen"
token = "screen's"
"""


def app_of(text: str = TEXT + OPERATORS) -> RateLimitMiddleware:
    """An app with a dashboard."""
    return RateLimitMiddleware(ok_app(), settings=settings_of(text))


def client(app: RateLimitMiddleware, token: str) -> httpx.AsyncClient:
    """A client with a token."""
    return client_of(app, authorization=f"Bearer {token}")


async def give(operator: httpx.AsyncClient, app: RateLimitMiddleware, plan: str = "small") -> httpx.Response:
    """Give the key a plan."""
    return await operator.post("/ops/plan", json={"key": app.limiter.settings.keys[0].hash, "plan": plan})


async def test_a_change_has_an_author() -> None:
    """The list of changes names the token, and so does an undo by another operator."""
    app = app_of(TEXT.replace("dashboard_changes", 'dashboard_token = "all"\ndashboard_changes') + OPERATORS)
    async with client(app, "anna's") as anna, client(app, "all") as anybody:
        change = (await give(anna, app)).json()["change"]
        assert change["who"] == "Anna, 192.0.2.1"
        undone = (await anybody.post("/ops/undo", json={"id": change["id"]})).json()["change"]
        assert undone["who"] == "dashboard, 192.0.2.1"
        found = (await anna.get("/ops/audit")).json()["changes"]
    assert [each["who"] for each in found] == ["dashboard, 192.0.2.1", "Anna, 192.0.2.1"]


async def test_a_token_without_changes_may_only_look() -> None:
    """Everything is shown and nothing offered; each change is refused, and changes nothing."""
    app = app_of()
    async with client(app, "screen's") as screen, client(app, "anna's") as anna:
        facts = (await screen.get("/ops/snapshot")).json()
        assert (facts["changes"], facts["operator"]) == (False, "screen")
        facts = (await anna.get("/ops/snapshot")).json()
        assert (facts["changes"], facts["operator"]) == (True, "Anna")
        change = (await give(anna, app)).json()["change"]
        for path, body in (
            ("plan", {"key": "x", "plan": "small"}),
            ("reset", {"caller": "k:1"}),
            ("undo", {"id": change["id"]}),
        ):
            refused = await screen.post(f"/ops/{path}", json=body)
            assert (refused.status_code, "screen is read-only" in refused.json()["error"]) == (403, True)
        assert (await screen.get("/ops/audit")).json()["changes"] == [change]


async def test_no_token_changes_anything_where_changes_are_off() -> None:
    """`dashboard_changes` has the last word."""
    app = app_of((TEXT + OPERATORS).replace("dashboard_changes = true", "dashboard_changes = false"))
    async with client(app, "anna's") as anna:
        assert (await anna.get("/ops/snapshot")).json()["changes"] is False
        assert "operations.dashboard_changes is off" in (await give(anna, app)).json()["error"]


async def test_each_operator_logs_in() -> None:
    """The session is the operator's own; what is not a token opens nothing, nor does an empty one."""
    app = app_of()
    for token, name in (("anna's", "Anna"), ("screen's", "screen")):
        async with client_of(app) as browser:
            assert (await log_in(browser, token)).status_code == 303
            assert (await browser.get("/ops/snapshot")).json()["operator"] == name
    for token in ("", "dashboard", "Anna", "anna's screen's"):
        async with client_of(app) as browser:
            assert (await log_in(browser, token)).status_code == 401
            assert (
                await browser.get("/ops/snapshot", headers={"authorization": f"Bearer {token}"})
            ).status_code == 401


async def test_a_session_ends_with_its_token() -> None:
    """A token that is changed shuts its operator out at once, and no other; so is a right lost."""
    app = app_of()
    async with client_of(app) as anna, client_of(app) as screen:
        await log_in(anna, "anna's")
        await log_in(screen, "screen's")
        without = TEXT + OPERATORS.replace("changes = true", "changes = false")
        app.limiter.engine.apply(settings_of(without))
        assert (await anna.get("/ops/snapshot")).json()["changes"] is False
        app.limiter.engine.apply(settings_of(TEXT + OPERATORS.replace("anna's", "another")))
        assert (await anna.get("/ops/snapshot")).status_code == 401
        assert (await screen.get("/ops/snapshot")).status_code == 200


def test_no_text_of_the_settings_has_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a dump nor the version of the settings tells a token; the environment may set them."""
    settings = Settings(**tomllib.loads(TEXT + OPERATORS))
    assert "anna's" not in f"{settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    versions = [
        app_of(TEXT + OPERATORS.replace("screen's", token)).limiter.engine.version for token in ("a", "b")
    ]
    assert versions[0] == versions[1]
    listed: Any = '[{"name": "Anna", "token": "of the environment"}]'
    monkeypatch.setenv("RATELIMIT_OPERATIONS__DASHBOARD_TOKENS", listed)
    loaded = Settings.load()
    (anna,) = loaded.operations.dashboard_tokens
    assert (anna.name, anna.token.get_secret_value(), anna.changes) == ("Anna", "of the environment", False)
