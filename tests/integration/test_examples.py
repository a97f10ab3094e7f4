"""The examples, served by uvicorn and asked as their users would."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import websockets
import yaml

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.checks.plain import findings
from tests.conftest import StartApp
from tests.support.apps import ROOT, AppServer
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def example_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run the examples and yield their URLs, for all tests: each calls itself by another API key."""
    with ExitStack() as stack:
        urls = {}
        for name in ("fastapi_app", "starlette_app"):
            server = AppServer(f"examples.{name}:app", tmp_path_factory.mktemp(name))
            stack.callback(server.stop)
            server.start()
            urls[name] = server.url
        yield urls


@pytest.fixture
async def fastapi_example(example_urls: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the FastAPI example."""
    async with httpx.AsyncClient(base_url=example_urls["fastapi_app"]) as client:
        yield client


@pytest.fixture
async def starlette_example(example_urls: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the Starlette example."""
    async with httpx.AsyncClient(base_url=example_urls["starlette_app"]) as client:
        yield client


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_checks_find_nothing_in_an_example(path: Path) -> None:
    """Examples hold no settings without effect, no route that nobody can use, nothing that is warned of."""
    assert findings(Settings.load(path)) == ()


async def test_fastapi_example_limits_and_settles(fastapi_example: httpx.AsyncClient) -> None:
    """Predictions run at once up to the plan's slots, and both keys of an account draw on one count."""
    body = {"prompt": "one two three"}
    answers = await asyncio.gather(
        *(
            fastapi_example.post("/v1/predictions", json=body, headers={"X-API-Key": "alice"})
            for _ in range(7)
        )
    )
    assert Counter(answer.status_code for answer in answers) == {201: 5, 429: 2}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "CONCURRENT_LIMIT_EXCEEDED"
    first = await fastapi_example.post("/v1/batches", json=[body], headers={"X-API-Key": "demo-pro-1"})
    second = await fastapi_example.get("/v1/models", headers={"X-API-Key": "demo-pro-2"})
    assert first.json() == {"output": "eerht owt eno", "price": "0.003"}
    assert first.headers["X-RateLimit-Remaining"] == "990"
    assert second.headers["X-RateLimit-Remaining"] == "989"
    assert second.headers["RateLimit"].startswith('"1000/minute";r=989;t=')


async def test_fastapi_example_streams(fastapi_example: httpx.AsyncClient) -> None:
    """A stream arrives piece by piece, with the headers at its start."""
    body = {"prompt": "one two three", "seconds": 0.3}
    headers = {"X-API-Key": "dave"}
    async with fastapi_example.stream("POST", "/v1/streams", json=body, headers=headers) as answer:
        assert answer.headers["X-RateLimit-Remaining"] == "59"
        arrived = [time.monotonic() async for _ in answer.aiter_lines()]
    assert len(arrived) == 3
    assert arrived[-1] - arrived[0] > 0.1


async def test_fastapi_example_exempts_its_health(fastapi_example: httpx.AsyncClient) -> None:
    """The balancer's question is never limited and says nothing of limits."""
    answers = [await fastapi_example.get("/health") for _ in range(25)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[-1].headers if "ratelimit" in name]


async def test_fastapi_example_lets_browsers_read_refusals(fastapi_example: httpx.AsyncClient) -> None:
    """CORS headers are on a refusal, and a preflight is answered without being counted."""
    origin = {"Origin": "https://app.example.com"}
    preflight = {
        **origin,
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "X-API-Key",
    }
    assert (await fastapi_example.options("/v1/models", headers=preflight)).status_code == 200
    answers = [await fastapi_example.get("/v1/models", headers=origin) for _ in range(21)]
    assert [answer.status_code for answer in answers] == [200] * 20 + [429]
    assert answers[-1].headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert "X-RateLimit-Remaining" in answers[-1].headers["Access-Control-Expose-Headers"]


def test_fastapi_example_runs_as_it_is_deployed(start_app: StartApp, redis_server: StoreServer) -> None:
    """With the environment of docker-compose.yml two workers share counts, and trust the balancer."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    environment = dict(compose["services"]["app-1"]["environment"])
    environment |= {
        "RATELIMIT_BACKEND__URL": redis_server.url,
        "RATELIMIT_BACKEND__TIMEOUT": "5",
        "RATELIMIT_IDENTITY__HASH_SECRET": "a secret for this test",
        "RATELIMIT_IDENTITY__TRUSTED_PROXIES": '["127.0.0.1/32"]',
    }
    app = start_app("examples.fastapi_app:app", "--no-proxy-headers", workers=2, environment=environment)
    with httpx.Client(base_url=app.url, headers={"Connection": "close"}) as client:
        here = {"X-Forwarded-For": "203.0.113.9"}
        answers = [client.get("/v1/models", headers=here) for _ in range(21)]
        elsewhere = client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.10"})
        pro = client.get("/v1/models", headers={"X-API-Key": "demo-pro-1"})
    assert [answer.status_code for answer in answers] == [200] * 20 + [429]
    assert elsewhere.headers["X-RateLimit-Remaining"] == "19"
    assert pro.headers["X-RateLimit-Limit"] == "1000"


async def test_starlette_example_hands_slot_and_price_to_its_job(
    starlette_example: httpx.AsyncClient,
) -> None:
    """Two jobs hold both slots beyond their requests' answers; the third has to wait for one to end."""
    headers = {"Authorization": "Bearer bob"}
    created = [await starlette_example.post("/v1/jobs", content="abc", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in created] == [202, 202, 429]
    assert created[2].json()["error"]["message"] == "Concurrent job limit exceeded. 2/2 jobs running."
    job = f"/v1/jobs/{created[0].json()['id']}"
    give_up = time.monotonic() + 30
    while (await starlette_example.get(job, headers=headers)).json()["output"] != "cba":
        assert time.monotonic() < give_up
        await asyncio.sleep(0.1)
    assert (await starlette_example.post("/v1/jobs", headers=headers)).status_code == 202


async def test_starlette_example_limits_messages(starlette_example: httpx.AsyncClient) -> None:
    """Each message on a WebSocket is decided about, as the settings say for messages."""
    url = str(starlette_example.base_url).replace("http", "ws", 1)
    async with websockets.connect(f"{url}/v1/chat", additional_headers={"X-API-Key": "carol"}) as socket:
        for _ in range(5):
            await socket.send("abc")
        assert [await socket.recv() for _ in range(5)] == ["cba", "cba", "cba", "slow down", "slow down"]


def test_fastapi_example_goes_by_the_file_of_its_environment(start_app: StartApp, tmp_path: Path) -> None:
    """Its image takes settings of an operator, such as the config map of Kubernetes."""
    file = written(tmp_path / "ratelimit.toml", 'plans.anonymous.requests = ["1/minute"]')
    app = start_app("examples.fastapi_app:app", environment={"RATELIMIT_SETTINGS": str(file)})
    with httpx.Client(base_url=app.url) as client:
        assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 429]


def test_the_deployed_settings_list_no_hash() -> None:
    """The hash secret of a deployment is its own, so the example can list keys in the clear only."""
    text = (EXAMPLES / "fastapi_app.toml").read_text()
    assert "hash =" not in text
    assert Limiter.from_settings(EXAMPLES / "fastapi_app.toml").settings.keys
