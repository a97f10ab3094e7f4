"""Every state of the dashboard: nothing that axe finds wrong, nothing cut off, and a picture of each."""

import asyncio
import os
import re
import signal
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, expect

from ratelimit_mw._internal.backends.rights import WORKER
from tests.conftest import StartApp, StartServer
from tests.support.apps import AppServer
from tests.support.axe import need_axe, violations
from tests.support.browser import PATIENCE, browser_page, need_chromium
from tests.support.dashboard_pages import ask, log_in, partition, short, traffic
from tests.support.dashboards import BEARER, SETTINGS, environment
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

IMAGES = os.environ.get("SCREENSHOTS", "")
"""A folder that pictures of the states are written to, such as `docs/images`. They are taken in any case."""
WHOLE = ("one-caller", "caller")
"""States that are pictured down to the end of the page."""
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}}
SCREENS = 4
"""Heights of a phone's screen that the page may take with fifty callers."""
BYTES_A_SECOND = 4_000
"""Bytes that an open page may be sent in a second with fifty busy callers."""

expect.set_options(PATIENCE)


@pytest.fixture(autouse=True)
def tools() -> None:
    """Each test needs the browser and axe."""
    need_chromium()
    need_axe()


@pytest.fixture
def server(tmp_path: Path, start_app: StartApp, redis_server: StoreServer) -> AppServer:
    """Two workers on one Redis."""
    given = environment(tmp_path, redis_server.url)
    return start_app("tests.support.dashboard_app:app", workers=2, environment=given)


async def state(page: Page, name: str) -> None:
    """Look at a page as it is: axe finds nothing, it is no wider than its window, and here is its picture."""
    await asyncio.sleep(0.5)  # for colours to come to rest
    assert await violations(page) == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    path = Path(IMAGES) / f"state-{name}.png" if IMAGES else None
    assert len(await page.screenshot(path=path, full_page=name in WHOLE)) > 5_000


async def crowd(server: AppServer, number: int) -> None:
    """Have so many callers ask, and wait until the page knows of all: a report names but the busiest."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client, asyncio.timeout(180):
        while True:
            for first in range(0, number, 50):
                keys = range(first, min(first + 50, number))
                await asyncio.gather(
                    *[client.get("/", headers={"X-API-Key": f"caller-{key}"}) for key in keys]
                )
                await asyncio.sleep(0.5)
            seen = (await client.get("/ops/snapshot", headers=BEARER)).json()["callers_seen"]
            if seen >= number:
                return


async def test_logging_in(server: AppServer) -> None:
    """The login page, and what it says to a wrong token."""
    async with browser_page() as page:
        await page.goto(f"{server.url}/ops")
        await state(page, "login")
        await log_in(page, server, "wrong")
        await expect(page.get_by_role("alert")).to_have_text("This token is wrong.")
        await state(page, "wrong-token")


async def test_nobody_and_one_caller(server: AppServer) -> None:
    """Without traffic, with one caller, and that caller's own page: where it comes from, what it asks for."""
    async with browser_page() as page:
        await log_in(page, server)
        await expect(page.locator("#no-callers")).to_be_visible()
        await expect(page.locator("#status-workers")).to_have_text("2 workers")
        await state(page, "no-traffic")
        await ask(server, "greedy", 45)
        await expect(page.locator("#headline-text")).to_have_text(f"{short('greedy')} is refused most")
        # An idle worker learns within five seconds that a page is open, and counts routes from then on.
        async with traffic(server, (("X-API-Key=greedy", "/", 0.2),)):
            await expect(page.locator("#routes tbody tr")).to_contain_text("GET /{rest:path}")
        await page.locator("#files summary").click()
        await state(page, "one-caller")
        async with page.expect_download() as saved:
            await page.get_by_role("link", name="Callers of the last minute as CSV").click()
        text = await asyncio.to_thread(Path(await (await saved.value).path()).read_text)
        assert partition("greedy") in text
        await page.get_by_role("button", name="1 day").click()
        await page.get_by_text("The same in numbers, by hour").click()
        await expect(page.locator("#traffic details tbody")).to_contain_text("30")
        await page.locator("#headline a").click()
        async with traffic(server, (("X-API-Key=greedy", "/slow", 0.2),)):
            await expect(page.locator("#addresses tbody tr")).to_contain_text("127.0.0.1")
            await expect(page.locator("#asked tbody tr")).to_contain_text("GET /slow")
            await state(page, "caller")
        await page.get_by_role("link", name="All callers").click()
        await page.get_by_role("button", name=f"Act on {short('greedy')}").click()
        await expect(page.locator("#act-title")).to_be_visible()
        await state(page, "act")


async def test_in_the_dark(server: AppServer) -> None:
    """Colours of dark mode can be told apart as well."""
    async with browser_page(color_scheme="dark") as page:
        await page.goto(f"{server.url}/ops")
        await state(page, "login-dark")
        await log_in(page, server)
        await ask(server, "greedy", 90)
        await expect(page.locator("#headline")).to_have_class("trouble")
        await state(page, "one-caller-dark")
        await page.locator("#headline a").click()
        await expect(page.locator("#limits tbody tr").first).to_be_visible()
        await state(page, "caller-dark")


async def test_five_hundred_callers(server: AppServer) -> None:
    """Pages keep still while figures move; a phone needs few screens; an open page is sent little."""
    async with browser_page() as page:
        await log_in(page, server)
        await crowd(server, 500)
        rows = page.locator("#callers tbody tr")
        await expect(rows).to_have_count(25)
        await expect(page.locator("#callers-number")).to_have_text(
            re.compile(r"^25 of 5\d\d in the last minute$")
        )
        await state(page, "500-callers")
        async with asyncio.TaskGroup() as group:
            more = group.create_task(crowd(server, 500))
            await page.get_by_role("button", name="Next").click()
            await expect(page.locator("#page-text")).to_have_text(
                re.compile(r"^26 to 50 of 5\d\d, order fixed$")
            )
            links = page.locator("#callers tbody a")
            names = await links.all_text_contents()
            assert len(names) == 25
            await ask(server, "loud", 60)
            first = page.locator("#callers tbody tr").first.locator(".admitted")
            before = await first.text_content()
            await expect(first).not_to_have_text(before or "")
            assert await links.all_text_contents() == names
            await more
        await page.get_by_role("button", name="Previous").click()
        assert short("loud") not in await links.all_text_contents()
        await page.get_by_role("button", name="Back to the live order").click()
        await expect(links.first).to_have_text(short("loud"))
    async with browser_page(**PHONE) as page:
        await log_in(page, server)
        await crowd(server, 500)
        await expect(rows_of(page)).to_have_count(10)
        height = await page.evaluate("document.documentElement.scrollHeight")
        assert height <= SCREENS * PHONE["viewport"]["height"]
        await state(page, "500-callers-phone")
    async with streamed(server) as sizes, asyncio.TaskGroup() as group:
        group.create_task(crowd(server, 60))
        async with asyncio.timeout(60):
            while len(sizes) < 6:
                await asyncio.sleep(0.1)
    assert sum(sizes[1:6]) / 5 < BYTES_A_SECOND, sizes


def rows_of(page: Page) -> Any:
    """The rows of callers."""
    return page.locator("#callers tbody tr")


@asynccontextmanager
async def streamed(server: AppServer) -> AsyncIterator[list[int]]:
    """Bytes of each event that an open page is sent, as they come, until the end of the block."""
    sizes: list[int] = []

    async def read() -> None:
        reader, told = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), 0
        headers = {**BEARER, "Accept-Encoding": "gzip"}
        async with (
            httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client,
            client.stream("GET", "/ops/events") as response,
        ):
            async for chunk in response.aiter_raw():
                told += len(chunk)
                if b"data: " in reader.decompress(chunk):
                    sizes.append(told)
                    told = 0

    task = asyncio.create_task(read())
    try:
        yield sizes
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_long_and_right_to_left_names(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """Names of any length and script stay within the page, on a phone, too."""
    settings = f"""{SETTINGS}
[plans.{"very-long-plan-" * 3}x]
requests = ["5/minute"]

[[keys]]
key = "long"
plan = "{"very-long-plan-" * 3}x"
account = "{"account-without-end-" * 4}"
label = "{"a label without any space".replace(" ", "_") * 3}"

[[keys]]
key = "right"
plan = "default"
account = "حساب-الشركة"
label = "חברה לדוגמה (Acme) بيع"
"""
    given = environment(tmp_path, redis_server.url, settings)
    server = start_app("tests.support.dashboard_app:app", environment=given)
    for options, name in (({}, "long-names"), (PHONE, "long-names-phone")):
        async with browser_page(**options) as page:
            await log_in(page, server)
            await ask(server, "right", 3)
            await ask(server, "long", 40)
            await expect(rows_of(page)).to_have_count(2)
            await expect(page.locator("#headline-text")).to_contain_text("is refused most")
            await state(page, name)
            await page.locator("#headline a").click()
            await expect(page.locator("#limits tbody tr").first).to_be_visible()
            await state(page, name.replace("names", "names-caller"))


async def test_redis_away_and_all_workers_silent(server: AppServer, redis_server: StoreServer) -> None:
    """Old figures look old, and can still be read."""
    async with browser_page(has_outage=True) as page:
        await log_in(page, server)
        async with traffic(server, (("X-API-Key=greedy", "/", 0.05),)):
            await asyncio.sleep(60 if IMAGES else 6)
            await expect(rows_of(page)).to_have_count(1)
            redis_server.stop_signal()
            await asyncio.sleep(30 if IMAGES else 0)
            await expect(page.locator("#headline-text")).to_contain_text("The backend is away since")
            await expect(page.locator("#traffic .gaps")).to_contain_text("No figures since")
            await state(page, "redis-away")
        await page.locator("#callers tbody a").click()
        await expect(page.locator("#caller-notice")).to_be_visible()
        await expect(page.locator("#history .gaps")).to_have_text("No figures for now.")
        await expect(page.locator("#sightings")).to_be_hidden()
        await state(page, "redis-away-caller")
        redis_server.continue_signal()
        await page.get_by_role("link", name="All callers").click()
        await expect(page.locator("#status-backend")).to_contain_text("redis up")
        os.killpg(server.pid, signal.SIGSTOP)  # the supervisor, too
        try:
            await expect(page.locator("#headline-text")).to_contain_text("No news from")
            await state(page, "workers-silent")
            await page.goto("about:blank")  # before the supervisor replaces workers that had hung
        finally:
            os.killpg(server.pid, signal.SIGCONT)


async def test_rights_missing(tmp_path: Path, start_app: StartApp, start_server: StartServer) -> None:
    """A login that may count and not change plans: nothing is offered, and the page names the ACL line."""
    store = start_server("redis")
    rules = f"on >secret ~ratelimit:* -@all {' '.join(f'+{each}' for each in WORKER)}"
    with store.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", *rules.split())
    given = environment(tmp_path, store.url.replace("redis://", "redis://worker:secret@"))
    server = start_app("tests.support.dashboard_app:app", environment=given)
    async with browser_page() as page:
        await log_in(page, server)
        await ask(server, "greedy", 40)
        await expect(page.locator("#rights")).to_contain_text(
            "ACL SETUSER worker +hget +hset +hdel +watch +multi +exec"
        )
        await expect(rows_of(page)).to_have_count(1)
        await state(page, "rights-missing")
