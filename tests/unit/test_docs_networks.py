"""The page on networks and blocks: its settings, run as they are printed."""

import json
import re
import tomllib

import pytest

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from tests.support.apps import ROOT
from tests.support.asgi import client_of, ok_app

PAGE = (ROOT / "docs" / "networks.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("address", "plan"),
    [
        ("10.20.1.1", "office"),
        ("10.1.1.1", "internal"),
        ("2001:db8:7::1", "office"),
        ("192.0.2.1", "anonymous"),
    ],
)
def test_networks_have_the_plans_of_the_page(address: str, plan: str) -> None:
    """The example's networks overlap as the page says."""
    settings = Settings(**tomllib.loads(blocks("toml")[0]))
    assert Limiter(settings).engine.identify.of_address(address).plan == plan


async def test_a_block_answers_as_the_page_says() -> None:
    """Status, headers and body are those that are printed."""
    settings = Settings(**tomllib.loads(blocks("toml")[1]))
    (printed,) = blocks("http")
    head, _, body = printed.partition("\n\n")
    status, *headers = head.splitlines()
    app = RateLimitMiddleware(ok_app(), settings=settings)
    callers = [("192.0.2.7", ""), ("2001:db8:bad:1::1", "good"), ("198.51.100.1", "stolen")]
    for address, api_key in callers:
        async with client_of(app, address=address, x_api_key=api_key) as client:
            response = await client.get("/")
        assert f"HTTP/1.1 {response.status_code} {response.reason_phrase}" == status
        assert [
            f"{name}: {response.headers[name]}" for name in ("cache-control", "x-should-retry")
        ] == headers
        assert response.json() == json.loads(body)
