"""Money and a worker that dies before it could settle."""

import asyncio
import contextlib
import os
import signal

import httpx
import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.settings.url import SecretURL
from tests.conftest import StartApp
from tests.support.servers import StoreServer
from tests.support.spending_app import SETTINGS
from tests.support.statuses import budget_status, counted

pytestmark = pytest.mark.rerun


async def test_a_killed_worker_holds_nothing_past_its_lease(start_app: StartApp, server: StoreServer) -> None:
    """Killed between admission and settle: slot and estimate were renewed until then, and come back."""
    app = start_app("tests.support.spending_app:app", environment={"STORE": server.url})
    backend = SETTINGS.backend.model_copy(update={"url": SecretURL(server.url)})
    async with Limiter(SETTINGS.model_copy(update={"backend": backend})) as reader:
        policy = reader.engine.policies.match(reader.engine.identity_of(api_key="k"), "GET", "/work")

        async def amounts() -> tuple[int, ...]:
            slots, day = (await reader.engine.peek(policy)).limits
            return counted(slots), *budget_status(day.status)[:2]

        async def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
                    await client.get("/work", headers={"X-API-Key": "k"})

        asking = asyncio.create_task(ask())
        async with asyncio.timeout(20):
            while await amounts() != (1, 0, 100_000):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.5)
            assert await amounts() == (1, 0, 100_000), "renewed past a lease of 1 s"
            os.kill(app.worker_pids()[0], signal.SIGKILL)
            while await amounts() != (0, 0, 0):
                await asyncio.sleep(0.05)
        await asking
