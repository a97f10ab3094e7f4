"""Cancelled at any await point, from acquire to release: no slot stays, and none is freed twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest
from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.asgi import settings_of
from tests.support.servers import StoreServer
from tests.support.slots import held, until_async
from tests.support.statuses import budget_status, counted

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
url = "{url}"
timeout = 5
[plans.default]
requests = ["100000/minute"]
concurrent = {{ limit = 1000, lease = 600 }}
spending = {{ daily = "1000.00" }}
[[routes]]
path = "/{{rest:path}}"
price = "1.00"
"""
PLAIN = """
[backend]
url = "{url}"
timeout = 5
[plans.default]
requests = ["100000/minute"]
concurrent = {{ limit = 1000, lease = 600 }}
"""
"""Limits of requests that take the shortest way."""
SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-api-key", b"a")]}


class Run:
    """One limiter, the middleware over it, and what came of the requests."""

    def __init__(self, server: StoreServer, settings: str = SETTINGS) -> None:
        self.server = server
        self.limiter = Limiter(settings_of(settings.format(url=server.url)))
        self.middleware = RateLimitMiddleware(self.app, limiter=self.limiter)
        self.entered = 0
        self.left = 0
        self.finished: list[bytes] = []
        finish = self.limiter.engine.backend.finish

        def watched(reservation: Reservation, action: EstimateAction) -> Any:
            self.finished.append(reservation.id)
            return finish(reservation, action)

        self.limiter.engine.backend.finish = watched  # type: ignore[method-assign]

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Await a little, and answer."""
        self.entered += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})
        finally:
            self.left += 1

    def request(self) -> "asyncio.Task[None]":
        """Start a request."""
        return asyncio.create_task(self.middleware(dict(SCOPE), _receive, _send))

    async def balanced(self) -> None:
        """Nothing is held, nothing freed twice, and no more spent than requests that ran to their end."""
        await until_async(lambda: held(self.server) == 0)
        assert len(set(self.finished)) == len(self.finished)
        policy = self.limiter.engine.policies.match(self.limiter.engine.identity_of(api_key="a"), "GET", "/")
        limit_statuses = (await self.limiter.engine.peek(policy)).limits
        spent, money_held, _ = budget_status(limit_statuses[-1].status)
        assert money_held == 0
        assert spent <= self.left * 1_000_000
        assert counted(limit_statuses[0]) == self.entered


@pytest.fixture
async def run(server: StoreServer) -> AsyncIterator[Run]:
    """A limiter on each kind of server, closed at the end."""
    run = Run(server)
    async with run.limiter:
        yield run


async def _receive() -> Message:
    await asyncio.sleep(0)
    return {"type": "http.request", "body": b""}


async def _send(message: Message) -> None:
    await asyncio.sleep(0)


async def test_cancelled_after_any_number_of_turns(run: Run) -> None:
    """Whenever a request is cancelled, and again while it ends, its slot and its price come back."""
    for turns in range(60):
        for again in (False, True):
            task = run.request()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            if again:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert 0 < run.entered < 120, "some were cancelled before the handler, and some were not"
    await run.balanced()


async def test_cancelled_just_as_the_answer_came(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request cancelled in the very turn in which it was admitted gives everything back."""
    task: asyncio.Task[None] | None = None

    class Answer(asyncio.Future[Any]):
        """Cancels the request that awaits it, as soon as it is there."""

        def set_result(self, result: object) -> None:
            super().set_result(result)
            if task is not None and getattr(task, "_fut_waiter", None) is self:
                task.cancel()

    monkeypatch.setattr("ratelimit_mw._internal.backends.redis.loops.Future", Answer)
    task = run.request()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.entered == 0
    await run.balanced()


def _thrown(request: Coroutine[Any, Any, object]) -> None:
    request.throw(asyncio.CancelledError())


def _closed(request: Coroutine[Any, Any, object]) -> None:
    request.close()


@pytest.mark.parametrize("settings", [SETTINGS, PLAIN])
@pytest.mark.parametrize("end", [_thrown, _closed])
async def test_ended_by_hand_while_the_backend_is_asked(
    server: StoreServer, settings: str, end: Callable[[Coroutine[Any, Any, object]], None]
) -> None:
    """An exception thrown into a request that awaits Redis comes out as it is, and the charge is undone."""
    run = Run(server, settings)
    async with run.limiter:
        for turns in range(3):
            request = run.middleware(dict(SCOPE), _receive, _send)
            request.send(None)  # to where it waits for its answer
            for _ in range(turns):
                await asyncio.sleep(0)
            with contextlib.suppress(asyncio.CancelledError):
                end(request)
        assert run.entered == 0
        await until_async(lambda: held(server) == 0)
        lease = await run.limiter.acquire(api_key="a")
        assert counted(lease.decision.limits[0]) == 1


async def test_cancelled_while_others_share_its_batch(run: Run) -> None:
    """Cancelling half of the requests that left together neither harms nor frees the other half."""
    tasks = [run.request() for _ in range(40)]
    for _ in range(3):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results[1::2] if result is not None] == []
    await run.balanced()


@pytest.mark.parametrize(
    "scope", [lambda: anyio.move_on_after(0.001), lambda: anyio.CancelScope(deadline=-1)]
)
async def test_cancelled_by_a_scope_of_anyio(run: Run, scope: Callable[[], anyio.CancelScope]) -> None:
    """A cancel scope, which cancels again at every await inside it, leaves nothing held."""
    for _ in range(20):
        with scope():
            await run.middleware(dict(SCOPE), _receive, _send)
            await anyio.sleep(10)
    await run.balanced()


async def test_release_is_cancelled(run: Run) -> None:
    """A handler cancelled while it releases by hand has released; the end of its request frees no more."""
    for turns in range(12):
        lease = await run.limiter.acquire(api_key="a")
        release = asyncio.create_task(lease.release())
        for _ in range(turns):
            await asyncio.sleep(0)
        release.cancel()
        await asyncio.gather(release, return_exceptions=True)
        run.limiter.engine.leases.end(lease, failed=True)
        run.entered += 1
    await until_async(lambda: held(run.server) == 0)


async def test_detach_is_cancelled(run: Run) -> None:
    """A handler cancelled while it detaches holds the slot for the ttl, or not at all; never for ever."""
    for turns in range(12):
        lease = await run.limiter.acquire(api_key="a")
        detach = asyncio.create_task(lease.detach(ttl=0.2))
        for _ in range(turns):
            await asyncio.sleep(0)
        detach.cancel()
        await asyncio.gather(detach, return_exceptions=True)
        run.limiter.engine.leases.end(lease, failed=True)
    await until_async(lambda: held(run.server) == 0)
