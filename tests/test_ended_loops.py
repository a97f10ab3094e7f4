"""What an event loop owed or knew when it ended is the process's: nothing is lost with a short-lived loop."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ratelimit_mw import BackendError, Limiter, Settings
from ratelimit_mw.live import resolve
from ratelimit_mw.live.key_entries import KeyEntry
from ratelimit_mw.status import BudgetStatus
from tests.conformance import eventually
from tests.conftest import StartServer
from tests.statuses import budget_status, counted
from tests.test_outages import CENT, is_told, limiter_on, statuses

# A loop that ends without closing the limiter leaves its connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SETTINGS = {
    "plans": {"default": {"requests": ["10/minute"], "concurrent": 9, "spending": {"daily": "1.00"}}},
    "routes": [{"path": "/", "price": "0.10"}],
}


async def in_short_lived_loop(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run a coroutine by `asyncio.run` in a thread, as sync code of an app does."""
    await asyncio.to_thread(lambda: asyncio.run(work()))


async def day_of(limiter: Limiter) -> BudgetStatus:
    """How the day's budget stands in the shared books, once these can be asked."""
    while True:
        with contextlib.suppress(BackendError):
            return budget_status((await statuses(limiter))[2])
        await asyncio.sleep(0.05)


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
    """The units and the money of an outage reach the shared books after the loop that counted them."""
    server = start_server("redis")
    async with limiter_on(server.url, timeout=0.5) as limiter:
        await limiter.acquire(api_key="b")
        server.stop_signal()

        async def ask() -> None:
            lease = await limiter.acquire(api_key="a")
            assert lease.decision.policy == "local"
            await lease.settle("0.03")
            limiter.leases.end(lease, failed=False)
            if closes:
                await limiter.close()

        await in_short_lived_loop(ask)
        assert not await is_told(limiter)
        server.continue_signal()
        assert await eventually(lambda: is_told(limiter)) < 10
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
    """Where no event loop runs, the backend is as the latest one found it."""
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
            policies = limiter.policies.latest.values()
            await lease.release()
            return next((each.identity.account for each in policies if each.identity.account), None)

        assert asyncio.run(known()) == "new"
