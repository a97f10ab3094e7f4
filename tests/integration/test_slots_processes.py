"""Slots under many processes, and when processes are paused, stopped and killed."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import websockets

from tests.conftest import StartApp
from tests.support.apps import AppServer
from tests.support.servers import StoreServer
from tests.support.slots import (
    Answer,
    Client,
    Ledger,
    ask,
    expiries,
    held,
    slots_on_server,
    until,
    until_async,
)

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
timeout = 5
[plans.default]
concurrent = {{ limit = {limit}, unit = "prediction", lease = {lease} }}
[[routes]]
path = "/who"
slot = false
"""


class Served:
    """Workers on one server of slots, with a ledger."""

    def __init__(
        self, start_app: StartApp, server: StoreServer, folder: Path, *, limit: int = 5, lease: float = 30
    ) -> None:
        self.server = server
        self.ledger = Ledger(folder / "ledger")
        self.gate = folder / "gate"
        settings = folder / "ratelimit.toml"
        settings.write_text(SETTINGS.format(limit=limit, lease=lease))
        self.environment = {
            "RATELIMIT_SETTINGS": str(settings),
            "RATELIMIT_BACKEND__URL": server.url,
            "LEDGER": str(self.ledger.path),
            "GATE": str(self.gate),
        }
        self._start_app = start_app

    def start(self, *arguments: str, workers: int = 1) -> AppServer:
        """Start an app on it; there may be several."""
        return self._start_app(
            "tests.support.slot_app:app", *arguments, workers=workers, environment=self.environment
        )

    def held(self) -> int:
        """Slots held right now."""
        return held(self.server)


Serve = Callable[..., Served]


@pytest.fixture(autouse=True)
async def no_client_stays() -> AsyncIterator[None]:
    """Connections that a test leaves open are cut at its end."""
    yield
    Client.close_all()


@pytest.fixture
def serve(start_app: StartApp, redis_server: StoreServer, tmp_path: Path) -> Serve:
    """Serve the app on Redis, with other settings as the test says."""
    return lambda **limits: Served(start_app, redis_server, tmp_path, **limits)


async def busy(app: AppServer, number: int, path: str, ledger: Ledger) -> list[Client]:
    """So many clients whose requests are inside the handler."""
    before = ledger.entered()
    clients = [await Client.connect(app.port) for _ in range(number)]
    for client in clients:
        client.send("GET", path)
    await until_async(lambda: ledger.entered() == before + number)
    return clients


async def test_200_at_once_for_5_slots_from_2_workers(
    start_app: StartApp, server: StoreServer, tmp_path: Path
) -> None:
    """In every round exactly 5 of 200 get in, never more than 5 at a time, and the others hear why."""
    await _rounds(Served(start_app, server, tmp_path), 3)


@pytest.mark.slow
async def test_200_at_once_for_5_slots_round_after_round(serve: Serve) -> None:
    """Exactly 5 of 200 get in at a time, in each of sixty rounds."""
    await _rounds(serve(), 60)


async def _rounds(served: Served, rounds: int) -> None:
    app = served.start(workers=2)
    clients = [await Client.connect(app.port) for _ in range(200)]
    waits = set()
    for number in range(rounds):
        for client in clients:
            client.send("GET", f"/gate/{number}")
        answers = [asyncio.create_task(client.answer()) for client in clients]
        await asyncio.wait_for(_some_done(answers, 195), 60)
        assert served.held() == served.ledger.inside() == 5
        served.gate.with_suffix(f".{number}").touch()
        got = await asyncio.gather(*answers)
        refused = [answer for answer in got if answer.status == 429]
        assert (sum(answer.status == 200 for answer in got), len(refused)) == (5, 195)
        waits |= {int(answer.headers["retry-after-ms"]) for answer in refused}
        error = json.loads(refused[0].body)["error"]
        assert error["code"] == "CONCURRENT_LIMIT_EXCEEDED"
        assert error["message"] == "Concurrent prediction limit exceeded. 5/5 predictions running."
        await until_async(lambda: slots_on_server(served.server) == 0)
    assert served.ledger.peak() == 5
    assert served.ledger.entered() == 5 * rounds
    assert len(waits) > 100, "clients must not come back in step"
    assert 1000 <= min(waits) < max(waits) <= 3000


async def _some_done(answers: list[asyncio.Task[Answer]], number: int) -> None:
    while sum(answer.done() for answer in answers) < number:
        await asyncio.sleep(0.01)


async def test_sigterm_frees_every_slot_before_the_exit(serve: Serve) -> None:
    """A graceful stop lets requests end, and nothing is held when the process has gone."""
    served = serve(limit=100)
    app = served.start(workers=2)
    clients = await busy(app, 20, "/run/0.5", served.ledger)
    assert served.held() == 20
    assert await asyncio.to_thread(app.stop) in (0, -signal.SIGTERM)
    assert served.held() == 0
    assert [(await client.answer()).status for client in clients] == [200] * 20


async def test_sigterm_past_the_grace_period_frees_every_slot(serve: Serve) -> None:
    """Requests that uvicorn cuts off after its grace period leave no lease behind in the server."""
    paths = ["/run/60", "/stream?number=1000&size=10&pause=0.1", "/background/60", "/stubborn/1.0"]
    served = serve(limit=100)
    app = served.start("--timeout-graceful-shutdown", "1")
    for path in paths:
        await busy(app, 5, path, served.ledger)
    socket = await websockets.connect(
        f"ws://127.0.0.1:{app.port}/socket", additional_headers={"X-API-Key": "a"}
    )
    await until_async(lambda: served.held() == 21)
    start = time.monotonic()
    await asyncio.to_thread(app.stop)
    assert served.held() == 0
    assert time.monotonic() - start < 20
    socket.transport.abort()


async def test_sigterm_under_load_frees_every_slot(serve: Serve) -> None:
    """With requests coming all the time, cut off while they acquire, work and release, none stays."""
    served = serve(limit=100)
    app = served.start("--timeout-graceful-shutdown", "1")
    stopping = False

    async def caller(number: int) -> None:
        path = f"/run/{0.01 if number % 4 else 60}"
        while not stopping:
            try:
                await ask(app.port, "GET", path)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.01)

    callers = [asyncio.create_task(caller(number)) for number in range(40)]
    await until_async(lambda: served.ledger.entered() > 200)
    await asyncio.to_thread(app.stop)
    assert served.held() == 0
    stopping = True
    for task in callers:
        task.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


async def test_without_a_lifespan_a_graceful_stop_frees_every_slot(serve: Serve) -> None:
    """A graceful stop without lifespan events leaves no slot to requests that ended on their own."""
    served = serve(limit=100)
    app = served.start("--lifespan", "off")
    clients = await busy(app, 20, "/run/0.5", served.ledger)
    await asyncio.to_thread(app.stop)
    assert served.held() == 0
    assert [(await client.answer()).status for client in clients] == [200] * 20


async def test_slots_of_a_killed_worker_come_back_within_the_lease(serve: Serve) -> None:
    """SIGKILL: its slots come back within their lease and not before; those of the living stay."""
    served = serve(limit=5, lease=1)
    doomed, living = served.start(), served.start()
    await busy(living, 2, "/gate/0", served.ledger)
    await busy(doomed, 3, "/run/60", served.ledger)
    dead = {line[1:] for line in served.ledger.lines()[2:]}
    await asyncio.sleep(0.5)  # so that the leases have been renewed
    killed = time.monotonic()
    os.kill(doomed.worker_pids()[0], signal.SIGKILL)
    ends = expiries(served.server)
    assert max(ends) <= 1.0, "by the end of a lease"
    status = 429
    while served.held() == 5:  # who is answered as a lease ends may have got its slot
        assert status == 429
        status = (await ask(living.port, "GET", "/run/0.1")).status
        await asyncio.sleep(0.02)
    first = time.monotonic() - killed
    await until_async(lambda: served.held() == 2)
    last = time.monotonic() - killed
    assert first >= min(ends) - 0.05, "not earlier than the lease of the dead ends"
    statuses = [(await ask(living.port, "GET", "/run/0.01")).status for _ in range(3)]
    assert statuses == [200] * 3
    await asyncio.sleep(0.5)
    assert served.held() == 2, "the living hold on, past their first lease"
    assert served.ledger.peak(dead) <= 5
    served.gate.with_suffix(".0").touch()
    await until_async(lambda: served.held() == 0)
    print(f"slots of a killed worker came back after {first:.2f} to {last:.2f} s of a lease of 1 s")  # noqa: T201


async def test_a_worker_paused_beyond_its_lease_reports_lost_slots(serve: Serve) -> None:
    """SIGSTOP beyond the lease: others get the slots, the sleeper reports it and frees no other's."""
    served = serve(limit=3, lease=1)
    sleeper, other = served.start(), served.start()
    lost = await busy(sleeper, 3, "/gate/1", served.ledger)
    assert (await ask(other.port, "GET", "/run/0.01")).status == 429
    pid = sleeper.worker_pids()[0]
    os.kill(pid, signal.SIGSTOP)
    await until_async(lambda: served.held() == 0)
    taken = await busy(other, 3, "/gate/0", served.ledger)
    os.kill(pid, signal.SIGCONT)
    await until_async(lambda: sleeper.log.count("slot lost") == 3)
    served.gate.with_suffix(".1").touch()
    assert [(await client.answer()).status for client in lost] == [200] * 3
    assert served.held() == 3, "the late release of the sleeper frees nothing of the others"
    assert (await ask(sleeper.port, "GET", "/run/0.01")).status == 429
    assert sleeper.log.count("slot lost") == 3
    assert other.log.count("slot lost") == 0
    served.gate.with_suffix(".0").touch()
    assert [(await client.answer()).status for client in taken] == [200] * 3
    until(lambda: slots_on_server(served.server) == 0)


async def test_a_stalled_event_loop_reports_lost_slots(serve: Serve) -> None:
    """A handler that blocks the loop for longer than the lease is found lost, and counted no more."""
    served = serve(limit=2, lease=1)
    app = served.start()
    clients = await busy(app, 1, "/run/2.0", served.ledger)
    stalled = await Client.connect(app.port)
    stalled.send("GET", "/stall/1.5")
    await until_async(lambda: served.held() == 2)
    await until_async(lambda: served.held() == 0)
    assert (await stalled.answer()).status == 200
    assert [(await client.answer()).status for client in clients] == [200]
    assert app.log.count("slot lost") >= 1
    assert served.held() == 0
    assert (await ask(app.port, "GET", "/run/0.01")).status == 200
