"""Helpers for tests that look at the dashboard in a browser."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
from playwright.async_api import Page

from tests.support.apps import AppServer
from tests.support.browser import PATIENCE
from tests.support.dashboards import TOKEN
from tests.support.live import client_of_all_workers


def partition(key: str) -> str:
    """Return the partition that an API key is counted under."""
    return f"k:{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def short(key: str) -> str:
    """Return the name of an API key in the overview."""
    return f"{partition(key)[:12]}…"


async def log_in(page: Page, server: AppServer, token: str = TOKEN) -> None:
    """Through the form."""
    if not page.url.startswith(server.url):
        await page.goto(f"{server.url}/ops")
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Log in").click()


async def ask(server: AppServer, key: str, times: int, path: str = "/") -> Counter[int]:
    """So many requests one after the other, each on a connection of its own, by status."""
    answers: Counter[int] = Counter()
    async with client_of_all_workers(server.url, key) as client:
        for _ in range(times):
            answers[(await client.get(path)).status_code] += 1
    return answers


async def answered(server: AppServer, key: str, status: int) -> None:
    """Ask until both workers answer so: ten times in a row."""
    async with asyncio.timeout(PATIENCE / 1000):
        row = 0
        while row < 10:
            row = row + 1 if await ask(server, key, 1) == {status: 1} else 0


@asynccontextmanager
async def traffic(server: AppServer, callers: Sequence[tuple[str, str, float]]) -> AsyncIterator[None]:
    """Callers by header, path and seconds from one request to the next, until the end of the block."""

    async def call(client: httpx.AsyncClient, caller: str, path: str, seconds: float) -> None:
        name, _, value = caller.partition("=")
        while True:
            await client.get(path, headers={name: value})
            await asyncio.sleep(seconds)

    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        tasks = [asyncio.create_task(call(client, *caller)) for caller in callers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def cells(page: Page, key: str, name: str) -> str:
    """A cell of a caller's row in the overview, as a selector."""
    return f"#callers tbody tr:has(a[title='{partition(key)}']) .{name}"
