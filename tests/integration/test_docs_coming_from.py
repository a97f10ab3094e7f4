"""The page "Coming from another limiter": its apps before and after, run as they are printed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from ratelimit_mw import Limiter, Settings
from ratelimit_mw.testing import fresh
from tests.support.apps import ROOT
from tests.support.asgi import client_of, shown, statuses
from tests.support.pages import MakeModule, modules_of, write_settings

pytestmark = pytest.mark.rerun

PAGE = (ROOT / "docs" / "coming-from.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings of the page, in the working folder."""
    file = write_settings(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return file


@pytest.fixture
def page() -> Iterator[MakeModule]:
    """Modules of the page, made by name."""
    with modules_of(PAGE) as module:
        yield module


@pytest.mark.parametrize("name", ["before", "after"])
async def test_the_app_before_and_after(page: MakeModule, name: str) -> None:
    """Both refuse the sixth search of a minute, and nobody's health check."""
    async with client_of(page(name).app) as client:
        assert await statuses(client, 6, "/search") == [200] * 5 + [429]
        assert await statuses(client, 70, "/health") == [200] * 70


async def test_limits_that_stay_in_code(page: MakeModule) -> None:
    """Decorators and dependencies become limits in code: of one route, of several, and of a router."""
    app = page("in_code").app
    async with client_of(app, x_tenant="acme") as client:
        assert await statuses(client, 6, "/find") == [200] * 5 + [429]
        assert await statuses(client, 2, "/reports/daily") == [200, 200]
        assert await statuses(client, 2, "/reports/weekly") == [200, 429]
        assert await statuses(client, 3, "/users") == [200, 200, 429]
    async with client_of(app, x_tenant="globex") as client:
        assert await statuses(client, 1, "/reports/daily") == [200]


async def test_default_limits_of_each_route(page: MakeModule) -> None:
    """Each route of the router has its own count, one outside only its limits, and each URL where told."""
    async with client_of(page("per_route").app, x_api_key="a") as client:
        assert await statuses(client, 4, "/books") == [200] * 3 + [429]
        assert await statuses(client, 4, "/films") == [200] * 3 + [429]
        assert await statuses(client, 11, "/export") == [200] * 10 + [429]
        assert await statuses(client, 3, "/items/1") == [200, 200, 429]
        assert await statuses(client, 3, "/items/2") == [200, 200, 429]
        refused = await client.get("/books")
    assert refused.json()["error"] == "slow down"
    assert 0 < refused.json()["wait"] <= 60
    async with client_of(page("per_route").app, x_api_key="b") as client:
        assert await statuses(client, 2, "/items/1") == [200, 200]


async def test_late_limits(page: MakeModule) -> None:
    """Keys of the handler and failures are counted as the rows say, and the app's own handler answers."""
    late = page("late")
    async with client_of(late.app, x_api_key="a") as client:
        answers = [await client.post("/mail/ann") for _ in range(6)]
        assert [each.status_code for each in answers] == [200] * 5 + [429]
        assert 0 < answers[-1].json()["wait"] <= 60
        assert await statuses(client, 1, "/mail/bob", "POST") == [200]
        for password, expected in [("right", [200] * 4), ("no", [401] * 3 + [429]), ("right", [429])]:
            path = f"/login/ann?password={password}"
            assert await statuses(client, len(expected), path, "POST") == expected
    assert await late.job("eve") == "sent"
    held = [await late.limiter.acquire(late.mails.on("eve")) for _ in range(5)]
    assert [lease.allowed for lease in held] == [True] * 4 + [False]


def test_messages_of_a_websocket(page: MakeModule) -> None:
    """Each message counts as a request of the caller would; the sixth is told to wait."""
    with (
        TestClient(page("late").app, headers={"x-api-key": "a"}) as client,
        client.websocket_connect("/messages") as websocket,
    ):
        for answer in ["found"] * 5 + ["slow down"]:
            websocket.send_text("")
            assert websocket.receive_text() == answer


async def test_both_side_by_side(page: MakeModule) -> None:
    """In shadow mode the old limiter alone refuses; with it off and the shadow gone, the new one does."""
    before = page("before")
    both = page("both").app
    async with client_of(both) as client:
        responses = [await client.get("/search") for _ in range(6)]
        assert [response.status_code for response in responses] == [200] * 5 + [429]
        assert "error" in responses[-1].json()
        assert "code" not in responses[-1].json()["error"]  # slowapi's own body
    assert [each for each in both.limiter.stats().totals if "shadow" in str(each)]
    before.limiter.enabled = False
    with fresh(both):
        both.limiter.apply(Settings.load("ratelimit.toml"))
        async with client_of(both) as client:
            responses = [await client.get("/search") for _ in range(6)]
    assert [response.status_code for response in responses] == [200] * 5 + [429]
    assert responses[-1].json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"


async def test_headers_of_the_old_limiter_stay(page: MakeModule) -> None:
    """Headers that slowapi sets are neither doubled nor replaced."""
    before = page("before")
    before.limiter._headers_enabled = True
    async with client_of(page("both").app) as client:
        response = await client.get("/anything")
    assert shown(response)[0] == "60"
    assert len(response.headers.get_list("x-ratelimit-limit")) == 1


async def test_the_worker_by_hand(page: MakeModule, settings_file: Path) -> None:
    """A user of the worker has the plan's sixty jobs of a minute."""
    limiter = Limiter(Settings.load(settings_file))
    answers = [await page("worker").may_send(limiter, "ann") for _ in range(61)]
    assert answers == [True] * 60 + [False]
