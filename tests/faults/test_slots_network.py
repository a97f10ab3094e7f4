"""Answers that are lost, connections that are cut: nothing is held twice, and nothing stays."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from ratelimit_mw import Limiter
from tests.support.asgi import settings_of
from tests.support.conformance import eventually
from tests.support.proxy import Fault, Proxy
from tests.support.servers import StoreServer
from tests.support.slots import held, until_async
from tests.support.statuses import budget_status, counted

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
url = "{url}"
timeout = {timeout}
[plans.default]
requests = ["1000/minute"]
concurrent = {{ limit = 5, lease = 600 }}
spending = {{ daily = "100.00" }}
[[routes]]
path = "/{{rest:path}}"
price = "1.00"
"""


class Bench:
    """A limiter behind a proxy, and another one that sees the truth."""

    def __init__(self, server: StoreServer, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.limiter = Limiter(settings_of(SETTINGS.format(url=proxy.url, timeout=0.1)))
        self.observer = Limiter(settings_of(SETTINGS.format(url=server.url, timeout=5)))

    async def heal(self) -> None:
        """Let traffic pass, and wait until the limiter has noticed."""
        self.proxy.fault = "none"
        self.proxy.reset()
        await until_async(lambda: self.limiter.engine.backend.error is None)  # type: ignore[attr-defined]

    async def becomes(self, slots: int, money: int) -> None:
        """Wait until so many slots are active, and so much money spent or held."""

        async def is_so() -> bool:
            return (await self.counted())[1:] == [slots, money]

        await eventually(is_so)

    async def counted(self) -> list[int]:
        """Units of rate, slots active and money spent or held, in the server's books."""
        policy = self.observer.engine.policies.match(
            self.observer.engine.identity_of(api_key="a"), "GET", "/"
        )
        rate, slots, money = (await self.observer.engine.peek(policy)).limits
        return [counted(rate), counted(slots), budget_status(money.status).taken]


@pytest.fixture
async def bench(server: StoreServer) -> AsyncIterator[Bench]:
    """Connected, on each kind of server."""
    async with Proxy(server.port) as proxy:
        bench = Bench(server, proxy)
        async with bench.limiter, bench.observer:
            yield bench


@pytest.mark.parametrize("fault", ["drop_replies", "blackhole"])
async def test_a_charge_whose_answer_is_lost_is_given_back(bench: Bench, fault: Fault) -> None:
    """The script ran and nobody heard of it: slot and money come back; a unit of rate may stay."""
    bench.proxy.fault = fault
    leases = await asyncio.gather(*[bench.limiter.acquire(api_key="a") for _ in range(5)])
    assert [lease.decision.policy for lease in leases] == ["local"] * 5
    for lease in leases:  # else the server would be told of them once it is back
        bench.limiter.engine.leases.end(lease, failed=True)
    await bench.heal()
    await until_async(lambda: held(bench.server) == 0)
    await bench.becomes(0, 0)
    rate = (await bench.counted())[0]
    assert rate <= 10, "once by the lost answers, once by the decisions in their place"


async def test_a_release_whose_answer_is_lost_frees_once(bench: Bench) -> None:
    """It is sent again until it arrives, and another one's slot is left alone."""
    first = await bench.limiter.acquire(api_key="a")
    second = await bench.limiter.acquire(api_key="a")
    bench.proxy.fault = "drop_replies"
    bench.limiter.engine.leases.end(first, failed=False)
    await asyncio.sleep(0.05)
    await bench.heal()
    await until_async(lambda: held(bench.server) == 1)
    await bench.becomes(1, 2_000_000)
    bench.limiter.engine.leases.end(second, failed=True)
    await until_async(lambda: held(bench.server) == 0)
    await bench.becomes(0, 1_000_000)


async def test_a_release_during_an_outage_arrives_after_it(bench: Bench) -> None:
    """A slot freed while the server is out of reach is free when it is back, long before its lease ends."""
    leases = [await bench.limiter.acquire(api_key="a") for _ in range(5)]
    bench.proxy.refuse()
    for lease in leases:
        bench.limiter.engine.leases.end(lease, failed=True)
    await bench.heal()
    await until_async(lambda: held(bench.server) == 0)
    await bench.becomes(0, 0)


async def test_a_renewal_that_is_lost_keeps_the_slot(bench: Bench) -> None:
    """A cut connection at the time of a renewal is not a loss: it is renewed once the server is back."""
    lease = await bench.limiter.acquire(api_key="a")
    bench.proxy.fault = "drop_replies"
    renewals = bench.limiter.engine.leases.renewing()
    await renewals._renew_all(lease.backend, [lease])
    assert lease.renew_at == 0, "it is due again"
    assert not lease.is_lost
    await bench.heal()
    lease.renew_at = 1.0
    await renewals._renew_all(lease.backend, [lease])
    assert lease.renew_at == 1, "it was renewed"
    assert not lease.is_lost
    await lease.release()


async def test_a_job_detached_during_an_outage_is_settled_after_it(bench: Bench) -> None:
    """Its token names the very reservation that the server is told of once it is back."""
    bench.proxy.refuse()
    lease = await bench.limiter.acquire(api_key="a")
    assert lease.decision.policy == "local"
    token = await lease.detach(ttl=60)
    bench.limiter.engine.leases.end(lease, failed=False)
    await bench.heal()
    await until_async(lambda: len(bench.limiter.engine.decider.local.reconciler) == 0)
    await bench.becomes(1, 1_000_000)
    async with bench.observer.resume(token) as job:
        assert not job.is_lost
        await job.settle("2.00")
    await until_async(lambda: held(bench.server) == 0)
    await bench.becomes(0, 2_000_000)


async def test_a_job_of_an_outage_is_settled_by_its_token_before_the_server_knows_of_it(bench: Bench) -> None:
    """In the process that admitted it: what the server has not been told of, it could not settle."""
    bench.proxy.refuse()
    lease = await bench.limiter.acquire(api_key="a")
    assert lease.decision.policy == "local"
    token = await lease.detach(ttl=60)
    bench.limiter.engine.leases.end(lease, failed=False)
    async with bench.limiter.resume(token) as job:
        assert not job.is_lost
        await job.settle("2.00")
    await bench.limiter.settle(token, "2.00")
    await bench.heal()
    await until_async(lambda: len(bench.limiter.engine.decider.local.reconciler) == 0)
    await bench.becomes(0, 2_000_000)
    assert bench.limiter.stats().settles_ignored == 0


async def test_a_hold_whose_telling_is_lost_is_told_again(bench: Bench) -> None:
    """However often its answer is lost, the reservation is there once, and no late give-back frees it."""
    bench.proxy.refuse()
    lease = await bench.limiter.acquire(api_key="a")
    assert lease.decision.policy == "local"
    for _ in range(3):
        bench.proxy.fault = "drop_replies"
        bench.proxy.reset()
        lost = bench.proxy.lost
        await until_async(lambda: bench.proxy.lost > lost)  # noqa: B023 - called before the next turn
        await asyncio.sleep(0.1)
    await bench.heal()
    await until_async(lambda: len(bench.limiter.engine.decider.local.reconciler) == 0)
    await until_async(lambda: bench.limiter.stats().load.owed == 0)
    assert (await bench.counted())[1:] == [1, 1_000_000]
    bench.limiter.engine.leases.end(lease, failed=False)
    await bench.becomes(0, 1_000_000)


async def test_random_cuts_leave_the_books_balanced(bench: Bench) -> None:
    """Cuts at random moments leave no slot, and a request that ended well is paid for once."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    paid = 0

    async def one() -> None:
        nonlocal paid
        lease = await bench.limiter.acquire(api_key="a")
        await asyncio.sleep(chance.uniform(0, 0.01))
        failed = chance.random() < 0.5
        paid += lease.allowed and not failed
        bench.limiter.engine.leases.end(lease, failed=failed)

    async def cut() -> None:
        while True:
            await asyncio.sleep(chance.uniform(0.02, 0.06))
            bench.proxy.fault = chance.choice(["none", "none", "drop_replies", "blackhole"])
            bench.proxy.reset()

    cutting = asyncio.create_task(cut())
    for _ in range(100):
        await asyncio.gather(*[one() for _ in range(4)])
    cutting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await cutting
    await bench.heal()
    await until_async(lambda: len(bench.limiter.engine.decider.local.reconciler) == 0)
    await until_async(lambda: held(bench.server) == 0)
    await until_async(lambda: bench.limiter.stats().load.owed == 0)
    assert (await bench.counted())[1:] == [0, paid * 1_000_000], f"seed {seed}"
    assert paid > 0
