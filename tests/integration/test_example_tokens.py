"""The token example, served by uvicorn and asked as its customers would."""

import httpx
import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.settings import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.servers import StoreServer
from tests.support.statuses import budget_status

pytestmark = pytest.mark.rerun

SETTINGS = ROOT / "examples" / "tokens.toml"


async def tokens_spent(url: str) -> tuple[int, int]:
    """Tokens that the key `k` has spent and holds, read from the backend by another process than the app."""
    limiter = Limiter.from_settings(SETTINGS)
    async with Limiter(limiter.settings.model_copy(update={"backend": backend_of(url)})) as reader:
        policy = reader.engine.policies.match(
            reader.engine.identity_of(api_key="k"), "POST", "/v1/completions"
        )
        status = budget_status((await reader.engine.peek(policy)).limits[-1].status)
    return status.spent, status.held


def backend_of(url: str) -> BackendSettings:
    """The `[backend]` table of the example, on another server."""
    return Limiter.from_settings(SETTINGS).settings.backend.model_copy(
        update={"url": SecretURL(url), "timeout": 5.0}
    )


async def test_completions_are_charged_what_they_used(start_app: StartApp, redis_server: StoreServer) -> None:
    """Whole and streamed completions settle with the model's usage, in tokens."""
    environment = {"RATELIMIT_BACKEND__URL": redis_server.url, "RATELIMIT_BACKEND__TIMEOUT": "5"}
    app = start_app("examples.tokens:app", workers=2, environment=environment)
    async with httpx.AsyncClient(base_url=app.url, headers={"X-API-Key": "k"}) as client:
        whole = await client.post("/v1/completions", json={"prompt": "one two three"})
        assert whole.json()["usage"] == {"total_tokens": 6}
        assert await tokens_spent(redis_server.url) == (6, 0)
        streamed = await client.post("/v1/completions", json={"prompt": "one two", "stream": True})
        assert streamed.text.count("data: ") == 3
        assert await tokens_spent(redis_server.url) == (10, 0)


async def test_a_completion_beyond_the_budget_is_refused(
    start_app: StartApp, redis_server: StoreServer
) -> None:
    """A refusal counts in tokens if less than the estimate is left."""
    environment = {"RATELIMIT_BACKEND__URL": redis_server.url, "RATELIMIT_BACKEND__TIMEOUT": "5"}
    app = start_app("examples.tokens:app", environment=environment)
    async with httpx.AsyncClient(base_url=app.url, headers={"X-API-Key": "k"}) as client:
        await client.post("/v1/completions", json={"prompt": "w " * 49_500})
        refused = await client.post("/v1/completions", json={"prompt": "w"})
    error = refused.json()["error"]
    assert error["message"] == (
        "Daily spending limit exceeded. 99000/100000 tokens spent; this request needs 2000."
    )
    assert error["details"]["currency"] == "token"
