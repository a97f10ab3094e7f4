"""Slots over HTTP: who takes one, who is refused, and what a refusal costs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ratelimit_mw import Limiter, RateLimitMiddleware
from tests.support.asgi import FakeClock, client_of, limiter_of, settings_of, start_of
from tests.support.servers import StoreServer, server_binaries
from tests.support.slots import until_async
from tests.support.statuses import counted

SETTINGS = """
[application]
concurrent = 4
[plans.default]
requests = ["100/minute"]
concurrent = { limit = 3, unit = "prediction" }
[plans.few]
requests = ["2/minute"]
concurrent = 5
[[keys]]
key = "few"
plan = "few"
[[keys]]
key = "one"
plan = "default"
concurrent = { limit = 1, unit = "job" }
[[routes]]
path = "/quick"
slot = false
"""


class Bench:
    """An app whose handlers wait until they may go."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.inside = 0
        self.open = asyncio.Event()
        routes = [Route("/{rest:path}", self.handle)]
        self.app = RateLimitMiddleware(Starlette(routes=routes), limiter=limiter)

    async def handle(self, request: Request) -> PlainTextResponse:
        """Answer at once on a route without slots, else when the door is open."""
        self.inside += 1
        try:
            if request.url.path != "/quick":
                await self.open.wait()
        finally:
            self.inside -= 1
        return PlainTextResponse("ok")

    async def get(self, key: str, path: str = "/") -> httpx.Response:
        """Ask, and wait for the answer."""
        async with client_of(self.app, x_api_key=key) as client:
            return await client.get(path)

    @asynccontextmanager
    async def busy(self, key: str, number: int) -> AsyncIterator[None]:
        """Have so many more requests of a key inside their handlers."""
        before = self.inside
        tasks = [asyncio.create_task(self.get(key)) for _ in range(number)]
        await until_async(lambda: self.inside == before + number)
        yield
        self.open.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * number
        self.open.clear()


@pytest.fixture(params=["memory", *sorted(server_binaries())])
async def bench(
    request: pytest.FixtureRequest, shared_server: Callable[[str], StoreServer]
) -> AsyncIterator[Bench]:
    """The app on each kind of backend."""
    url = "memory://" if request.param == "memory" else shared_server(request.param).url
    async with Limiter(settings_of(f'{SETTINGS}[backend]\nurl = "{url}"\ntimeout = 5\n')) as limiter:
        yield Bench(limiter)


async def test_a_caller_without_a_free_slot_is_told_so(bench: Bench) -> None:
    """Status, code, figures and the unit's noun; when to come back; `X-RateLimit-*` are those of the rate."""
    async with bench.busy("a", 3):
        answer = await bench.get("a")
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 3
        assert 1000 <= int(answer.headers["retry-after-ms"]) <= 3000
        assert answer.headers["x-ratelimit-limit"] == "100"
        assert answer.headers["x-ratelimit-remaining"] == "97"
        wait = int(answer.headers["retry-after"])
        assert answer.json()["error"] == {
            "type": "rate_limit_error",
            "code": "CONCURRENT_LIMIT_EXCEEDED",
            "message": "Concurrent prediction limit exceeded. 3/3 predictions running.",
            "details": {"limit": 3, "active": 3, "retry_after": wait},
        }


async def test_refused_by_a_slot_costs_no_rate(bench: Bench) -> None:
    """Ten refusals later as much of the rate is left as before."""
    async with bench.busy("a", 3):
        for _ in range(10):
            assert (await bench.get("a")).status_code == 429
        answer = await bench.get("a", "/quick")
    assert answer.headers["x-ratelimit-remaining"] == "96"


async def test_refused_by_a_rate_takes_no_slot(bench: Bench) -> None:
    """With the rate used up, refusals leave every slot to those who have rate left."""
    for _ in range(2):
        assert (await bench.get("few", "/quick")).status_code == 200
    for _ in range(10):
        answer = await bench.get("few")
        assert answer.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    async with bench.busy("a", 3):
        assert bench.inside == 3


async def test_a_route_without_slots_takes_none(bench: Bench) -> None:
    """It is served while all slots are taken, and takes none from the others."""
    async with bench.busy("a", 3):
        for _ in range(5):
            assert (await bench.get("a", "/quick")).status_code == 200
        assert (await bench.get("a")).status_code == 429


async def test_a_key_may_have_slots_of_its_own(bench: Bench) -> None:
    """In place of its plan's, with a noun of its own."""
    async with bench.busy("one", 1):
        error = (await bench.get("one")).json()["error"]
        assert error["message"] == "Concurrent job limit exceeded. 1/1 job running."


async def test_slots_of_the_application_are_shared_by_all(bench: Bench) -> None:
    """Refused for want of them, a caller keeps its own slot and its rate, and is not told the figures."""
    async with bench.busy("a", 3), bench.busy("b", 1):
        answer = await bench.get("b")
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "CAPACITY_EXCEEDED"
        assert set(answer.json()["error"]["details"]) == {"retry_after"}
        assert answer.headers["x-ratelimit-remaining"] == "99"
    async with bench.busy("b", 3):
        assert bench.inside == 3


async def test_callers_do_not_take_each_others_slots(bench: Bench) -> None:
    """Each key has its own."""
    async with bench.busy("a", 3):
        assert (await bench.get("a")).status_code == 429
        assert (await bench.get("b", "/quick")).status_code == 200
        async with bench.busy("b", 1):
            assert bench.inside == 4


async def test_waits_are_spread(bench: Bench) -> None:
    """Callers refused together are not sent back together."""
    async with bench.busy("a", 3):
        answers = await asyncio.gather(*[bench.get("a") for _ in range(50)])
    waits = {int(answer.headers["retry-after-ms"]) for answer in answers}
    assert len(waits) > 40
    assert max(waits) - min(waits) > 1000
    assert {answer.headers["retry-after"] for answer in answers} <= {"1", "2", "3"}


async def test_what_has_expired_is_not_told_as_active() -> None:
    """In memory a slot that nobody renewed is gone for whoever looks: over HTTP, in code, in a peek."""
    clock = FakeClock()
    limiter = limiter_of("plans.default.concurrent = {limit = 9, lease = 30}", clock)
    told: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.extend(counted(each) for each in scope["state"]["ratelimit"].decision.limits)
        await PlainTextResponse("ok")(scope, receive, send)

    for _ in range(3):
        await limiter.acquire(api_key="k")
    clock.set(30)
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
    for _ in range(2):
        await start_of(RateLimitMiddleware(app, limiter=limiter), b"k")
        told += [counted(each) for each in (await limiter.engine.peek(policy)).limits]
    told += [counted(each) for each in (await limiter.acquire(api_key="k")).decision.limits]
    assert told == [1, 0, 1, 0, 1]
