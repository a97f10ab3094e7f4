"""Helpers for tests of the dashboard on real servers."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.apps import AppServer

TOKEN = "open-sesame"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SETTINGS = f"""
[operations]
dashboard_path = "/ops"
dashboard_token = "{TOKEN}"
dashboard_changes = true

[plans.default]
requests = ["30/minute"]
concurrent = 2

[plans.big]
requests = ["100000/minute"]

[[keys]]
key = "steady"
plan = "big"
"""


def environment(folder: Path, url: str, settings: str = SETTINGS) -> dict[str, str]:
    """For an app with a dashboard that counts in the backend of this address."""
    file = folder / "dashboard.toml"
    file.write_text(settings)
    # On a machine that is busy with other tests no worker must take the backend for away.
    backend = {"RATELIMIT_BACKEND__URL": url, "RATELIMIT_BACKEND__TIMEOUT": "5"}
    return {"RATELIMIT_SETTINGS": str(file), **backend}


class Events:
    """An open page's stream of figures."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, dict[str, Any]]:
        """The name and the values of the next event; `StopAsyncIteration` at the end of the stream."""
        name = ""
        while True:
            line = await anext(self._lines)
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                return name, json.loads(line.removeprefix("data: "))

    async def drain(self) -> None:
        """Read until the stream ends."""
        async for _ in self._lines:
            pass


@asynccontextmanager
async def stream(server: AppServer) -> AsyncIterator[Events]:
    """A stream of an app's dashboard, on a connection of its own."""
    async with (
        httpx.AsyncClient(base_url=server.url, headers=BEARER, timeout=20) as client,
        client.stream("GET", "/ops/events") as response,
    ):
        response.raise_for_status()
        yield Events(response)
