"""Jobs in processes of their own, which are told to stop, are killed, and get tokens from anywhere."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import LeaseError, Limiter, RateLimitMiddleware
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.asgi import settings_of
from tests.support.servers import StoreServer
from tests.support.slots import ask, expiries, held, slots_on_server, until, until_async

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
url = "{url}"
timeout = 5
[identity]
hash_secret = "secret"
[plans.default]
concurrent = {{ limit = 2, unit = "prediction", lease = 1 }}
spending = {{ daily = "1.00" }}
[[routes]]
path = "/{{rest:path}}"
price = "0.10"
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python process, which is gone at the end of the test."""
    with ExitStack() as stack:

        def start(*arguments: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(_end, process)
            return process

        yield start


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def settings(redis_server: StoreServer, tmp_path: Path) -> Path:
    """A settings file for all processes."""
    file = tmp_path / "ratelimit.toml"
    file.write_text(SETTINGS.format(url=redis_server.url))
    return file


async def spent(settings: Path) -> tuple[int, int]:
    """Return the amounts that the key `a` has spent and holds, in micro-units."""
    async with Limiter.from_settings(settings) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
        limit_statuses = (await limiter.engine.peek(policy)).limits
        return limit_statuses[-1].status[:2]


async def token_of(port: int) -> str:
    """Ask the app for a job's token; the request ends below 400."""
    answer = await ask(port, "GET", "/detach/60")
    assert answer.status == 202
    return str(json.loads(answer.body)["token"])


async def test_jobs_in_processes_of_their_own(
    start_app: StartApp, start: Start, settings: Path, redis_server: StoreServer, tmp_path: Path
) -> None:
    """Settled from two processes at once, resumed in a third which is killed: counted once, freed in time."""
    app = start_app("tests.support.slot_app:app", environment={"RATELIMIT_SETTINGS": str(settings)})
    token = await token_of(app.port)
    assert held(redis_server) == 1
    worker = start("tests.support.job_worker", str(settings), "resume", token, "60")
    settling = [start("tests.support.job_worker", str(settings), "settle", token, "0.031") for _ in range(2)]
    late = start("tests.support.job_worker", str(settings), "release", token)
    late.send_signal(signal.SIGSTOP)  # a worker of the past, which wakes up when all is over
    assert line_of(worker) == "resumed"
    assert [line_of(process) for process in settling] == ["done", "done"]
    assert await spent(settings) == (31_000, 0)
    await asyncio.sleep(1.5)
    assert held(redis_server) == 1, "renewed by its worker, past the lease"
    worker.kill()
    worker.wait()
    assert max(expiries(redis_server), default=0) <= 1.0
    took = until(lambda: held(redis_server) == 0)
    second = await token_of(app.port)
    late.send_signal(signal.SIGCONT)
    assert line_of(late) == "done"
    assert held(redis_server) == 1, "the token of a job that is over frees nobody's slot"
    async with Limiter.from_settings(settings) as limiter:
        with pytest.raises(LeaseError, match="damaged, forged"):
            await limiter.release(second[:-6] + "AAAAAA")
        await limiter.release(second)
    assert held(redis_server) == 0
    print(f"the slot of a killed job worker came back after {took:.2f} s of a lease of 1 s")  # noqa: T201


async def test_a_creator_killed_after_it_detached_holds_nothing_beyond_the_ttl(
    start_app: StartApp, settings: Path, redis_server: StoreServer
) -> None:
    """Nobody ever heard of the token: the slot is free when its ttl has passed, and its estimate stays."""
    app = start_app("tests.support.slot_app:app", environment={"RATELIMIT_SETTINGS": str(settings)})
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        await ask(app.port, "GET", "/die")
    (left,) = expiries(redis_server)
    assert left <= 1.0
    until(lambda: held(redis_server) == 0)
    assert await spent(settings) == (0, 100_000)


async def test_jobs_that_an_app_ends_in_its_own_shutdown_are_freed(redis_server: StoreServer) -> None:
    """An app with workers of its own stops them after our middleware has closed: that arrives, too."""
    limiter = Limiter(settings_of(SETTINGS.format(url=redis_server.url)))
    lease = await limiter.acquire(api_key="a")
    token = await lease.detach(ttl=600)

    async def job() -> None:
        async with limiter.resume(token):
            await asyncio.sleep(60)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(job())
        await asyncio.sleep(0.05)
        yield
        task.cancel()
        await asyncio.wait([task])

    held_at_the_end = await _shut_down(
        RateLimitMiddleware(Starlette(lifespan=lifespan), limiter=limiter), lambda: held(redis_server)
    )
    assert held_at_the_end == 0


@pytest.mark.parametrize("knows", ["raises", "returns"])
async def test_an_app_without_a_lifespan_is_closed_all_the_same(
    redis_server: StoreServer, knows: str
) -> None:
    """Whether an app answers the lifespan by raising or by nothing, what it holds is freed at shutdown."""
    limiter = Limiter(settings_of(SETTINGS.format(url=redis_server.url)))
    started = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if knows == "raises":
                raise NotImplementedError
            return
        started.set()
        await asyncio.sleep(60)

    middleware = RateLimitMiddleware(app, limiter=limiter)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-api-key", b"a")]}
    request = asyncio.create_task(middleware(scope, _nothing, _nowhere))
    await started.wait()
    assert held(redis_server) == 1
    request.cancel()  # as uvicorn does past its grace period, just before it tells of the shutdown
    assert await _shut_down(middleware, lambda: held(redis_server)) == 0
    with pytest.raises(asyncio.CancelledError):
        await request


async def _nothing() -> Message:
    return {"type": "http.request"}


async def _nowhere(message: Message) -> None:
    return None


async def _shut_down(app: RateLimitMiddleware, look: Callable[[], int]) -> int:
    """Start and stop an app as a server does; what is held when it says that it is done."""
    messages = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []
    found = -1

    async def receive() -> Message:
        return {"type": next(messages)}

    async def send(message: Message) -> None:
        nonlocal found
        sent.append(message["type"])
        if message["type"] == "lifespan.shutdown.complete":
            found = look()

    await app({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    return found


async def test_the_predictions_example_end_to_end(
    start_app: StartApp, start: Start, redis_server: StoreServer
) -> None:
    """API, queue, worker, client: a slot is held from 202 to the last word, also across a killed worker."""
    environment = {
        "RATELIMIT_BACKEND__URL": redis_server.url,
        "RATELIMIT_BACKEND__TIMEOUT": "5",
        "RATELIMIT_IDENTITY__HASH_SECRET": "secret",
    }
    app = start_app("examples.predictions.api:app", environment=environment)
    prompts = ["one two three", "four five", "six seven", "eight nine"]
    client = start("examples.predictions.client", app.url, "alice", *prompts)
    refused = [line_of(client), line_of(client)]
    assert all("Concurrent prediction limit exceeded. 2/2 predictions running." in line for line in refused)
    assert held(redis_server) == 2, "they wait in the queue, their requests long over"
    killed = start("examples.predictions.worker", "worker-1", environment=environment)
    assert line_of(killed) == "worker-1 is ready"
    with redis_server.client() as redis:
        until(lambda: redis.llen("predictions:taken:worker-1") == 1)
        killed.kill()
        killed.wait()
        worker = start("examples.predictions.worker", "worker-1", environment=environment)
        output, _ = await asyncio.to_thread(client.communicate, timeout=180)
        done = {line for line in output.splitlines() if "succeeded" in line}
        assert done == {
            "'one two three': succeeded: three two one",
            "'four five': succeeded: five four",
            "'six seven': succeeded: seven six",
            "'eight nine': succeeded: nine eight",
        }
        await until_async(lambda: slots_on_server(redis_server) == 0)
        until(lambda: redis.llen("predictions:taken:worker-1") == 0)
    worker.terminate()
    assert await asyncio.to_thread(worker.wait, 10) == 0
    settings = settings_of(f'[backend]\nurl = "{redis_server.url}"\n[identity]\nhash_secret = "secret"\n')
    async with Limiter(settings.model_copy(update={"plans": _plans_of_the_example()})) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="alice"), "GET", "/")
        used, kept = (await limiter.engine.peek(policy)).limits[-1].status[:2]
    assert (used, kept) == (9_000, 0), "nine words were paid for, once, although a worker died"


def _plans_of_the_example() -> object:
    text = (ROOT / "examples" / "predictions" / "ratelimit.toml").read_text()
    return settings_of(text).plans
