"""Outages of a real server as the limiter goes through them, and processes and event loops of every kind."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis
import uvloop
from redis.asyncio.connection import Connection

from ratelimit_mw import BackendError, Limiter, Settings
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.status import Status
from tests.conftest import StartApp, StartServer
from tests.support.apps import ROOT
from tests.support.conformance import eventually, new_id, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import budget_status, counted

pytestmark = pytest.mark.rerun

CENT = 10_000
PLAN = {"requests": ["10/minute"], "concurrent": 9, "spending": {"daily": "1.00"}}


@asynccontextmanager
async def limiter_on(url: str, **backend: object) -> AsyncIterator[Limiter]:
    """An open limiter on a server, whose requests cost ten cents at most."""
    settings = {
        "backend": {"url": url, "timeout": 2, **backend},
        "plans": {"default": PLAN},
        "routes": [{"path": "/", "price": "0.10"}],
    }
    async with Limiter(Settings.model_validate(settings)) as limiter:
        yield limiter


async def statuses(limiter: Limiter) -> tuple[Status, ...]:
    """Return the status of the window, the slots and the day's budget in the shared backend."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
    return tuple(status for _, status in (await limiter.engine.peek(policy)).limits)


async def is_synced(limiter: Limiter) -> bool:
    """Whether the backend knows everything."""
    return len(limiter.engine.decider.local.reconciler) == 0


async def test_an_outage_is_told_to_the_shared_backend(kind: str, start_server: StartServer) -> None:
    """Units, running slots and money of an outage are in the shared backend when it is over."""
    server = start_server(kind)
    async with limiter_on(server.url, timeout=0.5) as limiter:
        before = await limiter.acquire(api_key="a")
        server.stop_signal()
        leases = [await limiter.acquire(api_key="a") for _ in range(3)]
        assert [lease.decision.policy for lease in leases] == ["local"] * 3
        settled, kept, running = leases
        await settled.settle("0.01")
        limiter.engine.leases.end(settled, failed=False)
        limiter.engine.leases.end(kept, failed=False)
        limiter.engine.leases.end(before, failed=True)
        server.continue_signal()
        assert await eventually(lambda: is_synced(limiter)) < 2
        window, slots, day = await statuses(limiter)
        # The request that met the outage may have been counted before it was given up.
        assert 4 <= counted(window) <= 5
        assert (counted(slots), *budget_status(day)[:2]) == (1, 11 * CENT, 10 * CENT)
        limiter.engine.leases.end(running, failed=False)
    async with limiter_on(server.url) as limiter:
        _, slots, day = await statuses(limiter)
        assert (counted(slots), *budget_status(day)[:2]) == (0, 21 * CENT, 0)


async def test_money_is_told_once_though_the_answers_are_lost(server: StoreServer) -> None:
    """Money is told again if the answer is lost, and counts once."""
    async with Proxy(server.port) as proxy, limiter_on(proxy.url, timeout=0.1) as limiter:
        proxy.refuse()
        for _ in range(5):
            async with await limiter.acquire(api_key="a") as lease:
                assert lease.decision.policy == "local"
                await lease.settle("0.02")
        for _ in range(3):
            proxy.fault = "none"
            await eventually(lambda: _is_there(limiter))
            proxy.fault = "drop_replies"
            await asyncio.sleep(0.2)
            proxy.reset()
        proxy.fault = "none"
        assert await eventually(lambda: is_synced(limiter)) < 3
        await eventually(lambda: _owes_nothing(limiter))
        async with limiter_on(server.url) as reader:
            _, slots, day = await statuses(reader)
            assert (counted(slots), *budget_status(day)[:2]) == (0, 10 * CENT, 0)


async def _owes_nothing(limiter: Limiter) -> bool:
    return limiter.stats().load.owed == 0


async def _is_there(limiter: Limiter) -> bool:
    return getattr(limiter.engine.backend, "error", None) is None


@pytest.mark.parametrize("what", ["w", "s"])
@pytest.mark.parametrize("wait", [20.0, 0.01])
async def test_closing_undoes_nothing_that_is_being_told(
    kind: str, start_server: StartServer, monkeypatch: pytest.MonkeyPatch, what: str, wait: float
) -> None:
    """Closed while the backend learns of a window or a lease: it stays in the books, or is called lost."""
    monkeypatch.setattr("ratelimit_mw._internal.outage.sync_task.LAST_SYNC_TIMEOUT", wait)
    server = start_server(kind)
    async with Proxy(server.port) as proxy, limiter_on(proxy.url, timeout=5) as limiter:
        proxy.refuse()
        lease = await limiter.acquire(api_key="a")
        assert lease.decision.policy == "local"
        with server.client() as client:
            proxy.fault, proxy.delay = "none", 0.2
            while not client.keys(f"*:{what}:*"):  # the script ran, and its answer is on the way
                await asyncio.sleep(0.005)
        proxy.delay = 0
        await limiter.close()
        lost = limiter.engine.decider.local.reconciler.lost
    async with limiter_on(server.url, timeout=5) as limiter:
        window, slots, day = await statuses(limiter)
        assert (counted(slots), budget_status(day).held) == ((0, 0) if lost else (1, 10 * CENT))
        assert (counted(window), counted(day)) == (0 if lost == 2 else 1, 0)
        assert lost == 0 or wait < 1


async def test_full_memory_is_said_once_a_minute(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses charges is not away: this process decides, and the log says why."""
    server = start_server("redis")
    async with limiter_on(server.url) as limiter:
        with server.client() as client:
            client.config_set("maxmemory", "1")
            for _ in range(4):
                async with await limiter.acquire(api_key="a") as lease:
                    assert lease.decision.policy == "local"
            said = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
            assert len(said) == 1
            assert "logged once a minute" in said[0]
            assert "OOM" in said[0]
            client.config_set("maxmemory", "0")
        assert await eventually(lambda: is_synced(limiter)) < 2
        assert counted((await statuses(limiter))[0]) == 4


def test_a_limiter_made_before_the_fork(server: StoreServer) -> None:
    """Workers that are forked around a limiter share its counts, each over a connection of its own."""
    redis_py = "ignore:'asyncio.iscoroutinefunction' is deprecated"  # on Python 3.14
    command = [sys.executable, "-W", "error", "-W", redis_py, "-m", "tests.support.prefork", server.url]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == ("10\n", "")


async def test_event_loops_of_several_threads_share_a_limiter(start_server: StartServer) -> None:
    """Each event loop has its own connection; the counts are one, in an outage and after it."""
    server = start_server("valkey")
    async with limiter_on(server.url) as limiter:
        policies: list[str] = []

        async def ask() -> None:
            for _ in range(3):
                lease = await limiter.acquire(api_key="a")
                policies.append(lease.decision.policy)
                if lease.allowed:
                    async with lease:
                        pass

        async def ask_and_close() -> None:
            await ask()
            await limiter.close()

        async def ask_in_thread() -> None:
            thread = threading.Thread(target=lambda: asyncio.run(ask_and_close()))
            thread.start()
            await asyncio.to_thread(thread.join)

        await asyncio.gather(ask(), ask_in_thread())
        assert policies == ["shared"] * 6
        server.kill()
        policies.clear()
        await ask()
        await ask_in_thread()
        assert policies[:3] == ["local"] * 3
        assert len(policies) == 6
        server.restart()
        assert await eventually(lambda: is_synced(limiter)) < 3
        assert counted((await statuses(limiter))[0]) <= 10


@pytest.mark.parametrize("arguments", [(), ("--lifespan", "off")])
def test_sigterm_in_an_outage_ends_in_bounded_time(
    arguments: tuple[str, ...], start_server: StartServer, start_app: StartApp
) -> None:
    """A worker that is told to stop while its server hangs waits a bounded time, and says what is lost."""
    server = start_server("redis")
    environment = {"RATELIMIT_BACKEND__URL": server.url}
    app = start_app("tests.support.served:app", *arguments, environment=environment)
    server.stop_signal()
    code = app.stop(signal.SIGTERM)
    assert code in (0, -signal.SIGTERM), "it had to be killed"
    assert "Traceback" not in app.log
    server.continue_signal()


def test_uvloop_finds_the_server_again(redis_server: StoreServer) -> None:
    """Uvloop answers a write to a connection that was just reset with a RuntimeError, which is not an end."""

    async def go() -> None:
        async with Proxy(redis_server.port) as proxy, limiter_on(proxy.url, timeout=0.5) as limiter:
            proxy.refuse()
            end = asyncio.get_running_loop().time() + 1.5
            while asyncio.get_running_loop().time() < end:
                proxy.reset()
                await limiter.acquire(api_key="a")
                await asyncio.sleep(0.001)
            proxy.fault = "none"
            assert await eventually(lambda: _is_there(limiter)) < 2
            assert await eventually(lambda: is_synced(limiter)) < 2

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(go())


async def test_whatever_connecting_raises_it_is_tried_again(
    redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that ends in a RuntimeError, as under uvloop, is not the last one."""
    send, failures = Connection.send_packed_command, iter(range(3))

    async def fail_at_first(self: Connection, command: bytes, **options: bool) -> None:
        if next(failures, None) is not None:
            raise RuntimeError("unable to perform operation; the handler is closed")
        await send(self, command, **options)

    monkeypatch.setattr(Connection, "send_packed_command", fail_at_first)
    backend = RedisBackend(redis_server.url, timeout=1)
    await backend.open()
    charge = Charge([window(9)])

    async def answers() -> bool:
        with contextlib.suppress(BackendError):
            return (await backend.acquire(charge, new_id())).admitted
        return False

    assert await eventually(answers) < 2
    assert next(failures, None) is None
    await backend.close()


async def test_a_cancellation_that_redis_py_loses_ends_the_search_for_the_server(
    redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that searches for the server ends on cancellation, though connecting turns it into a time-out.

    The end of an event loop cancels each task once: a task that went on would keep the process from ending.
    """

    async def lose(self: Connection) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise redis.TimeoutError("lost") from None

    monkeypatch.setattr(Connection, "connect", lose)
    backend = RedisBackend(redis_server.url, timeout=0.1)
    await backend.open()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert len(tasks) == 1
    for task in tasks:
        task.cancel()
    ended, _ = await asyncio.wait(tasks, timeout=10)
    monkeypatch.undo()
    await backend.close()
    assert ended == tasks


async def test_a_write_to_a_connection_that_is_gone_is_a_loss(
    redis_server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation fails in time if its transport can't be written to, and the connection is made anew."""
    async with limiter_on(redis_server.url) as limiter:
        assert (await limiter.acquire(api_key="a")).decision.policy == "shared"
        batcher = limiter.engine.backend.loops.sender()  # type: ignore[attr-defined]
        batcher._link.connection._transport = _Refusing(batcher._link.connection._transport)
        assert (await limiter.acquire(api_key="b")).decision.policy == "local"
        assert await eventually(lambda: _is_there(limiter)) < 2
    assert "Exception in callback" not in caplog.text


class _Refusing:
    """A transport as uvloop's is between its end and the news of it."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self.abort, self.get_extra_info = transport.abort, transport.get_extra_info

    def write(self, data: bytes) -> None:
        """Refuse."""
        raise RuntimeError("unable to perform operation; the handler is closed")


async def test_a_server_without_enough_replicas_admits_nothing_unless_it_is_redis_6(
    kind: str, start_server: StartServer
) -> None:
    """`min-replicas-to-write` holds for scripts on Redis 7 and Valkey, and on 6.2 for plain writes alone."""
    server = start_server(kind, "--min-replicas-to-write", "1")
    backend = RedisBackend(server.url, timeout=5)
    with server.client() as client, pytest.raises(redis.ResponseError, match="NOREPLICAS"):
        client.set("plain", "write")
    if kind == "redis":
        assert (await backend.acquire(Charge([window(5)]), new_id())).admitted
    else:
        with pytest.raises(BackendError, match=r"NOREPLICAS|no connection"):
            await backend.acquire(Charge([window(5)]), new_id())
        assert backend.is_away
    await backend.close()
