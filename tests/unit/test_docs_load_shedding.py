"""The page on load shedding: its settings, run as they are printed."""

import asyncio
import re
import tomllib

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware, Settings
from tests.support.apps import ROOT
from tests.support.asgi import client_of

PAGE = (ROOT / "docs" / "load-shedding.md").read_text("utf-8")


async def test_the_last_slots_are_for_those_who_pay() -> None:
    """Five slots for the anonymous, eight for free keys, and ten for all, on one count."""
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    settings = Settings(**tomllib.loads(text))
    paying = settings.plans["paying"].model_copy(update={"concurrent": None})  # one caller stands for many
    settings = settings.model_copy(update={"plans": {**settings.plans, "paying": paying}})
    end = asyncio.Event()

    async def wait(request: Request) -> PlainTextResponse:
        await end.wait()
        return PlainTextResponse("ok")

    app = RateLimitMiddleware(Starlette(routes=[Route("/", wait)]), settings=settings)
    running: list[asyncio.Task[httpx.Response]] = []

    async def admitted(client: httpx.AsyncClient) -> bool:
        """Whether a request got a slot, which it then keeps."""
        request = asyncio.create_task(client.get("/"))
        done, _ = await asyncio.wait([request], timeout=0.05)
        if not done:
            running.append(request)
            return True
        assert request.result().json()["error"]["code"] == "CAPACITY_EXCEEDED"
        return False

    clients = [client_of(app), client_of(app, x_api_key="trial"), client_of(app, x_api_key="customer")]
    found = [[await admitted(client) for _ in range(6)] for client in clients]
    assert found == [[True] * 5 + [False], [True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    end.set()
    answers = await asyncio.gather(*running)
    assert {answer.status_code for answer in answers} == {200}
    for client in clients:
        await client.aclose()
