"""Detached leases: how long they wait, and what becomes of a detach that is cut short."""

import asyncio

import pytest

from ratelimit_mw import Lease, Limiter
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.asgi import FakeClock, settings_of
from tests.support.statuses import counted

SETTINGS = """
plans.default = { concurrent = { limit = 5, lease = 30 }, spending = { daily = "1.00" } }
[[routes]]
path = "/draw"
price = "0.10"
"""


class Slow(MemoryBackend):
    """A backend that answers a renewal when told to."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()

    async def renew(self, hold: Reservation, lease: float) -> bool:
        """Renew, once the answer may come."""
        self.asked.set()
        await self.answers.wait()
        return await super().renew(hold, lease)


class Bench:
    """A limiter on a slow backend, with a clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.backend = Slow(self.clock)
        self.limiter = Limiter(settings_of(SETTINGS), backend=self.backend)

    async def active(self) -> int:
        """Slots held."""
        policy = self.limiter.engine.policies.match(self.limiter.engine.identity_of(api_key="a"), "GET", "/")
        return counted((await self.limiter.engine.peek(policy)).limits[0])

    async def cut_short(self, lease: Lease, *, ends: bool = False) -> None:
        """Detach, and be cancelled before the backend has answered; the request may end in between."""
        detaching = asyncio.ensure_future(lease.detach(ttl=600))
        await self.backend.asked.wait()
        if ends:
            self.limiter.engine.leases.end(lease, failed=False)
        detaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await detaching


@pytest.mark.parametrize("path", ["/", "/draw"])
async def test_a_detached_slot_waits_for_its_ttl(path: str) -> None:
    """Nobody has to renew it before the ttl is over, however short its lease is, and then it is free."""
    bench = Bench()
    bench.backend.answers.set()
    lease = await bench.limiter.acquire(api_key="a", path=path)
    await lease.detach(ttl=600)
    assert bench.limiter.engine.leases.number == 0
    bench.limiter.engine.leases.end(lease, failed=True)
    bench.clock.set(599)
    assert await bench.active() == 1
    bench.clock.set(600)
    assert await bench.active() == 0


@pytest.mark.parametrize("path", ["/", "/draw"])
async def test_a_detach_that_is_cut_short_leaves_the_lease_to_its_request(path: str) -> None:
    """Nobody has the token: the lease is renewed on, and ends with its request."""
    bench = Bench()
    lease = await bench.limiter.acquire(api_key="a", path=path)
    await bench.cut_short(lease)
    assert not lease.is_detached
    assert bench.limiter.engine.leases.number == 1
    assert await bench.active() == 1
    bench.limiter.engine.leases.end(lease, failed=False)
    assert await bench.active() == 0
    assert bench.limiter.engine.leases.number == 0


async def test_a_lost_lease_without_an_estimate_is_not_renewed_again() -> None:
    """A detach that is cut short brings no slot back that was lost before."""
    bench = Bench()
    lease = await bench.limiter.acquire(api_key="a")
    lease.is_lost = True
    await bench.cut_short(lease)
    assert bench.limiter.engine.leases.number == 0


@pytest.mark.parametrize("path", ["/", "/draw"])
async def test_a_request_that_ends_while_its_detach_is_cut_short_holds_nothing(path: str) -> None:
    """The slot is freed, though its request's end left it to whoever would have the token."""
    bench = Bench()
    lease = await bench.limiter.acquire(api_key="a", path=path)
    await bench.cut_short(lease, ends=True)
    assert await bench.active() == 0
    assert bench.limiter.engine.leases.number == 0


async def test_a_second_detach_gives_the_same_token() -> None:
    """A detached lease has one token, whoever asks for it."""
    bench = Bench()
    bench.backend.answers.set()
    lease = await bench.limiter.acquire(api_key="a")
    assert await lease.detach(ttl=600) == await lease.detach(ttl=1)
    bench.clock.set(599)
    assert await bench.active() == 1
