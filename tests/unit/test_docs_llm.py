"""The page on LLM APIs: its settings and its code, run as they are printed."""

import re
import tomllib
from typing import Any

import httpx
from fastapi import FastAPI

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from tests.support.apps import ROOT
from tests.support.asgi import FakeClock

PAGE = (ROOT / "docs" / "llm.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


async def ask_the_model(body: Any) -> Any:
    """Stand for the model."""
    return {"usage": {"total_tokens": body["uses"]}}


async def test_the_page_does_what_it_says() -> None:
    """Estimates by the header or the route, settled by what the model says, told in the headers it names."""
    settings = Settings(**tomllib.loads(blocks("toml")[0]))
    app_code, hook_code, *_ = blocks("python")
    limiter = Limiter(settings, backend=MemoryBackend(clock=FakeClock()))
    hooks: dict[str, Any] = {}
    exec(hook_code.partition("app.add_middleware")[0], hooks)

    def add(app: Any, **options: Any) -> None:
        assert options == {"settings": "ratelimit.toml"}
        original(app, RateLimitMiddleware, limiter=limiter, estimate=hooks["estimate"])

    named: dict[str, Any] = {"ask_the_model": ask_the_model, "__name__": "page"}
    code = app_code.replace("app.add_middleware(RateLimitMiddleware, ", "add(app, ")
    original = FastAPI.add_middleware
    named["add"] = add
    exec(code, named)
    transport = httpx.ASGITransport(named["app"])
    async with httpx.AsyncClient(
        transport=transport, base_url="http://x", headers={"x-api-key": "k"}
    ) as client:
        first = await client.post("/v1/chat/completions", json={"uses": 812})
        second = await client.post(
            "/v1/chat/completions", json={"uses": 59_000}, headers={"x-max-tokens": "2000"}
        )
        refused = await client.post("/v1/chat/completions", json={"uses": 1})
    left = [response.headers["x-ratelimit-remaining-tokens"] for response in (first, second, refused)]
    assert left == ["59000", str(60_000 - 812 - 2_500), str(60_000 - 812 - 59_000)]
    assert refused.json()["error"]["message"] == (
        "Rate limit exceeded. 59812/60000 tokens used in 1 minute; this request needs 1000."
    )
