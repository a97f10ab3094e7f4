"""Suites of users: the one of docs/testing.md, and one on a real Redis, with warnings as errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.apps import ROOT
from tests.support.servers import StoreServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
ABOUT_HTTPX = "Using `httpx` with"
"""Start of Starlette's advice to take another client, which is nothing of ours."""

ON_REDIS = """
import os
import pytest
import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from ratelimit_mw import RateLimitMiddleware, Settings
from ratelimit_mw.testing import fresh

async def ok(request):
    return PlainTextResponse("ok")

backend = {"url": os.environ["REDIS_URL"], "timeout": 5}
plans = {"anonymous": {"requests": ["3/minute"], "concurrent": 2}}
app = Starlette(routes=[Route("/", ok)])
settings = Settings.model_validate({"backend": backend, "plans": plans})
app.add_middleware(RateLimitMiddleware, settings=settings)

IN_MEMORY = pytest.mark.parametrize("in_memory", [True, False, False])

@IN_MEMORY
def test_without_lifespan(in_memory):
    with fresh(app, in_memory=in_memory):
        client = TestClient(app)
        assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]

@IN_MEMORY
def test_with_lifespan(in_memory):
    with fresh(app, in_memory=in_memory), TestClient(app) as client:
        assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
    with TestClient(app) as client, fresh(app, in_memory=in_memory):
        assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]

@IN_MEMORY
@pytest.mark.asyncio
async def test_with_httpx(in_memory):
    with fresh(app, in_memory=in_memory):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            assert [(await client.get("/")).status_code for _ in range(4)] == [200, 200, 200, 429]
"""


WITH_ASYNC_FIXTURES = """
import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from ratelimit_mw import RateLimitMiddleware, Settings

pytest_plugins = ["ratelimit_mw.testing"]

async def ok(request):
    return PlainTextResponse("ok")

made = Starlette(routes=[Route("/", ok)])
settings = Settings.model_validate({"plans": {"anonymous": {"requests": ["1/minute"]}}})
made.add_middleware(RateLimitMiddleware, settings=settings)

@pytest_asyncio.fixture
async def app():
    return made

@pytest_asyncio.fixture
async def client(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client

@pytest.mark.asyncio
@pytest.mark.parametrize("time", [1, 2])
async def test_fresh(client, fresh, time):
    assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]

@pytest.mark.asyncio
async def test_disabled(client, disabled):
    assert [(await client.get("/")).status_code for _ in range(3)] == [200] * 3

@pytest.mark.usefixtures("fresh")
class TestThem:
    @pytest.mark.asyncio
    @pytest.mark.parametrize("time", [1, 2])
    async def test_it(self, client, time):
        assert (await client.get("/")).status_code == 200
"""


def run(folder: Path, **environment: str) -> str:
    """Run the suite in a folder in a pytest of its own, with warnings as errors; return its output."""
    options = ["-X", "dev", "-m", "pytest", "-W", "error", "-W", f"ignore:{ABOUT_HTTPX}"]
    plugins = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-v",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
    ]
    done = subprocess.run(
        [sys.executable, *options, *plugins, "."],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    return done.stdout


def test_the_suite_of_the_page_passes(tmp_path: Path) -> None:
    """The examples of docs/testing.md are a suite that passes as it is printed, without any Redis."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for block in blocks:
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else "test_plain.py")).write_text(block, encoding="utf-8")
    output = run(tmp_path)
    for test in re.findall(r"def (test_\w+)", PAGE):
        assert re.search(rf"{test}\b.* PASSED", output), test


def test_fixtures_of_an_app_may_be_async(tmp_path: Path) -> None:
    """The fixtures work on an `app` that is an async fixture, in functions and for a whole class."""
    (tmp_path / "test_app.py").write_text(WITH_ASYNC_FIXTURES, encoding="utf-8")
    assert "5 passed" in run(tmp_path)


def test_counts_are_fresh_on_redis_too(tmp_path: Path, redis_server: StoreServer) -> None:
    """Blocks count in Redis, in a namespace of their own, if a test wants that, and close what they open."""
    (tmp_path / "test_app.py").write_text(ON_REDIS, encoding="utf-8")
    assert "9 passed" in run(tmp_path, REDIS_URL=redis_server.url)
    with redis_server.client() as client:
        names = {bytes(name).split(b":")[0] for name in client.scan_iter(count=10_000)}
    assert len([name for name in names if re.fullmatch(rb"ratelimit-[0-9a-f]{8}", name)]) >= 2, names
    assert b"ratelimit" not in names
