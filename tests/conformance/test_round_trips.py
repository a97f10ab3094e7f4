"""Calls and commands that a request costs: exact counts, where a timing would only be an opinion."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.redis.backlog import MAX_BATCH
from ratelimit_mw._internal.backends.redis.batcher import IN_FLIGHT
from tests.support.servers import StoreServer

SECRET = "a secret of some length, for tests alone"
Ask = Callable[..., Any]


class Calls:
    """Calls of a server since the last `reset`."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def reset(self) -> None:
        """Count from here."""
        self._client.config_resetstat()

    def __call__(self) -> dict[str, int]:
        """Calls by command, those of this class left out. Commands inside a script count, too."""
        stats: dict[str, Any] = self._client.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
        return {
            name: number for name, number in calls.items() if name.split("|")[0] not in ("info", "config")
        }


@pytest.fixture
def calls(server: StoreServer) -> Iterator[Calls]:
    """Counts what the server is asked."""
    with server.client() as client:
        yield Calls(client)


@pytest.fixture
async def limiter(server: StoreServer) -> AsyncIterator[Limiter]:
    """Two windows and slots for each caller, an exempt route and one without a slot; connected."""
    settings = Settings.model_validate(
        {
            "backend": {"url": server.url, "timeout": 5.0},
            "identity": {"hash_secret": SECRET},
            "plans": {
                "default": {"requests": ["1000/minute", "5000/hour"], "concurrent": {"limit": 500}},
                "anonymous": {"requests": ["2/hour"]},
            },
            "routes": [{"path": "/free", "exempt": True}, {"path": "/plain", "slot": False}],
        }
    )
    async with Limiter(settings) as limiter:
        # The first call brings the script along.
        async with await limiter.acquire(api_key="warm", path="/x"):
            pass
        await _arrived(limiter)
        # The figures that are reported each second take calls of their own.
        await limiter.engine.live._upkeep.stop()
        yield limiter


@pytest.fixture
async def ask(limiter: Limiter) -> AsyncIterator[Ask]:
    """Sends requests to an app behind the middleware."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = RateLimitMiddleware(Starlette(routes=[Route("/{rest:path}", answer)]), limiter=limiter)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def get(path: str, key: str | None = "key") -> int:
            headers = {} if key is None else {"X-API-Key": key}
            return (await client.get(path, headers=headers)).status_code

        yield get


async def _arrived(limiter: Limiter) -> None:
    """Wait for a release that nobody waits for: what is sent after it is answered after it."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="later"), "GET", "/x")
    await limiter.engine.peek(policy)


async def test_a_request_without_a_slot_is_one_call(calls: Calls, ask: Ask) -> None:
    """All its limits are decided in one round trip, and there is nothing to release."""
    calls.reset()
    for _ in range(20):
        assert await ask("/plain") == 200
    assert calls()["evalsha"] == 20


async def test_a_request_with_a_slot_is_two_calls_at_most(calls: Calls, ask: Ask, limiter: Limiter) -> None:
    """One to be admitted and one to be released, which rides along with whatever comes next."""
    calls.reset()
    for _ in range(20):
        assert await ask("/x") == 200
    await _arrived(limiter)
    assert calls()["evalsha"] <= 2 * 20 + 1


async def test_concurrent_requests_share_their_calls(calls: Calls, ask: Ask, limiter: Limiter) -> None:
    """So many at once leave in batches: far fewer calls than requests, however many callers there are."""
    calls.reset()
    number = 4 * MAX_BATCH
    assert set(await asyncio.gather(*[ask("/x", f"key-{n}") for n in range(number)])) == {200}
    await _arrived(limiter)
    # Each way in full batches, and the few that are on their way while the others gather.
    assert calls()["evalsha"] <= 2 * (number // MAX_BATCH + 2 * IN_FLIGHT)


async def test_commands_of_a_first_request(calls: Calls, limiter: Limiter) -> None:
    """Each window is read and written once, a new slot set counted, filled and given its life."""
    calls.reset()
    await limiter.acquire(api_key="new", path="/x")
    assert calls() == {
        "evalsha": 1,
        "time": 1,
        "getrange": 2,
        "set": 2,
        "zcard": 1,
        "zadd": 1,
        "pexpire": 1,
    }


async def test_commands_of_a_later_request(calls: Calls, limiter: Limiter) -> None:
    """A window costs two commands, a slot set that is in use three; its release is one, without a script."""
    await limiter.acquire(api_key="new", path="/x")
    lease = await limiter.acquire(api_key="new", path="/x")
    calls.reset()
    await limiter.acquire(api_key="new", path="/x")
    assert calls() == {
        "evalsha": 1,
        "time": 1,
        "getrange": 2,
        "setrange": 2,
        "zcard": 1,
        "zadd": 1,
        "pttl": 1,
    }
    calls.reset()
    await lease.release()
    assert calls() == {"zrem": 1}


async def test_requests_of_one_caller_in_one_batch_share_their_commands(calls: Calls, ask: Ask) -> None:
    """The keys of a busy caller are read once and written once in a batch, not once for each request."""
    await ask("/plain")
    calls.reset()
    number = 2 * MAX_BATCH
    assert set(await asyncio.gather(*[ask("/plain") for _ in range(number)])) == {200}
    counted = calls()
    batches = counted["evalsha"]
    assert batches <= number // MAX_BATCH + 2 * IN_FLIGHT
    assert counted["getrange"] <= 3 * batches
    assert counted.get("setrange", 0) + counted.get("set", 0) <= 4 * batches


async def test_an_exempt_request_asks_nothing(calls: Calls, ask: Ask) -> None:
    """A request that no limit holds for costs the backend nothing."""
    calls.reset()
    for _ in range(5):
        assert await ask("/free") == 200
    assert calls() == {}


async def test_a_refused_caller_is_asked_about_once(calls: Calls, ask: Ask) -> None:
    """A refused caller that goes on is answered from memory; other callers are not."""
    assert [await ask("/plain", None) for _ in range(3)] == [200, 200, 429]
    calls.reset()
    for _ in range(20):
        assert await ask("/plain", None) == 429
    assert calls() == {}
    assert await ask("/plain") == 200
    assert calls()["evalsha"] == 1
