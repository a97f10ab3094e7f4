"""Six situations of a night on call: what the page says first, and the clicks or commands that end it.

Every command takes its caller from the text that the page shows, and from nowhere else.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.conftest import StartApp
from tests.support.apps import AppServer
from tests.support.browser import PATIENCE, browser_page, need_chromium
from tests.support.commands import Commands
from tests.support.dashboard_pages import answered, log_in, short, traffic
from tests.support.dashboards import TOKEN
from tests.support.live import replace_file
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.slow]

logger = logging.getLogger("ratelimit_mw.tests.night")

APP = "tests.support.dashboard_app:app"
SMALL = [f"small-{number}" for number in range(4)]
OTHERS = [f"customer-{number}" for number in range(4)]

expect.set_options(PATIENCE)


def settings(url: str, *, default: str = "6000/minute", small: str = "5/minute", more: str = "") -> str:
    """A settings file of an API with plans, known customers and a dashboard."""
    keys = "".join(f'[[keys]]\nkey = "{key}"\nplan = "small"\n' for key in SMALL)
    return f"""
backend = {{ url = "{url}", timeout = 5 }}
[operations]
dashboard_path = "/ops"
dashboard_token = "{TOKEN}"
dashboard_changes = true
[plans.default]
requests = ["{default}"]
[plans.tight]
requests = ["5/minute"]
[plans.small]
requests = ["{small}"]
[plans.blocked]
blocked = true
{more}
{keys}
[[keys]]
key = "abuser"
plan = "tight"
label = "Scraper"
[[keys]]
key = "acme"
plan = "default"
label = "Acme"
"""


@pytest.fixture(autouse=True)
def chromium() -> None:
    """Each test needs the browser."""
    need_chromium()


@pytest.fixture
def file(
    tmp_path: Path, redis_server: StoreServer, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The settings file, which commands find as those of an operator do: once `commands` has cleared it."""
    found = tmp_path / "ratelimit.toml"
    found.write_text(settings(redis_server.url))
    monkeypatch.setenv("RATELIMIT_SETTINGS", str(found))
    return found


@pytest.fixture
def server(file: Path, start_app: StartApp) -> AppServer:
    """Two workers."""
    return start_app(APP, workers=2, environment={"RATELIMIT_SETTINGS": str(file)})


async def run(commands: Commands, *arguments: str) -> str:
    """Run a command that has to succeed."""
    return await asyncio.to_thread(commands.good, *arguments)


def steady(keys: Sequence[str], seconds: float) -> list[tuple[str, str, float]]:
    """Callers who ask so often."""
    return [(f"X-API-Key={key}", "/", seconds) for key in keys]


@asynccontextmanager
async def night(
    server: AppServer, callers: Sequence[tuple[str, str, float]], headline: str
) -> AsyncIterator[Page]:
    """The page once it says this, while these callers go on."""
    async with browser_page(has_outage=True) as page:
        await log_in(page, server)
        async with traffic(server, callers):
            await says(page, headline)
            yield page


async def says(page: Page, headline: str) -> None:
    """Wait for a headline, and log how long it took."""
    start = time.monotonic()
    await expect(page.locator("#headline-text")).to_contain_text(headline)
    logger.info("after %.1f s: %s", time.monotonic() - start, await page.locator("#headline").inner_text())


async def test_an_abuser(server: AppServer, commands: Commands) -> None:
    """The headline names it; blocked for an hour by the text of the headline, and let go again."""
    callers = [*steady(["abuser"], 0.05), *steady(OTHERS, 0.3)]
    async with night(server, callers, "is refused most") as page:
        start = time.monotonic()
        await expect(page.locator("#headline")).to_have_class("trouble")
        logger.info("red after %.1f s more", time.monotonic() - start)
        shown = await page.locator("#headline a").inner_text()
        assert shown == short("abuser")
        await expect(page.locator("#headline-text")).to_contain_text("Scraper")
        await run(commands, "keys", "set", shown, "--plan", "blocked", "--for", "1h")
        await answered(server, "abuser", 403)
        assert "blocked" in await run(commands, "show", shown)
        await expect(page.locator("#audit tbody tr").first).to_contain_text("plan blocked")
        await run(commands, "keys", "remove", shown)
        await answered(server, "abuser", 429)


async def test_a_whole_plan_is_starved(
    server: AppServer, commands: Commands, file: Path, redis_server: StoreServer
) -> None:
    """The headline names the plan, its filter the callers; the file with a higher limit ends it."""
    callers = [*steady(SMALL, 0.2), *steady(OTHERS, 0.2)]
    async with night(server, callers, "Many callers of plan small are refused") as page:
        await page.locator("#find-plan").select_option("small")
        await expect(page.locator("#callers tbody tr")).to_have_count(len(SMALL))
        shown = await page.locator("#callers tbody a").first.inner_text()
        assert "5/minute" in await run(commands, "show", shown)
        replace_file(file, settings(redis_server.url, small="6000/minute"))
        await run(commands, "check", str(file))
        for key in SMALL:
            await answered(server, key, 200)


async def test_a_customer_complains_though_within_its_limits(
    start_app: StartApp, commands: Commands, file: Path, redis_server: StoreServer
) -> None:
    """Its page says that a shared limit refused it; "Busiest" names who takes the room."""
    shared = '[application]\nrequests = ["60/10 seconds"]\n'
    replace_file(file, settings(redis_server.url, more=shared))
    server = start_app(APP, workers=2, environment={"RATELIMIT_SETTINGS": str(file)})
    callers = [*steady(["hog"], 0.03), *steady(["acme"], 0.3)]
    async with night(server, callers, "The service is at its own limits") as page:
        await page.get_by_label("Find").fill("acme")
        await page.locator("#callers tbody a").click()
        await expect(page.locator("#caller-facts")).to_contain_text("by shared limit")
        shown = await page.locator("#caller-name").inner_text()
        assert "Acme" in await run(commands, "show", shown)
        await page.get_by_role("link", name="All callers").click()
        await page.get_by_label("Find").fill("")
        await page.get_by_role("button", name="Busiest").click()
        await expect(page.locator("#callers tbody a").first).to_have_text(short("hog"))
        await page.get_by_role("button", name=f"Act on {short('hog')}").click()
        await page.locator("#act-plan").select_option("tight")
        await page.locator("#act-for").select_option("for an hour")
        await page.get_by_role("button", name="Give it this plan").click()
        await expect(page.locator("#toast")).to_contain_text("plan tight until")
        await answered(server, "acme", 200)


async def test_redis_hangs(server: AppServer, redis_server: StoreServer) -> None:
    """The headline says since when and what becomes of requests; it only has to be started again."""
    async with night(server, steady(OTHERS, 0.3), "Nobody is being refused") as page:
        redis_server.stop_signal()
        try:
            await says(page, "The backend is away since")
            await expect(page.locator("#headline-more")).to_contain_text("Each worker counts alone")
            await answered(server, "acme", 200)
        finally:
            redis_server.continue_signal()
        await says(page, "Nobody is being refused")


async def test_a_worker_has_old_settings(
    start_app: StartApp, tmp_path: Path, file: Path, redis_server: StoreServer
) -> None:
    """The headline says so and names the versions; a deploy of the file to that host ends it."""
    old = tmp_path / "old.toml"
    replace_file(old, settings(redis_server.url, default="7000/minute"))
    server = start_app(APP, environment={"RATELIMIT_SETTINGS": str(file)})
    start_app(APP, environment={"RATELIMIT_SETTINGS": str(old)})
    async with night(server, steady(OTHERS, 0.3), "Workers use different settings since") as page:
        await expect(page.locator("#workers tbody tr.bad")).to_have_count(2)
        replace_file(old, settings(redis_server.url))
        await says(page, "Nobody is being refused")


async def test_a_bad_deploy_refuses_everyone(
    server: AppServer, commands: Commands, file: Path, redis_server: StoreServer
) -> None:
    """The headline asks whether something was deployed; the file from before lets everybody in again."""
    async with night(server, steady([*OTHERS, "acme"], 0.2), "Nobody is being refused") as page:
        replace_file(file, settings(redis_server.url, default="1/minute"))
        await says(page, "Most requests of nearly everybody are refused")
        await expect(page.locator("#headline-more")).to_contain_text("Was something deployed?")
        shown = await page.locator("#callers tbody a").first.inner_text()
        assert "1/minute" in await run(commands, "show", shown)
        replace_file(file, settings(redis_server.url))
        for key in OTHERS:
            await answered(server, key, 200)
