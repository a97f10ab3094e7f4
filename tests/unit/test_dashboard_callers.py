"""The dashboard over HTTP: what it tells of callers, and what it changes."""

import asyncio
import json
import logging
from typing import Any

import pytest

from ratelimit_mw import RateLimitMiddleware, Settings, SettingsError
from ratelimit_mw._internal.dashboard.answers import MAX_BODY
from ratelimit_mw._internal.policy.identity import key_partition
from tests.support.asgi import client_of, ok_app, statuses
from tests.support.dashboard_client import CHANGE, HASH, OPERATIONS, bearer, behind, settings


async def test_a_caller_is_shown_with_its_limits() -> None:
    """A caller is shown with its use of each limit, its partition, and the keys that it is known by."""
    async with behind() as client:
        assert await statuses(client, 3) == [200, 429, 429]
        answer = await client.post("/ops/caller", json={"caller": "ip:192.0.2.1"}, headers=bearer())
        detail = answer.json()
        assert (detail["plan"], detail["known_as"], detail["changes"]) == ("anonymous", [], False)
        assert [(limit["name"], limit["used"]) for limit in detail["limits"]] == [("1/minute", 1)]
        assert {"default", "anonymous", "small", "shared"} <= set(detail["plans"])
        assert detail["series"][-1]["at"] <= detail["now"]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>\"'", "a:\u202egnp.exe", "a:" + "x" * 10_000, "a/../b\n\0", ""],
)
async def test_any_name_can_be_asked_about(name: str) -> None:
    """However hostile, it is a text in JSON and never breaks an answer."""
    body = b'{"caller": "%s"}' % "".join(f"\\u{ord(each):04x}" for each in name).encode()
    async with behind() as client:
        headers = {**bearer(), "Content-Type": "application/json"}
        answer = await client.post("/ops/caller", content=body, headers=headers)
    assert answer.json()["caller"] == name
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("method", "path"), CHANGE)
async def test_nothing_changes_unless_the_settings_allow_it(method: str, path: str) -> None:
    """The token alone reads."""
    async with behind() as client:
        body = {"caller": "ip:192.0.2.1", "key": HASH, "plan": "small"}
        answer = await client.request(method, f"/ops{path}", json=body, headers=bearer())
    assert answer.status_code == 403
    assert "dashboard_changes" in answer.json()["error"]


async def test_counters_can_be_cleared(caplog: pytest.LogCaptureFixture) -> None:
    """A caller starts afresh, and the log says who did it."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    async with behind(dashboard_changes=True) as client:
        assert await statuses(client, 2) == [200, 429]
        answer = await client.post("/ops/reset", json={"caller": "ip:192.0.2.1"}, headers=bearer())
        assert answer.json()["cleared"] == 1
        assert answer.json()["change"]["can_undo"] is False
        assert await statuses(client, 2) == [200, 429]
        assert (
            await client.post("/ops/reset", json={"caller": "a:none"}, headers=bearer())
        ).status_code == 404
    assert "change: ip:192.0.2.1: 1 counter cleared, by dashboard, 192.0.2.1" in caplog.text


async def test_a_key_can_be_given_a_plan_and_keeps_its_account(caplog: pytest.LogCaptureFixture) -> None:
    """A plan given to a key holds from the next request on, keeps the account, and can be taken back."""
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    app = RateLimitMiddleware(ok_app(), settings=settings(dashboard_changes=True))
    (listed,) = app.limiter.settings.keys
    async with client_of(app) as client, client_of(app, x_api_key="listed") as caller:
        assert await statuses(caller, 2) == [200, 429]
        body = {"key": listed.hash, "plan": "default"}
        (await client.post("/ops/plan", json=body, headers=bearer())).raise_for_status()
        assert await statuses(caller, 5) == [200] * 4 + [429]  # what was counted is kept
        identity = app.limiter.engine.identify.of_key(listed.hash)
        assert identity is not None
        assert (identity.plan, identity.account) == ("default", "acme")
        detail = await client.post("/ops/caller", json={"caller": identity.partition}, headers=bearer())
        assert detail.json()["set_live"] == detail.json()["known_as"] == [listed.hash]
        back = {"key": listed.hash, "plan": None}
        (await client.post("/ops/plan", json=back, headers=bearer())).raise_for_status()
        assert app.limiter.engine.identify.of_key(listed.hash).plan == "small"  # type: ignore[union-attr]
    assert f"change: {identity.partition}: plan default, by dashboard, 192.0.2.1" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/plan", {"key": HASH, "plan": "nosuch"}, 422, "nosuch"),
        ("/plan", {"key": HASH, "plan": "shared"}, 422, "account"),
        ("/plan", {"key": "in the clear", "plan": "small"}, 400, "key must be the hash"),
        ("/plan", {"key": HASH, "plan": 5}, 400, "plan must be a string"),
        ("/plan", {"plan": "small"}, 400, "key must be a string"),
        ("/reset", {"caller": ["k:0"]}, 400, "caller must be a string"),
        ("/caller", {"caller": "\ud800"}, 400, "caller must be a string"),
        ("/reset", [], 400, "not a JSON object"),
        ("/caller", {"caller": "x" * MAX_BODY}, 413, "bytes were sent"),
    ],
)
async def test_what_cannot_be_done_is_said(path: str, body: Any, status: int, said: str) -> None:
    """A change that the settings file would not take, or a body that makes no sense, is refused in words."""
    async with behind(dashboard_changes=True) as client:
        headers = {**bearer(), "Content-Type": "application/json; charset=utf-8"}
        answer = await client.post(f"/ops{path}", content=json.dumps(body), headers=headers)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text


async def test_a_body_that_is_no_json_is_said_to_be_none() -> None:
    """Not a 500."""
    async with behind(dashboard_changes=True) as client:
        headers = {**bearer(), "Content-Type": "application/json"}
        for content in (b"", b"{", b"\xff", b"[" * 50_000):
            answer = await client.post("/ops/caller", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (400, "The body is not JSON.")


async def test_many_who_look_at_one_caller_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open page of a caller costs the backend no more than one, however many there are."""
    app = RateLimitMiddleware(ok_app(), settings=settings())
    asked: list[str] = []
    assert app._dashboard is not None
    view = app._dashboard._callers._view
    ask = view.caller

    async def counted(caller: str) -> Any:
        asked.append(caller)
        return await ask(caller)

    monkeypatch.setattr(view, "caller", counted)
    async with client_of(app) as client:
        body = {"caller": "ip:192.0.2.1"}
        answers = [client.post("/ops/caller", json=body, headers=bearer()) for _ in range(100)]
        assert {each.status_code for each in await asyncio.gather(*answers)} == {200}
    assert len(asked) <= 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ACME", ["a:acme-team", "k:batch"]), ("batch, night", ["k:batch"]),
        ("k:", ["a:acme-team", "k:batch"]), ("192.0.2.1", ["ip:192.0.2.1"]), ("{hash}", ["k:batch"]),
        ("{short}…", ["k:batch"]), ("nobody", []), (" ", []),
    ],
)  # fmt: skip
async def test_callers_are_found_by_any_of_their_names(text: str, found: list[str]) -> None:
    """A part of the name, the label, the account or the hash: of known keys, and of who called lately."""
    keys = [
        {"key": "a", "plan": "small", "account": "Acme", "label": "batch, night"},
        {"key": "b", "plan": "shared", "account": "acme-team"},
    ]
    plans = {"small": {}, "shared": {"share": "account"}, "anonymous": {}, "default": {}}
    own = Settings.model_validate({"plans": plans, "keys": keys, "operations": OPERATIONS})
    app = RateLimitMiddleware(ok_app(), settings=own)
    batch = key_partition(own.keys[0].hash)
    names = {batch: "k:batch"}
    async with client_of(app) as client:
        assert await statuses(client, 1) == [200]
        await app.limiter.engine.reporter.report()
        wanted = text.format(hash=own.keys[0].hash, short=batch[:12])
        answer = await client.post("/ops/search", json={"text": wanted}, headers=bearer())
        snapshot = (await client.get("/ops/snapshot", headers=bearer())).json()
    callers = [each["caller"] for each in answer.json()["callers"]]
    assert sorted(names.get(each, each) for each in callers) == found
    assert snapshot["callers_seen"] == 1


async def test_a_caller_has_a_link_to_its_logs() -> None:
    """The page is told of the template, and puts the caller's name into it; without one there is no link."""
    template = "https://logs.example.com/?q={caller}"
    for url, told in ((template, template), ("", None)):
        async with behind(logs_url=url) as client:
            answer = await client.post("/ops/caller", json={"caller": "ip:192.0.2.1"}, headers=bearer())
            assert answer.json()["logs_url"] == told


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("https://logs.example.com/", "does not contain {caller}"),
        ("javascript:alert('{caller}')", "is not a web address"),
        ("logs/{caller}", "is not a web address"),
    ],
)
def test_a_link_to_logs_is_a_web_address_with_a_place_for_the_caller(url: str, wrong: str) -> None:
    """Anything else is an error of the settings, and never a link."""
    with pytest.raises(SettingsError, match=wrong):
        settings(logs_url=url)
