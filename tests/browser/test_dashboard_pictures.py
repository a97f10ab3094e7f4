"""The dashboard as it looks: on a phone, in dark and in light, with pictures to look at."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.conftest import StartApp
from tests.support.browser import PATIENCE, browser_page, need_chromium
from tests.support.dashboard_pages import log_in, traffic
from tests.support.dashboards import SETTINGS, environment
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

IMAGES = os.environ.get("SCREENSHOTS", "")
"""A folder that pictures of the pages are written to, such as `docs/images`. They are taken in any case."""

expect.set_options(PATIENCE)

CALLERS = (
    ("X-API-Key=scraper", "/", 0.05),
    ("X-API-Key=acme", "/slow", 0.4),
    ("X-API-Key=acme", "/slow", 0.5),
    ("X-API-Key=globex", "/", 0.2),
    ("X-API-Key=initech", "/", 0.6),
    ("X-API-Key=initech", "/slow", 2.0),
)
PICTURED = f"""{SETTINGS}
[plans.pro]
requests = ["600/minute"]
concurrent = {{ limit = 5, unit = "prediction" }}
spending = {{ daily = "25.00" }}

[[keys]]
key = "acme"
plan = "pro"
account = "acme"

[[keys]]
key = "globex"
plan = "pro"
account = "globex"

[[routes]]
path = "/slow"
price = "0.05"

[[routes]]
path = "/"
slot = false
"""


@pytest.fixture(autouse=True)
def chromium() -> None:
    """Each test needs the browser."""
    need_chromium()


async def test_it_is_readable_on_a_phone_in_dark_and_in_light(
    tmp_path: Path, start_app: StartApp, redis_server: StoreServer
) -> None:
    """Each page in each look: nothing is cut off at the side, and the pictures differ in more than size."""
    folder = Path(IMAGES) if IMAGES else tmp_path / "images"
    given = environment(tmp_path, redis_server.url, PICTURED)
    server = start_app("tests.support.dashboard_app:app", workers=2, environment=given)
    looks: dict[str, dict[str, Any]] = {
        "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
        "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
        "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
    }
    grounds = set()
    async with traffic(server, CALLERS):
        await asyncio.sleep(300 if IMAGES else 0)
        for look, options in looks.items():
            async with browser_page(**options) as page:
                await log_in(page, server)
                await expect(page.locator("#callers tbody tr").first).to_contain_text("most refused")
                await expect(page.locator("#held tbody tr").first).to_be_visible()
                await picture(page, folder / f"dashboard-{look}.png")
                await page.locator("#headline a").click()
                await expect(page.locator("#limits tbody tr").first).to_be_visible()
                await expect(page.locator("#history canvas")).to_be_visible()
                await picture(page, folder / f"caller-{look}.png")
                grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


async def picture(page: Page, file: Path) -> None:
    """Take one, of a page that is no wider than its window."""
    await asyncio.sleep(6 if IMAGES else 0)
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    taken = await page.screenshot(path=file, full_page="phone" not in file.name)
    assert len(taken) > 10_000
