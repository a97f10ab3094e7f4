"""More requests than are asked about in time: this process's own backlog is not the server's silence."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.cluster.backend import ClusterBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.outcome import Outcome
from tests.conftest import StartServer
from tests.support.asgi import settings_of
from tests.support.conformance import Waits, daily, eventually, new_id, slots, window
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.slots import until_async
from tests.support.statuses import peeked

pytestmark = pytest.mark.rerun

TIMEOUT = 3.0
"""Longer than a server of a busy machine is silent, shorter than all of a burst takes."""
DELAY = 0.3
"""Seconds that each answer takes during a burst: a tenth of the time-out, so that many wait for longer."""
SLACK = 0.15
"""Seconds that the end of a wait may come later than the time-out."""


@asynccontextmanager
async def opened(url: str, timeout: float = TIMEOUT) -> AsyncIterator[RedisBackend | ClusterBackend]:
    """A connected backend."""
    backend = (ClusterBackend if "cluster" in url else RedisBackend)(url, timeout=timeout)
    try:
        await backend.open()
        await eventually(lambda: is_served(backend))
        yield backend
    finally:
        await backend.close()


async def is_served(backend: RedisBackend | ClusterBackend) -> bool:
    """Whether the backend decides about a charge."""
    try:
        return (await backend.acquire(Charge([window(9_999, of="first")]), new_id())).admitted
    except BackendError:
        return False


def away(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about outages."""
    return [record.message for record in caplog.records if "backend is" in record.message]


def plain(_number: int) -> list[Counter]:
    """The limits of one busy caller, without a budget."""
    return [window(999_999), slots(99_999)]


def of_many(number: int) -> list[Counter]:
    """Limits of one of many callers."""
    return [window(999_999, of=f"caller {number}"), slots(99_999, of=f"caller {number}")]


def with_money(number: int) -> list[Counter]:
    """Limits of one of many callers, with a budget."""
    return [*of_many(number), daily(999_999_999, of=f"caller {number}")]


@pytest.mark.parametrize(
    ("number", "limits"),
    [(1_600, plain), (1_600, of_many), (1_600, with_money)],
    ids=["one", "many", "money"],
)
async def test_a_burst_is_no_outage(
    server: StoreServer, number: int, limits: Callable[[int], list[Counter]], caplog: pytest.LogCaptureFixture
) -> None:
    """Of thousands at once each is decided by the server, or fails alone; and what is counted was told."""
    charges = [Charge(limits(each)) for each in range(number)]
    async with Proxy(server.port) as proxy, opened(proxy.url) as backend:
        caplog.clear()
        for _ in range(2):
            proxy.delay = DELAY
            results = await asyncio.gather(
                *[backend.acquire(charge, new_id(), 1) for charge in charges], return_exceptions=True
            )
            assert {type(each) for each in results} == {Outcome, BackendError}
            proxy.delay = 0
            await eventually(lambda: is_served(backend))
        assert away(caplog) == []
        assert backend.error is None


async def test_who_waits_too_long_fails_alone(server: StoreServer, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that wait too long fail alone, in time, and leave nothing, while the first ones are served."""
    async with Proxy(server.port) as proxy, opened(proxy.url) as backend:
        caplog.clear()
        proxy.delay = 2 * DELAY
        charge, waits = Charge([window(9_999, of=name) for name in ("a", "b")] + [slots(9_999)]), Waits()

        async def ask() -> bool:
            async with waits.one():
                try:
                    return (await backend.acquire(charge, new_id())).admitted
                except BackendError:
                    return False

        async with waits.measured():
            admitted = sum(await asyncio.gather(*[ask() for _ in range(1_000)]))
        assert 0 < admitted < 1_000
        assert waits.longest < TIMEOUT + SLACK + waits.late
        assert away(caplog) == []
        assert sum("could not ask the backend in time" in record.message for record in caplog.records) == 1
        proxy.delay = 0

        async def is_balanced() -> bool:
            try:
                return (await peeked(backend, charge)).counted == [admitted] * 3
            except BackendError:
                return False

        await eventually(is_balanced)


async def test_a_silent_server_is_away_whatever_waits(
    kind: str, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A backlog hides no outage: once what was sent has no answer for the time-out, all have failed."""
    server = start_server(kind)
    async with opened(server.url, 0.5) as backend:
        caplog.clear()
        server.stop_signal()
        waits = Waits()
        async with waits.measured(), waits.one():
            results = await asyncio.gather(
                *[backend.acquire(Charge(plain(0)), new_id()) for _ in range(2_000)], return_exceptions=True
            )
        assert {type(each) for each in results} == {BackendError}
        assert waits.longest < 5 + waits.late
        await until_async(lambda: backend.error is not None)
        assert away(caplog) == ["backend is away: no answer within 0.5 s"]
        server.continue_signal()
        await eventually(lambda: is_served(backend))


async def test_a_request_without_an_answer_follows_its_own_failure_mode(server: StoreServer) -> None:
    """Each of those that waited too long is decided as its settings say, while others are served."""
    async with Proxy(server.port) as proxy:
        settings = settings_of(
            f"""
            [backend]
            url = "{proxy.url}"
            timeout = {TIMEOUT}
            on_failure = "deny"
            [plans.default]
            requests = ["100000/minute"]
            """
        )
        async with Limiter(settings) as limiter:

            async def is_shared() -> bool:
                return (await limiter.acquire(api_key="a")).decision.policy == "shared"

            await eventually(is_shared)
            proxy.delay = 2 * DELAY
            leases = await asyncio.gather(*[limiter.acquire(api_key="a") for _ in range(1_000)])
            assert {(each.allowed, each.decision.policy) for each in leases} == {
                (True, "shared"),
                (False, "deny"),
            }
            assert limiter.stats().backend_up


async def test_renewals_stand_before_no_request(
    server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of renewals at once delay nobody, and all of them are made."""
    async with opened(server.url, 10.0) as backend:
        caplog.clear()
        charge = Charge([slots(99_999)])
        reservations = []
        for _ in range(30):
            reservations += await asyncio.gather(*[backend.acquire(charge, new_id()) for _ in range(100)])
        renewals = asyncio.gather(*[backend.renew_all([(each.reservation, 60)]) for each in reservations])
        await asyncio.sleep(0)
        first = asyncio.ensure_future(backend.acquire(Charge([window(9, of="other")]), new_id()))
        assert (await first).admitted
        assert not renewals.done()
        assert await renewals == [[True]] * len(reservations)
        assert away(caplog) == []


async def test_renewals_are_not_starved(server: StoreServer) -> None:
    """However many requests come, a renewal goes along with them."""
    async with opened(server.url, 10.0) as backend:
        reservation = (await backend.acquire(Charge([slots(9)]), new_id())).reservation
        is_over = False

        async def ask(number: int) -> None:
            charge = Charge([window(9_999_999, of=f"caller {number}")])
            while not is_over:
                await backend.acquire(charge, new_id())

        busy = [asyncio.create_task(ask(number)) for number in range(400)]
        await asyncio.sleep(0.1)
        for _ in range(5):
            async with asyncio.timeout(20):
                assert await backend.renew(reservation, 60)
        is_over = True
        await asyncio.gather(*busy)


@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_process_that_stood_still_takes_no_server_for_away(
    kind: str, start_server: StartServer, caplog: pytest.LogCaptureFixture, *, is_connected: bool
) -> None:
    """Time in which the process did not run is not the server's: both stood still, and it answers later."""
    server = start_server(kind)
    backend = RedisBackend(server.url, timeout=2.0)
    if is_connected:
        await backend.open()
    server.stop_signal()
    asked = asyncio.create_task(backend.acquire(Charge(plain(0)), new_id()))
    await asyncio.sleep(0.01 if is_connected else 0)  # it was sent, or waits for a connection
    go_on = threading.Timer(2.7, server.continue_signal)
    go_on.start()
    time.sleep(2.5)  # noqa: ASYNC251 - the event loop stands still with everything else
    await asyncio.wait([asked])
    await eventually(lambda: is_served(backend))
    assert away(caplog) == []
    go_on.join()
    await backend.close()


async def test_a_burst_on_a_node_of_a_cluster_is_no_outage(
    server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A burst is not an outage if each caller's requests are a call of their own, as on a cluster."""
    async with Proxy(server.port) as proxy, opened(proxy.url.replace("redis", "redis+cluster", 1)) as backend:
        caplog.clear()
        proxy.delay = DELAY
        calls = [backend.acquire(Charge(of_many(number % 300)), new_id()) for number in range(1_000)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in results} == {Outcome, BackendError}
        proxy.delay = 0
        await eventually(lambda: is_served(backend))
        assert away(caplog) == []
        assert [each.levelname for each in caplog.records] == ["WARNING"]
