"""Checks of a page by axe-core: what somebody with a screen reader or weak eyes could not use."""

import os
from importlib.resources import files

import pytest
from playwright.async_api import Page

try:
    AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
except ModuleNotFoundError:
    AXE = ""


def need_axe() -> None:
    """Skip the test where axe-core is not installed; fail where CI forgot it."""
    if not AXE:
        said = "needs axe-core: pip install axe-playwright-python"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)


async def violations(page: Page) -> list[str]:
    """Everything that axe finds wrong with a page as it is now, each with the elements."""
    await page.evaluate(AXE)
    found = await page.evaluate("axe.run()")
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]
