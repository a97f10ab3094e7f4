"""The page on limits in code: its code, run as it is printed."""

import re
from typing import Any

from fastapi import FastAPI

from ratelimit_mw import Limit, RateLimitMiddleware
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock, client_of, limiter_of, statuses

PAGE = (ROOT / "docs" / "limits-in-code.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PLANS = """
    plans.default.requests = ["1000/minute"]
"""


def run(number: int) -> dict[str, Any]:
    """Run a block of the page; return the names that it defines."""
    original = FastAPI.add_middleware

    def add(app: Any, kind: Any, **options: Any) -> None:
        assert options == {"settings": "ratelimit.toml"}
        original(app, RateLimitMiddleware, limiter=limiter_of(PLANS, FakeClock()))

    names: dict[str, Any] = {"__name__": "page"}
    FastAPI.add_middleware = add  # type: ignore[method-assign,assignment]
    try:
        exec(BLOCKS[number], names)
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


def test_amounts_of_a_limit() -> None:
    """The declaration is one that can be made."""
    assert isinstance(run(1)["exports"], Limit)
