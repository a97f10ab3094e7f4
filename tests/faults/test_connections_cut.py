"""TLS under faults: records that are cut in the middle, handshakes that stall, and what they leave behind."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from ratelimit_mw import Limiter
from tests.support.asgi import settings_of
from tests.support.certificates import Certificates
from tests.support.conformance import eventually
from tests.support.proxy import Fault, Proxy
from tests.support.servers import StoreServer
from tests.support.slots import held, until_async
from tests.support.statuses import budget_status, slot_status

pytestmark = pytest.mark.rerun

CENT = 10_000
TEXT = """
[backend]
url = "{url}"
timeout = {timeout}
tls_ca_file = "{ca}"
[plans.default]
requests = ["100000/minute"]
concurrent = {{ limit = 1000, lease = 600 }}
spending = {{ daily = "1000.00" }}
[[routes]]
path = "/{{rest:path}}"
price = "0.10"
"""


@pytest.fixture
async def cable(redis_server: StoreServer, certificates: Certificates) -> AsyncIterator[Proxy]:
    """Yield a proxy that passes encrypted traffic, and can be cut anywhere."""
    async with Proxy(redis_server.port, tls=certificates.server()) as server, Proxy(server.port) as cable:
        yield cable


def limiter_over(cable: Proxy, certificates: Certificates, timeout: float = 0.2) -> Limiter:
    """A limiter whose server is at the other end."""
    url = f"rediss://127.0.0.1:{cable.port}/0"
    return Limiter(settings_of(TEXT.format(url=url, timeout=timeout, ca=certificates.ca_file)))


@pytest.mark.parametrize("fault", ["half", "blackhole", "drop_replies", "refuse"])
async def test_records_that_are_cut_leave_no_slot_and_exact_sums(
    redis_server: StoreServer, cable: Proxy, certificates: Certificates, fault: Fault
) -> None:
    """Under load, again and again: what was settled is spent, once, and nothing else is held."""
    limiter, over, spent = limiter_over(cable, certificates), asyncio.Event(), 0

    async def ask() -> None:
        nonlocal spent
        while not over.is_set():
            async with await limiter.acquire(api_key="a") as lease:
                await asyncio.sleep(random.random() * 0.02)
                await lease.settle("0.03")
                spent += 3 * CENT
            await asyncio.sleep(0.005)

    async with limiter:
        callers = [asyncio.create_task(ask()) for _ in range(10)]
        for _ in range(3):
            await asyncio.sleep(0.3)
            if fault == "refuse":
                cable.refuse()
            cable.fault = fault
            await asyncio.sleep(0.4)
            cable.fault = "none"
            cable.reset()
        await asyncio.sleep(0.3)
        over.set()
        await asyncio.gather(*callers)
        await until_async(
            lambda: (
                limiter.stats().backend_up and not limiter.stats().unsynced and not limiter.stats().load.owed
            )
        )
        await until_async(lambda: held(redis_server) == 0)
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
        _, slots, day = [each.status for each in (await limiter.engine.peek(policy)).limits]
        assert slot_status(slots).active == 0
        assert budget_status(day)[:2] == (spent, 0)
        assert limiter.stats().slots_lost == limiter.stats().unsynced_lost == 0


async def test_a_handshake_that_stalls_is_one_outage_and_tried_again(
    cable: Proxy, certificates: Certificates
) -> None:
    """Requests wait no longer than `timeout`, and once answers come again so does the backend."""
    cable.fault = "drop_replies"
    limiter = limiter_over(cable, certificates)
    async with limiter:
        lease = await limiter.acquire(api_key="a")
        assert lease.decision.policy == "local"
        limiter.engine.leases.end(lease, failed=True)
        await eventually(lambda: _later(limiter))
        cable.fault = "none"
        cable.reset()

        async def is_back() -> bool:
            with contextlib.suppress(TimeoutError):
                async with await limiter.acquire(api_key="a") as lease:
                    return lease.decision.policy == "shared"
            return False

        await eventually(is_back)


async def _later(limiter: Limiter) -> bool:
    return not limiter.stats().backend_up
