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

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Renew, once the answer may come."""
        self.asked.set()
        await self.answers.wait()
        return await super().renew(reservation, seconds)


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


async def test_a_resumed_job_is_renewed_and_ends_with_its_block() -> None:
    """From the moment it is resumed its slot lasts for its lease, is renewed by a timer, and is freed."""
    bench = Bench()
    bench.backend.answers.set()
    token = await (await bench.limiter.acquire(api_key="a")).detach(ttl=600)
    bench.clock.set(590)
    async with bench.limiter.resume(token) as job:
        assert job.is_detached
        assert bench.limiter.engine.leases.number == 1
        bench.clock.set(619)
        assert await bench.active() == 1
    assert await bench.active() == 0
    assert bench.limiter.engine.leases.number == 0


async def test_a_job_that_is_resumed_too_late_is_lost() -> None:
    """Its work runs on uncounted, is not renewed, and the job says so."""
    bench = Bench()
    bench.backend.answers.set()
    token = await (await bench.limiter.acquire(api_key="a")).detach(ttl=60)
    bench.clock.set(60)
    async with bench.limiter.resume(token) as job:
        assert job.is_lost
        assert bench.limiter.engine.leases.number == 0
        assert await bench.active() == 0


@pytest.mark.parametrize("first", [0, 1])
async def test_a_job_that_was_delivered_twice_is_held_until_both_end(first: int) -> None:
    """Whichever of the two ends first, the slot is renewed for the other one, and freed with that."""
    bench = Bench()
    bench.backend.answers.set()
    token = await (await bench.limiter.acquire(api_key="a")).detach(ttl=600)
    blocks = [bench.limiter.resume(token) for _ in range(2)]
    jobs = [await block.__aenter__() for block in blocks]
    assert bench.limiter.engine.leases.number == 1
    await blocks[first].__aexit__(None, None, None)
    assert await bench.active() == 1
    assert bench.limiter.engine.leases.renewing().live() == [jobs[1 - first]]
    await blocks[1 - first].__aexit__(None, None, None)
    assert await bench.active() == 0
    assert bench.limiter.engine.leases.number == 0


async def test_a_token_is_renewed_for_its_lease() -> None:
    """A slot lasts for its lease from each renewal by hand, which says when it was too late."""
    bench = Bench()
    bench.backend.answers.set()
    token = await (await bench.limiter.acquire(api_key="a")).detach(ttl=60)
    bench.clock.set(59)
    assert await bench.limiter.renew(token)
    bench.clock.set(88)
    assert await bench.active() == 1
    bench.clock.set(89)
    assert await bench.active() == 0
    assert not await bench.limiter.renew(token)


async def test_a_token_without_a_slot_has_nothing_to_renew() -> None:
    """A job that holds money alone is never lost."""
    text = SETTINGS.replace("concurrent = { limit = 5, lease = 30 }, ", "")
    clock = FakeClock()
    limiter = Limiter(settings_of(text), backend=MemoryBackend(clock=clock))
    token = await (await limiter.acquire(api_key="a", path="/draw")).detach(ttl=60)
    clock.set(600)
    assert await limiter.renew(token)
    async with limiter.resume(token) as job:
        assert not job.is_lost
        assert limiter.engine.leases.number == 0
