"""The dashboard of an app in this process, for tests that ask it by httpx."""

import tomllib
from typing import Any

import httpx

from ratelimit_mw import RateLimitMiddleware, Settings
from tests.support.asgi import client_of, ok_app

TOKEN = "open sésame"
HASH = "sha256:" + "ab" * 32
OPERATIONS = {"dashboard_path": "/ops", "dashboard_token": TOKEN}
PLANS = """
plans.default = { requests = ["5/minute"] }
plans.anonymous = { requests = ["1/minute"] }
plans.small = { requests = ["1/minute"] }
plans.shared = { requests = ["1/minute"], share = "account" }
keys = [{ key = "listed", plan = "small", account = "acme" }]
"""
CHANGE = [("POST", "/reset"), ("POST", "/plan"), ("POST", "/undo")]


def settings(**operations: Any) -> Settings:
    """Settings with a dashboard."""
    return Settings.model_validate({**tomllib.loads(PLANS), "operations": {**OPERATIONS, **operations}})


def behind(*, address: str = "192.0.2.1", **operations: Any) -> httpx.AsyncClient:
    """A client of an app with a dashboard."""
    return client_of(RateLimitMiddleware(ok_app(), settings=settings(**operations)), address=address)


def bearer(token: str = TOKEN) -> dict[str, Any]:
    """The header that carries the token."""
    return {"Authorization": b"Bearer " + token.encode()}


async def log_in(client: httpx.AsyncClient, token: str = TOKEN, **headers: str) -> httpx.Response:
    """Send the form of the login page."""
    return await client.post("/ops/", data={"token": token}, headers=headers)
