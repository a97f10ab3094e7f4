"""The page on limits in code: its code, run as it is printed."""

import asyncio
import re
from typing import Any

import pytest
from fastapi import FastAPI

from ratelimit_mw import Limit, RateLimited, RateLimitMiddleware
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limiter_of, ok_app, statuses

PAGE = (ROOT / "docs" / "limits-in-code.md").read_text("utf-8")
LOGINS = (ROOT / "docs" / "logins.md").read_text("utf-8")


def blocks_of(page: str) -> list[str]:
    """Return the blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(PAGE)
PLANS = """
    plans.default.requests = ["1000/minute"]
"""


def run(number: int, blocks: list[str] = BLOCKS) -> dict[str, Any]:
    """Run a block of a page; return the names that it defines."""
    original = FastAPI.add_middleware

    def add(app: Any, kind: Any, **options: Any) -> None:
        assert options == {"settings": "ratelimit.toml"}
        original(app, RateLimitMiddleware, limiter=limiter_of(PLANS, FakeClock()))

    names: dict[str, Any] = {"__name__": "page"}
    FastAPI.add_middleware = add  # type: ignore[method-assign,assignment]
    try:
        exec(blocks[number], names)
    finally:
        FastAPI.add_middleware = original  # type: ignore[method-assign]
    return names


async def test_limits_of_routes_and_routers() -> None:
    """A project, a tenant and each route of the router have the counts that the page says."""
    app = run(0)["app"]
    async with client_of(app, x_api_key="a", x_tenant="t") as client:
        assert await statuses(client, 6, "/projects/1/files", "POST") == [200] * 5 + [429]
        answer = await client.post("/projects/1/files")
        assert answer.json()["error"]["details"]["policy"] == "project-writes"
        assert await statuses(client, 1, "/projects/2/files", "POST") == [200]
        for path in ("/reports/daily", "/reports/weekly"):
            assert await statuses(client, 3, path) == [200, 200, 429]


async def test_keys_that_only_the_handler_knows() -> None:
    """Each e-mail address has its count, and a job is refused by either key."""
    names = run(2)
    async with client_of(names["app"], x_api_key="a") as client:
        for email, expected in [("a@x", [200] * 3 + [429]), ("b@x", [200])]:
            sent = [await client.post("/invitations", json={"email": email}) for _ in expected]
            assert [answer.status_code for answer in sent] == expected
    limiter = limiter_of(PLANS, FakeClock())
    assert [await names["render"](limiter, "m", "c@x") for _ in range(3)] == ["rendered"] * 3
    with pytest.raises(RateLimited):
        await names["render"](limiter, "m", "c@x")


async def test_waiting_for_room(capsys: pytest.CaptureFixture[str]) -> None:
    """The fifth request waits for the slot of one of four, and mails go out at ten a second."""
    names = run(3)
    limiter = names["app"].user_middleware[0].kwargs["limiter"]
    leases = [await limiter.acquire(names["gpu"].on("m")) for _ in range(4)]
    async with client_of(names["app"], x_api_key="a") as client:
        answer = asyncio.create_task(client.post("/render/m"))
        async with asyncio.timeout(30):
            while not len(limiter.engine.turns):
                await asyncio.sleep(0.001)
        await leases[0].release()
        assert (await answer).json() == "rendered"
    await names["send_all"](limiter, ["ann", "bob"])
    assert capsys.readouterr().out == "sent to ann\nsent to bob\n"


async def test_a_body_of_the_apps_own() -> None:
    """Pages get a page, and the API the standard body; status and headers are the same."""
    hook = run(5)["refusal"]
    app = RateLimitMiddleware(ok_app(), limiter=limiter_of("", FakeClock()), refusal=hook)
    async with client_of(app) as client:
        await statuses(client, 20)
        page, api = await client.get("/"), await client.get("/api/x")
    assert (page.status_code, page.text.startswith("<h1>")) == (429, True)
    assert (api.status_code, api.json()["error"]["code"]) == (429, "RATE_LIMIT_EXCEEDED")
    assert page.headers["retry-after"] == api.headers["retry-after"]


def test_amounts_of_a_limit() -> None:
    """The declaration is one that can be made."""
    assert isinstance(run(1)["exports"], Limit)
    assert isinstance(run(4)["sign_ups"], Limit)


async def test_the_login_of_the_other_page() -> None:
    """Five wrong passwords close an account for everybody, right ones count nowhere."""
    names = run(0, blocks_of(LOGINS))

    async def is_right(email: str, password: str) -> bool:
        return password == "right"

    names["is_right"] = is_right
    async with client_of(names["app"], x_api_key="a") as client:
        forms = [
            {"email": "Ann@x ", "password": word} for word in ["right", "right", *["wrong"] * 5, "right"]
        ]
        found = [(await client.post("/login", json=form)).status_code for form in forms]
    assert found == [200, 200, *[401] * 5, 429]
