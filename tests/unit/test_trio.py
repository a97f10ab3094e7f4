"""Under trio, which has no event loop of asyncio's: one sentence says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from ratelimit_mw import Limiter, RateLimitMiddleware
from tests.support.asgi import FakeClock, limited, ok_app, settings_of
from tests.support.slots import until
from tests.unit.test_request_state import Hypercorn

SENTENCE = "ratelimit_mw needs an event loop of asyncio: run it with a server or a worker class for asyncio"


class Trio(Hypercorn):
    """Hypercorn with its workers for trio."""

    def command(self) -> list[str]:
        """Return the command with another class of workers."""
        return [*super().command(), "--worker-class", "trio"]

    def answers(self) -> bool:
        """It is not to serve: enough that it has said why."""
        return "ratelimit_mw" in self.log


@pytest.fixture
def hypercorn(tmp_path: Path) -> Iterator[Trio]:
    """Hypercorn on trio with an app behind the middleware."""
    server = Trio("tests.support.served:app", tmp_path)
    server.start()
    yield server
    server.kill()


def test_hypercorn_on_trio_does_not_start_and_says_why(hypercorn: Trio) -> None:
    """The start fails with the sentence, and not with the insides of asyncio."""
    until(lambda: not hypercorn.alive)
    assert SENTENCE in hypercorn.log
    assert "no running event loop" not in hypercorn.log


HOOKS: list[dict[str, Any]] = [{}, {"identify": lambda _: None}]


@pytest.mark.parametrize("hooks", HOOKS)
def test_without_lifespan_requests_are_answered(
    hooks: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each request is answered 503 if no lifespan could fail, and the log says why, once."""
    app = limited("", FakeClock(), **hooks)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return [(await client.get("/")).status_code for _ in range(3)]

    assert trio.run(ask) == [503] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"the settings can't be used, so every request is answered 503: {SENTENCE}"
    ]


def test_lifespan_fails_with_the_sentence() -> None:
    """A server is told nothing but the sentence at the start."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    trio.run(RateLimitMiddleware(ok_app()), {"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.failed", "message": SENTENCE}]


def test_a_limiter_says_so_too() -> None:
    """By hand it is an error with the same sentence."""
    limiter = Limiter(settings_of(""))

    async def opened() -> None:
        async with limiter:
            pass

    async def asked() -> None:
        await limiter.acquire(api_key="a")

    for used in (opened, asked):
        with pytest.raises(RuntimeError, match=SENTENCE):
            trio.run(used)
