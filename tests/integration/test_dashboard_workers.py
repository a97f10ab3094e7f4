"""Changes from the dashboard where several workers serve it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from ratelimit_mw import RateLimitMiddleware, Settings
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from tests.support.asgi import client_of, ok_app
from tests.support.dashboard_client import OPERATIONS, bearer
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun


@asynccontextmanager
async def worker(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """One worker of an app, and a client of it that has the dashboard's token."""
    settings = {
        "operations": {**OPERATIONS, "dashboard_changes": True},
        "backend": {"url": url, "timeout": 5},
        "plans": {
            "one": {"requests": ["5/minute"]},
            "three": {"requests": ["5/hour", "9/day"], "concurrent": 2},
        },
        "keys": [{"key": "a", "plan": "one"}],
    }
    app = RateLimitMiddleware(ok_app(), settings=Settings.model_validate(settings))
    try:
        async with client_of(app) as client:
            assert (await client.get("/", headers={"x-api-key": "a"})).status_code == 200
            client.headers = httpx.Headers({b"authorization": bearer()["Authorization"]})
            yield client
    finally:
        await app.limiter.close()


async def test_counters_are_cleared_by_the_plan_that_another_worker_has_just_given(
    redis_server: StoreServer,
) -> None:
    """A caller's counters are those of its plan now, not of the one that this worker has looked at last."""
    caller = key_partition(hash_api_key(b"a", ""))
    async with worker(redis_server.url) as one, worker(redis_server.url) as other:
        cleared = (await other.post("/ops/reset", json={"caller": caller})).json()["cleared"]
        assert cleared == 1
        given = await one.post("/ops/plan", json={"caller": caller, "plan": "three"})
        assert given.status_code == 200, given.text
        cleared = (await other.post("/ops/reset", json={"caller": caller})).json()["cleared"]
        assert cleared == 3
