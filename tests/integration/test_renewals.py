"""Renewals: live leases are kept, lost ones are reported and never taken again, and `max_hold` ends."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest

from ratelimit_mw import Lease, Limiter
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.lease.renewals import AT_ONCE
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, UnderWay
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.observe.events import Event, SlotLost
from tests.support.asgi import FakeClock, settings_of
from tests.support.servers import StoreServer
from tests.support.slots import expiries, held, until_async
from tests.support.statuses import counted

pytestmark = pytest.mark.rerun

SETTINGS = """
[plans.default]
concurrent = { limit = 2, lease = 1 }
"""
MAX_HOLD = 1.2
BRIEFLY = """
[backend]
url = "{url}"
timeout = 5
[plans.default]
concurrent = {{ limit = 1, lease = 1, max_hold = 1.2 }}
"""


class Watched(MemoryBackend):
    """Remembers for how long leases were renewed, answers when told to, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.renewed: list[float] = []
        self.calls = 0
        self.finished: list[bytes] = []
        self.fails = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Renew, and remember."""
        self.renewed.append(seconds)
        return await super().renew(reservation, seconds)

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew, once the answer may come."""
        if self.fails:
            return [BackendError("nobody answers")] * len(renewals)
        self.calls += 1
        self.renewed += [lease for _, lease in renewals]
        kept = await super().renew_all(renewals)
        await self.answers.wait()
        return kept

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Finish, and remember."""
        self.finished.append(reservation.id)
        return super().finish(reservation, action)


class Bench:
    """A limiter on a watched backend, and what it has told."""

    def __init__(self) -> None:
        self.backend = Watched()
        self.events: list[Event] = []
        self.limiter = Limiter(settings_of(SETTINGS), backend=self.backend, on_event=self.events.append)

    async def acquire(self) -> Lease:
        """Take a slot."""
        lease = await self.limiter.acquire(api_key="a")
        assert lease.allowed
        return lease

    async def active(self) -> int:
        """Slots held."""
        policy = self.limiter.engine.policies.match(self.limiter.engine.identity_of(api_key="a"), "GET", "/")
        return counted((await self.limiter.engine.peek(policy)).limits[0])

    def make_due(self) -> None:
        """Let every lease be due for renewal, and renew."""
        renewals = self.limiter.engine.leases.renewing()
        for lease in renewals.leases.values():
            lease.renew_at = 0.0
        renewals._look()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Closed at the end."""
    bench = Bench()
    async with bench.limiter:
        yield bench


async def turns(number: int = 5) -> None:
    """Let the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_lease_is_renewed_by_a_timer(bench: Bench) -> None:
    """A lease of 1 s is renewed for 1 s at a time, well before it ends, and no more once released."""
    lease = await bench.acquire()
    await until_async(lambda: len(bench.backend.renewed) >= 3)
    assert set(bench.backend.renewed) == {1.0}
    await lease.release()
    renewed = len(bench.backend.renewed)
    await asyncio.sleep(0.6)
    assert len(bench.backend.renewed) == renewed


async def test_all_live_leases_are_renewed_together(bench: Bench) -> None:
    """Leases that are due are renewed in one call of the backend."""
    await bench.acquire()
    await bench.acquire()
    bench.make_due()
    await turns()
    assert bench.backend.renewed == [1.0, 1.0]
    assert bench.backend.calls == 1


async def test_many_leases_are_renewed_in_parts_and_spread(bench: Bench) -> None:
    """A thousand leases that are due at once take a few calls, evenly over the time that there is for it."""
    numbers = iter(range(1_000))
    leases = [await bench.limiter.acquire(api_key=f"k{number}") for number in numbers]
    renewals = bench.limiter.engine.leases.renewing()
    renewals.close()  # its timer would do the same
    calls: list[tuple[float, int]] = []

    class Noting(Watched):
        async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool]:
            calls.append((time.monotonic(), len(renewals)))
            return [True] * len(renewals)

    noting = Noting()
    for lease in leases:
        lease.backend = noting
    await renewals._renew_due(leases, 0.4)
    await turns()
    assert sum(number for _, number in calls) == 1_000
    assert max(number for _, number in calls) <= AT_ONCE
    assert calls[-1][0] - calls[0][0] > 0.3
    assert calls[len(calls) // 2][0] - calls[0][0] > 0.1


async def test_leases_that_come_and_go_put_off_no_renewal(bench: Bench) -> None:
    """A long request is renewed in time however many short ones begin meanwhile."""
    held = await bench.acquire()
    end = time.monotonic() + 10
    while not bench.backend.renewed and time.monotonic() < end:
        await (await bench.acquire()).release()
        await asyncio.sleep(0.01)
    assert bench.backend.renewed
    assert not held.is_lost


async def test_after_the_close_nothing_is_renewed(bench: Bench) -> None:
    """Leases that were due and not renewed yet are left to lapse."""
    leases = [await bench.limiter.acquire(api_key=f"k{number}") for number in range(2 * AT_ONCE)]
    renewals = bench.limiter.engine.leases.renewing()
    renewals.close()  # its timer would do the same
    bench.make_due()
    await turns()
    bench.limiter.engine.leases.stop_renewing()
    await asyncio.sleep(0.3)
    assert bench.backend.calls == 1
    assert len(bench.backend.renewed) == len(leases) / 2


async def test_what_could_not_be_renewed_is_due_at_the_next_look(bench: Bench) -> None:
    """A lease whose renewal failed is asked for again while there is time; the others are not."""
    failed, kept = await bench.acquire(), await bench.acquire()
    backend = bench.backend

    class Half(Watched):
        async def renew_all(
            self, renewals: Sequence[tuple[Reservation, float]]
        ) -> Sequence[bool | BackendError]:
            return [
                BackendError("away") if reservation.id == failed.reservation.id else True
                for reservation, _ in renewals
            ]

    failed.backend = kept.backend = Half()
    bench.make_due()
    await turns()
    assert failed.renew_at == 0 < kept.renew_at
    failed.backend = kept.backend = backend
    bench.limiter.engine.leases.renewing()._look()
    await turns()
    assert backend.renewed == [1.0]
    assert not failed.is_lost


async def test_nothing_ticks_where_nothing_is_held(bench: Bench) -> None:
    """The timer stops with the last lease."""
    lease = await bench.acquire()
    await lease.release()
    bench.limiter.engine.leases.renewing()._look()
    assert bench.limiter.engine.leases.renewing()._timer is None


async def test_a_lost_lease_is_reported_once_and_never_taken_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, counted and told to the app; another caller who has the slot keeps it."""
    lease = await bench.acquire()
    bench.backend.finish(lease.reservation, EstimateAction.UNTOUCHED)  # as an expiry does
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        bench.make_due()
        await turns()
        bench.make_due()
        await turns()
    assert lease.is_lost
    assert [record.message for record in caplog.records] == [
        f"slot lost: lease {lease.id} was not renewed in time; its work goes on, but is not counted"
    ]
    assert bench.events == [SlotLost(lease.id)]
    assert bench.limiter.engine.leases.renewing().lost == 1
    assert await bench.active() == 0


async def test_a_renewal_that_fails_is_tried_again(bench: Bench) -> None:
    """A backend that is away for less than the lease costs nothing."""
    lease = await bench.acquire()
    bench.backend.fails = True
    bench.make_due()
    await turns()
    bench.backend.fails = False
    bench.limiter.engine.leases.renewing()._look()
    await turns()
    assert bench.backend.renewed == [1.0]
    assert not lease.is_lost


async def test_a_release_during_a_renewal_is_no_loss(bench: Bench) -> None:
    """A renewal under way when its lease ends neither revives the slot nor reports it."""
    lease = await bench.acquire()
    bench.backend.answers.clear()
    bench.make_due()
    await turns()
    assert bench.backend.renewed == [1.0]
    bench.limiter.engine.leases.end(lease, failed=False)
    bench.backend.answers.set()
    await turns()
    assert await bench.active() == 0
    assert bench.events == []


async def test_a_lease_that_ends_as_it_is_due_is_not_renewed(bench: Bench) -> None:
    """Released in the very turn in which it was due, it is not asked for again."""
    lease = await bench.acquire()
    bench.make_due()  # the renewals have started, and none was sent
    bench.limiter.engine.leases.end(lease, failed=False)
    await turns()
    assert bench.backend.renewed == []
    assert bench.events == []


async def test_detaching_as_a_renewal_is_due_keeps_the_ttl(bench: Bench) -> None:
    """A renewal never cuts short what was detached in the same turn."""
    lease = await bench.acquire()
    bench.make_due()
    await lease.detach(ttl=600)
    await turns()
    assert bench.backend.renewed == [600.0]


async def test_a_lease_ends_once(bench: Bench) -> None:
    """However often its end is told, and after a release by hand, the slot is freed once."""
    lease = await bench.acquire()
    await lease.release()
    await lease.release()
    bench.limiter.engine.leases.end(lease, failed=False)
    bench.limiter.engine.leases.end(lease, failed=True)
    assert len(bench.backend.finished) == 1


def ends_by(server: StoreServer, give_up_at: float) -> bool:
    """Whether no slot is held any more. Whenever it is asked, the one with a `max_hold` ends by then."""
    asked_at = time.monotonic()
    assert min(expiries(server), default=0) <= max(give_up_at - asked_at, 0) + 0.05
    return held(server) == 0


@pytest.mark.parametrize("table", ["plans.default", "application"])
async def test_max_hold_frees_the_slot_of_work_that_never_ends(redis_server: StoreServer, table: str) -> None:
    """After `max_hold` a slot is free, a caller's as the application's, and its work runs on."""
    events: list[Event] = []
    settings = BRIEFLY.format(url=redis_server.url).replace("plans.default", table)
    async with Limiter(settings_of(settings), on_event=events.append) as limiter:
        start = time.monotonic()
        async with await limiter.acquire(api_key="a") as lease:
            give_up_at = lease.give_up_at
            assert give_up_at is not None
            await until_async(lambda: ends_by(redis_server, give_up_at))
            assert time.monotonic() - start > MAX_HOLD - 0.3
            await until_async(lambda: lease.is_lost)
            assert (await limiter.acquire(api_key="a")).allowed
            taken = held(redis_server)
        await asyncio.sleep(0.05)
        assert held(redis_server) == taken, "the end of the first frees no slot of the second"
        assert events == [SlotLost(lease.id)]


@pytest.mark.parametrize("resumed", [False, True])
async def test_max_hold_is_told_at_its_moment(resumed: bool) -> None:
    """A slot is given up when its `max_hold` is over, however long its lease is."""
    table = "[plans.default]\nconcurrent = { limit = 1, lease = 1.5, max_hold = 1.55 }"
    events: list[Event] = []
    async with Limiter(settings_of(table), on_event=events.append) as limiter:
        lease = await limiter.acquire(api_key="a")
        async with AsyncExitStack() as stack:
            if resumed:
                lease = await stack.enter_async_context(limiter.resume(await lease.detach(ttl=50)))
            assert lease.give_up_at is not None
            # Timers of one loop come in order, however busy the machine is.
            await asyncio.sleep(lease.give_up_at - time.monotonic() - 0.03)
            assert events == []
            await asyncio.sleep(lease.give_up_at - time.monotonic() + 0.03)
            assert events == [SlotLost(lease.id)]
            assert lease.is_lost
            assert (await limiter.acquire(api_key="a")).allowed


async def test_a_job_that_is_resumed_late_is_given_up_at_its_moment() -> None:
    """Its slot ends with its `max_hold`, also where that is over before the next look at what is due."""
    table = "[plans.default]\nconcurrent = { limit = 1, lease = 1, max_hold = 1 }"
    events: list[Event] = []
    async with Limiter(settings_of(table), on_event=events.append) as limiter:
        lease = await limiter.acquire(api_key="a")
        give_up_at = lease.give_up_at
        assert give_up_at is not None
        token = await lease.detach(ttl=50)
        await asyncio.sleep(give_up_at - time.monotonic() - 0.1)
        async with limiter.resume(token) as job:
            await asyncio.sleep(give_up_at - time.monotonic() + 0.03)
            assert events == [SlotLost(lease.id)]
            assert job.is_lost


async def test_work_that_ends_in_time_is_not_given_up() -> None:
    """The end of `max_hold` is nothing to a request that has ended before."""
    table = "[plans.default]\nconcurrent = { limit = 1, lease = 1, max_hold = 1 }"
    events: list[Event] = []
    async with Limiter(settings_of(table), on_event=events.append) as limiter:
        lease = await limiter.acquire(api_key="a")
        assert lease.give_up_at is not None
        await asyncio.sleep(lease.give_up_at - time.monotonic() - 0.1)  # its timer is set
        limiter.engine.leases.end(lease, failed=False)
        await asyncio.sleep(lease.give_up_at - time.monotonic() + 0.03)
        assert events == []
        assert not lease.is_lost


async def test_a_slot_whose_time_is_up_is_not_renewed(bench: Bench) -> None:
    """A renewal that comes late never keeps a slot beyond its `max_hold`."""
    late, other = await bench.acquire(), await bench.acquire()
    late.give_up_at = time.monotonic() - 1
    await bench.limiter.engine.leases.renewing()._renew_all(bench.backend, [late, other])
    assert bench.backend.renewed == [1.0]


@pytest.mark.parametrize("hours", [-1, 1])
async def test_max_hold_does_not_depend_on_clocks_agreeing(redis_server: StoreServer, hours: int) -> None:
    """A server whose clock is an hour behind or ahead of this machine's frees nothing early."""

    def clock() -> int:
        return time.time_ns() // 1000 + hours * 3_600_000_000

    backend = RedisBackend(redis_server.url, timeout=5, clock=clock)
    settings = settings_of("[plans.default]\nconcurrent = { limit = 1, lease = 3, max_hold = 60 }")
    async with Limiter(settings, backend=backend) as limiter, await limiter.acquire(api_key="a") as lease:
        await asyncio.sleep(1.6)  # the first renewal has been
        assert not lease.is_lost
        assert not (await limiter.acquire(api_key="a")).allowed


async def test_max_hold_bounds_a_detached_job(valkey_server: StoreServer) -> None:
    """Neither a ttl nor a worker keeps a slot beyond its `max_hold`."""
    async with Limiter(settings_of(BRIEFLY.format(url=valkey_server.url))) as limiter:
        start = time.monotonic()
        token = await (await limiter.acquire(api_key="a")).detach(ttl=600)
        assert expiries(valkey_server)[0] <= MAX_HOLD
        async with limiter.resume(token) as job:
            give_up_at = job.give_up_at
            assert give_up_at is not None
            await until_async(lambda: ends_by(valkey_server, give_up_at))
            assert time.monotonic() - start > MAX_HOLD - 0.3
            await until_async(lambda: job.is_lost)
        assert not await limiter.renew(token)


async def test_renewals_need_no_hand_on_the_clock() -> None:
    """The memory backend keeps a slot past its lease, too."""
    clock = FakeClock()
    limiter = Limiter(settings_of(SETTINGS), backend=MemoryBackend(clock=clock))
    async with limiter:
        lease = await limiter.acquire(api_key="a")
        for second in (0.5, 1.0, 1.5, 2.0):
            clock.set(second)
            lease.renew_at = 0.0
            limiter.engine.leases.renewing()._look()
            await turns()
        assert not lease.is_lost
        await lease.release()


def test_a_loop_that_has_ended_is_forgotten_but_not_what_it_lost() -> None:
    """The numbers go on over all event loops of a limiter, which keeps none that has ended."""
    limiter = Limiter(settings_of(SETTINGS), backend=MemoryBackend(clock=(clock := FakeClock())))
    leases = limiter.engine.leases

    async def lose() -> None:
        lease = await limiter.acquire(api_key="a")
        clock.now += 2_000_000
        assert not await leases.renewing().renew(lease, 1.0)

    for turn in (1, 2, 3):
        asyncio.run(lose())
        assert leases.slots_lost == turn
        assert len(leases.renewals) == 1
