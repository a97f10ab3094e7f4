"""Changes from the dashboard: all keys of a caller at once, each recorded, and undone as it was before."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from ratelimit_mw import KeyEntry, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.audit_store import KEPT, MemoryAuditStore
from ratelimit_mw._internal.live.audit import MOST_UNDONE, AuditLog
from ratelimit_mw._internal.policy.identity import key_partition
from tests.support.asgi import client_of, ok_app
from tests.support.dashboard_client import OPERATIONS, bearer

SETTINGS = {
    "operations": {**OPERATIONS, "dashboard_changes": True},
    "plans": {
        "team": {"requests": ["5/minute"], "share": "account"},
        "big": {"requests": ["50/minute"]},
        "small": {"requests": ["1/minute"]},
    },
    "keys": [
        {"key": "a", "plan": "team", "account": "acme", "label": "Acme, batch"},
        {"key": "b", "plan": "team", "account": "acme"},
        {"key": "c", "plan": "big"},
    ],
}


@pytest.fixture
def app() -> RateLimitMiddleware:
    """An app whose dashboard may change plans."""
    return RateLimitMiddleware(ok_app(), settings=Settings.model_validate(SETTINGS))


@pytest.fixture
async def client(app: RateLimitMiddleware) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that has the dashboard's token."""
    async with client_of(app) as client:
        client.headers = httpx.Headers({b"authorization": bearer()["Authorization"]})
        yield client


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """Post a change that succeeds, and return its answer."""
    answer = await client.post(f"/ops/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def changes(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The latest changes."""
    found: list[dict[str, Any]] = (await client.get("/ops/audit")).json()["changes"]
    return found


def plans(app: RateLimitMiddleware) -> list[str]:
    """The plans of the three keys."""
    found = [app.limiter.engine.identify.of_key(key.hash) for key in app.limiter.settings.keys]
    return [each.plan for each in found if each is not None]


async def test_all_keys_of_an_account_change_together(
    app: RateLimitMiddleware, client: httpx.AsyncClient
) -> None:
    """Keys that share their counts have one plan; they keep their account and their labels."""
    answer = await post(client, "plan", caller="a:acme", plan="small")
    assert plans(app) == ["small", "small", "big"]
    assert answer["change"]["detail"] == "plan small"
    first, second, _ = app.limiter.settings.keys
    assert dict(app.limiter.engine.live.keys) == {
        first.hash: KeyEntry("small", "acme", label="Acme, batch"),
        second.hash: KeyEntry("small", "acme"),
    }
    await post(client, "undo", id=answer["change"]["id"])
    assert plans(app) == ["team", "team", "big"]
    assert dict(app.limiter.engine.live.keys) == {}


async def test_undo_gives_back_what_was_set_before(
    app: RateLimitMiddleware, client: httpx.AsyncClient
) -> None:
    """Limits of its own, too, which a plan from the page replaces; an undo can be undone."""
    key = app.limiter.settings.keys[2].hash
    before = KeyEntry("big", "core", ("9/minute",), 3, label="L")
    await app.limiter.engine.live.set_keys({key: before})
    change = (await post(client, "plan", key=key, plan="small"))["change"]
    undone = (await post(client, "undo", id=change["id"]))["change"]
    assert app.limiter.engine.live.keys[key] == before
    await post(client, "undo", id=undone["id"])
    assert app.limiter.engine.live.keys[key] == KeyEntry("small", "core", label="L")


async def test_what_was_changed_again_is_not_undone(
    app: RateLimitMiddleware, client: httpx.AsyncClient
) -> None:
    """Somebody else's later change is not overwritten; what can't be undone is refused."""
    key = app.limiter.settings.keys[2].hash
    change = (await post(client, "plan", key=key, plan="small"))["change"]
    await app.limiter.engine.live.set_keys({key: KeyEntry("team", "x")})
    answer = await client.post("/ops/undo", json={"id": change["id"]})
    assert (answer.status_code, "changed again after this change" in answer.json()["error"]) == (409, True)
    assert app.limiter.engine.live.keys[key] == KeyEntry("team", "x")
    cleared = (await post(client, "reset", caller="a:acme"))["change"]
    for change_id in (cleared["id"], "nonsense"):
        assert (await client.post("/ops/undo", json={"id": change_id})).status_code == 404


async def test_every_change_is_recorded_with_its_author(
    app: RateLimitMiddleware, client: httpx.AsyncClient
) -> None:
    """The latest first: when, who, whom and what; a refused one is none."""
    name = key_partition(app.limiter.settings.keys[2].hash)
    await post(client, "plan", caller=name, plan="small")
    await post(client, "plan", caller=name, plan=None)
    await post(client, "reset", caller=name)
    assert (await client.post("/ops/plan", json={"caller": name, "plan": "nosuch"})).status_code == 422
    found = await changes(client)
    assert [(each["action"], each["callers"], each["can_undo"]) for each in found] == [
        ("reset", [name], False),
        ("take-back", [name], True),
        ("plan", [name], True),
    ]
    assert {each["who"] for each in found} == {"dashboard, 192.0.2.1"}
    assert all(found[0]["at"] >= each["at"] > 1e9 for each in found)


async def test_a_caller_without_a_known_key_has_no_plan_to_give(client: httpx.AsyncClient) -> None:
    """A caller without a key and an address can't be given any."""
    answer = await client.post("/ops/plan", json={"caller": "ip:unix", "plan": "small"})
    assert (answer.status_code, "Only an API key" in answer.json()["error"]) == (404, True)


async def test_records_are_bounded_and_nonsense_is_left_out() -> None:
    """The latest are kept; what others have written in their place breaks nothing."""
    store = MemoryAuditStore()
    log = AuditLog(store)
    for number in range(KEPT + 5):
        await log.add("who", "plan", ["k:1"], f"plan {number}")
    found = await log.latest(KEPT + 5)
    assert (len(found), found[0].detail, found[-1].detail) == (KEPT, f"plan {KEPT + 4}", "plan 5")
    for text in (b"", b"{", b"[]", b'{"id": 1}', b'{"callers": 5}', b"\xff", b'{"id":"x","at":"y"}'):
        await store.add(1.0, text)
    assert (await log.latest(8))[0].detail == f"plan {KEPT + 4}"
    many = dict.fromkeys(map(str, range(MOST_UNDONE + 1)), KeyEntry("pro"))
    change = await log.add("who", "plan", ["a:acme"], "plan pro", (dict.fromkeys(many), many))
    assert change.before is None
    await asyncio.sleep(0)
