"""A real Chromium without a window, for the tests that look at pages."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import BrowserContext, ConsoleMessage, Page, Request, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000
"""Milliseconds that a page is waited for."""


def need_chromium() -> None:
    """Skip the test where there is no browser; fail where CI forgot to install one."""
    if CHROMIUM is None:
        said = "needs Chromium, on Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)


@asynccontextmanager
async def browser_page(*, is_attacked: bool = False, **options: Any) -> AsyncIterator[Page]:
    """A page of a new browser with the options of a context, such as `color_scheme`.

    A script that fails, an error in the console, or a resource from elsewhere fails the test, unless errors
    are what it wants to see: `is_attacked`.
    """
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            context = await browser.new_context(**options)
            context.set_default_timeout(PATIENCE)
            page = await context.new_page()
            wrong = complaints(context)
            yield page
            assert is_attacked or not wrong, wrong
        finally:
            await browser.close()


def complaints(context: BrowserContext) -> list[str]:
    """Return a growing list of errors in a context from now on; a page's answer of 401 is no error."""
    found: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error" and "401" not in message.text:
            found.append(message.text)

    def on_request(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:")):
            found.append(f"asked for {request.url}")

    context.on("console", on_console)
    context.on("request", on_request)
    context.on("weberror", lambda error: found.append(str(error.error)))
    context.on("dialog", lambda dialog: found.append(f"a dialog: {dialog.message}"))
    return found
