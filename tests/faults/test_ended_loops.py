"""Debts and knowledge of an ended event loop are the process's: nothing is lost with a short-lived loop."""

import asyncio
import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratelimit_mw import BackendError, Limiter, Settings
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.live import resolve
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.reservation import Reservation, ReservationKey
from ratelimit_mw._internal.model.status import BudgetStatus
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from tests.conftest import StartServer
from tests.faults.test_outages import CENT, is_synced, limiter_on, statuses
from tests.support.apps import ROOT
from tests.support.conformance import eventually, new_id, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import budget_status, counted, peeked

# A loop that ends without closing the limiter leaves its connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.rerun,
]


SETTINGS = {
    "plans": {"default": {"requests": ["10/minute"], "concurrent": 9, "spending": {"daily": "1.00"}}},
    "routes": [{"path": "/", "price": "0.10"}],
}


async def in_short_lived_loop(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run a coroutine by `asyncio.run` in a thread, as sync code of an app does."""
    await asyncio.to_thread(lambda: asyncio.run(work()))


async def day_of(limiter: Limiter) -> BudgetStatus:
    """Return the status of the day's budget in the shared backend, once these can be asked."""
    while True:
        with contextlib.suppress(BackendError):
            return budget_status((await statuses(limiter))[2])
        await asyncio.sleep(0.05)


UNCLOSED = """
import asyncio, os, signal, sys
from ratelimit_mw import Limiter, Settings

url, server = sys.argv[1], int(sys.argv[2])
limiter = Limiter(Settings(
    backend={"url": url, "timeout": 0.3},
    plans={"default": {"requests": ["10/minute"], "spending": {"daily": "1.00"}}},
    routes=[{"path": "/", "price": "0.10"}],
))


async def work():
    admitted_there = await limiter.acquire(api_key="a")
    os.kill(server, signal.SIGSTOP)
    await admitted_there.settle("0.01")
    assert (await limiter.acquire(api_key="a")).decision.policy == "local"


asyncio.run(work())
"""


def test_what_is_lost_with_an_unclosed_process_is_told(start_server: StartServer) -> None:
    """A process that ends in an outage, and closes no limiter, says how much the backend was never told."""
    server = start_server("redis")
    command = [sys.executable, "-c", UNCLOSED, server.url, str(server.pid)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "releases and settles never reached the backend: the process ended" in ended.stderr
    assert "2 counts of this process never reached the backend: the process ended" in ended.stderr


async def test_a_settle_of_a_loop_that_ended_in_an_outage_arrives(
    kind: str, start_server: StartServer
) -> None:
    """Another event loop of the process writes it once the server is back, as the log has promised."""
    server = start_server(kind)
    async with limiter_on(server.url, timeout=0.5) as limiter:
        token = await (await limiter.acquire(api_key="a")).detach(ttl=600)
        server.stop_signal()
        await in_short_lived_loop(lambda: limiter.settle(token, "0.03"))
        server.continue_signal()

        async def is_settled() -> bool:
            return (await day_of(limiter))[:2] == (3 * CENT, 0)

        assert await eventually(is_settled) < 10
        await limiter.release(token)


async def test_a_settle_without_a_price_of_a_loop_that_ended_in_an_outage_arrives(
    kind: str, start_server: StartServer
) -> None:
    """The process owes what a request without a price has cost, whenever it was admitted; the first settle
    meets a server that hangs, the second one that is known to be away.
    """
    server = start_server(kind)
    async with limiter_on(server.url, timeout=0.5) as limiter:
        leases = [await limiter.acquire(api_key="a", path="/unpriced") for _ in range(2)]
        server.stop_signal()
        for lease in leases:
            await in_short_lived_loop(lambda lease=lease: lease.settle("0.03"))  # type: ignore[misc]
        late = await limiter.acquire(api_key="a", path="/unpriced")
        assert late.decision.policy == "local"
        await in_short_lived_loop(lambda: late.settle("0.03"))
        server.continue_signal()

        async def is_settled() -> bool:
            return (await day_of(limiter))[:2] == (9 * CENT, 0)

        assert await eventually(is_settled) < 10
        for lease in (*leases, late):
            limiter.engine.leases.end(lease, failed=True)
        await eventually(lambda: is_synced(limiter))
        assert (await day_of(limiter))[:2] == (9 * CENT, 0)
        assert limiter.stats().settles_ignored == 0


async def test_a_settle_arrives_where_the_loop_closed_the_limiter(start_server: StartServer) -> None:
    """To close a limiter in one event loop gives nothing up while another one serves requests."""
    server = start_server("redis")
    async with limiter_on(server.url, timeout=0.5) as limiter:
        token = await (await limiter.acquire(api_key="a")).detach(ttl=600)
        server.stop_signal()

        async def settle_and_close() -> None:
            async with limiter:
                await limiter.settle(token, "0.03")

        await in_short_lived_loop(settle_and_close)
        server.continue_signal()

        async def is_settled() -> bool:
            return (await day_of(limiter))[:2] == (3 * CENT, 0)

        assert await eventually(is_settled) < 10
        await limiter.release(token)


def test_what_one_loop_owed_the_next_one_sends(start_server: StartServer) -> None:
    """Also where no event loop runs in between."""
    server = start_server("redis")
    limiter = Limiter(Settings.model_validate({**SETTINGS, "backend": {"url": server.url, "timeout": 0.5}}))

    async def start() -> str:
        return await (await limiter.acquire(api_key="a")).detach(ttl=600)

    async def spent() -> tuple[int, ...]:
        async with limiter:

            async def is_settled() -> bool:
                return (await day_of(limiter)).spent == 3 * CENT

            await eventually(is_settled)
            return tuple(await day_of(limiter))

    token = asyncio.run(start())
    server.stop_signal()
    asyncio.run(limiter.settle(token, "0.03"))
    server.continue_signal()
    assert asyncio.run(spent())[:2] == (3 * CENT, 0)


@pytest.mark.parametrize("closes", [False, True])
async def test_what_a_loop_admitted_in_an_outage_is_told(start_server: StartServer, *, closes: bool) -> None:
    """The units and the money of an outage reach the shared backend after the loop that counted them."""
    server = start_server("redis")
    async with limiter_on(server.url, timeout=0.5) as limiter:
        await limiter.acquire(api_key="b")
        server.stop_signal()

        async def ask() -> None:
            lease = await limiter.acquire(api_key="a")
            assert lease.decision.policy == "local"
            await lease.settle("0.03")
            limiter.engine.leases.end(lease, failed=False)
            if closes:
                await limiter.close()

        await in_short_lived_loop(ask)
        assert not await is_synced(limiter)
        server.continue_signal()
        assert await eventually(lambda: is_synced(limiter)) < 10
        window, slots, day = await statuses(limiter)
        assert (*map(counted, (window, slots, day)), budget_status(day).held) == (1, 0, 3 * CENT, 0)


async def test_an_outage_that_a_short_lived_loop_met_ends_with_it(start_server: StartServer) -> None:
    """`stats().backend_up` says what the running loops know, and no figure of the ended one is lost."""
    server = start_server("redis")
    async with limiter_on(server.url, timeout=0.5) as limiter:
        await limiter.acquire(api_key="a")
        server.stop_signal()

        async def ask() -> None:
            await limiter.acquire(api_key="b")
            assert not limiter.stats().backend_up

        await in_short_lived_loop(ask)
        server.continue_signal()
        assert limiter.stats().backend_up
        batches = limiter.stats().load.batches
        for _ in range(3):

            async def ask_again() -> None:
                await limiter.acquire(api_key="c")

            await in_short_lived_loop(ask_again)
            assert limiter.stats().load.batches > batches
            batches = limiter.stats().load.batches


def test_a_loop_that_ends_in_an_outage_leaves_what_it_knows(start_server: StartServer) -> None:
    """The backend is as the latest event loop found it, if no event loop runs."""
    server = start_server("redis")
    limiter = Limiter(Settings.model_validate({"backend": {"url": server.url, "timeout": 0.3}}))

    async def ask() -> str:
        return (await limiter.acquire(api_key="a")).decision.policy

    assert (asyncio.run(ask()), limiter.stats().backend_up) == ("shared", True)
    server.stop_signal()
    assert (asyncio.run(ask()), limiter.stats().backend_up) == ("local", False)
    server.continue_signal()
    assert (asyncio.run(ask()), limiter.stats().backend_up) == ("shared", True)


def test_look_ups_of_ended_loops_take_no_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Look-ups that ended with their event loop don't count among those at once."""
    monkeypatch.setattr(resolve, "MAX_STRANGERS", 2)
    hang = True

    async def look_up(api_key: str) -> KeyEntry | None:
        if hang:
            await asyncio.sleep(60)
        return KeyEntry("default", account=api_key)

    limiter = Limiter(resolve=look_up)

    def give_up(number: int) -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(limiter.acquire(api_key=f"k{number}"))
        loop.run_until_complete(asyncio.wait([task], timeout=0.05))
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()  # with the look-up under way

    with caplog.at_level(logging.CRITICAL, "asyncio"):
        for number in range(3):
            give_up(number)
        hang = False

        async def known() -> str | None:
            lease = await limiter.acquire(api_key="new")
            policies = limiter.engine.policies.latest.values()
            await lease.release()
            return next((each.identity.account for each in policies if each.identity.account), None)

        assert asyncio.run(known()) == "new"


async def test_units_that_an_ended_loop_gave_back_are_given_back_once(redis_server: StoreServer) -> None:
    """Its answer was lost with the loop: sent again, it would take back what another request was charged."""
    charge = Charge([window(100)])
    async with Proxy(redis_server.port) as proxy:
        backend = RedisBackend(proxy.url, timeout=5)
        observer = RedisBackend(redis_server.url, timeout=5)
        # At one moment by the clock, as requests of one turn are charged: each could be the other.
        outcomes = await asyncio.gather(*[backend.acquire(charge, new_id()) for _ in range(5)])

        async def used() -> int:
            return (await peeked(observer, charge)).counted[0]

        def give_back_and_end() -> None:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(backend.open())
            proxy.fault = "drop_replies"

            async def give_back() -> None:
                backend.give_back(charge, outcomes[0].reservation, [outcomes[0].now])
                await asyncio.sleep(0.05)

            loop.run_until_complete(give_back())
            loop.close()

        assert await used() == 5
        await asyncio.to_thread(give_back_and_end)

        async def is_given_back() -> bool:
            return await used() == 4

        await eventually(is_given_back)
        proxy.fault = "none"
        backend.take_over()
        await backend.peek(charge)
        assert backend.load.owed == 0
        assert await used() == 4
        await backend.close()
        await observer.close()


def test_what_ended_loops_owed_is_taken_over_by_one_thread(redis_server: StoreServer) -> None:
    """Event loops of several threads look for it in one moment: no look fails, and nothing comes twice."""
    backend = RedisBackend(redis_server.url, timeout=5)
    charge = Charge([window(10_000)])
    rounds, threads = 100, 4
    ready = threading.Barrier(threads + 1, timeout=30)

    def leave() -> None:
        loop = asyncio.new_event_loop()

        async def owe() -> None:
            for _ in range(50):
                backend.finish(Reservation(new_id(), (ReservationKey("u", "p"),)), EstimateAction.UNTOUCHED)

        loop.run_until_complete(owe())
        for task in asyncio.all_tasks(loop):  # which was to connect
            task.cancel()
        loop.close()

    async def look() -> int:
        await backend.peek(charge)
        for _ in range(rounds):
            ready.wait()
            try:
                backend.take_over()
            except BaseException:
                ready.abort()
                raise
            ready.wait()
        await backend.peek(charge)
        load = backend.loops.senders[asyncio.get_running_loop()].load
        await backend.close()
        return load.operations

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            looks = [pool.submit(asyncio.run, look()) for _ in range(threads)]
            for _ in range(rounds):
                leave()
                ready.wait()
                ready.wait()
            sent = [look.result() for look in looks]
    finally:
        sys.setswitchinterval(interval)
    assert sum(sent) == 50 * rounds + 3 * threads
