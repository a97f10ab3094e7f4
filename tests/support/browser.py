"""A real Chromium without a window, for the tests that look at pages."""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Page, Request, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000
"""Milliseconds that a page is waited for."""
AT_ONCE = max((os.cpu_count() or 1) // 2, 2)
"""Browsers that run at a time, of all processes that run tests: more would wait for each other."""


def need_chromium() -> None:
    """Skip the test where there is no browser; fail where CI forgot to install one."""
    if CHROMIUM is None:
        said = "needs Chromium, on Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)


@asynccontextmanager
async def browser_page(
    *, is_attacked: bool = False, has_outage: bool = False, **options: Any
) -> AsyncIterator[Page]:
    """A page of a new browser with the options of a context, such as `color_scheme`.

    A script that fails, an error in the console, or a resource from elsewhere fails the test, unless errors
    are what it wants to see: `is_attacked`. With `has_outage` a worker may answer 503 now and then, as it
    does while nobody knows yet that its backend hangs.
    """
    async with _turn(), async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            context = await browser.new_context(**options)
            context.set_default_timeout(PATIENCE)
            page = await context.new_page()
            wrong = complaints(context, "401", *["503"] * has_outage)
            yield page
            assert is_attacked or not wrong, wrong
        finally:
            await browser.close()


@asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """Wait until fewer than `AT_ONCE` browsers run."""
    folder = Path(tempfile.gettempdir()) / f"ratelimit-mw-browsers-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        locks = [stack.enter_context((folder / str(number)).open("w")) for number in range(AT_ONCE)]
        while not any(map(_is_locked, locks)):
            await asyncio.sleep(0.1)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Lock a file until it is closed; whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def complaints(context: BrowserContext, *statuses: str) -> list[str]:
    """Return a growing list of errors in a context from now on; answers of these statuses are none."""
    found: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error" and not any(f"status of {each}" in message.text for each in statuses):
            found.append(message.text)

    def on_request(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:")):
            found.append(f"asked for {request.url}")

    context.on("console", on_console)
    context.on("request", on_request)
    context.on("weberror", lambda error: found.append(str(error.error)))
    context.on("dialog", lambda dialog: found.append(f"a dialog: {dialog.message}"))
    return found
