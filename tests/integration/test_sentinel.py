"""A primary that sentinels watch over: found through them, and followed when another takes over."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.support.conformance import Waits, daily, eventually, new_id, slots, window
from tests.support.servers import StoreServer, server_binaries
from tests.support.statuses import peeked
from tests.support.topologies import SERVICE, Sentinels, master_of, running, wait_until

pytestmark = pytest.mark.rerun

KINDS = [
    pytest.param(kind, marks=[pytest.mark.slow] if kind != "redis" else [])
    for kind in sorted(server_binaries())
]
TIMEOUT = 0.5
SLACK = 0.4
"""Seconds that the end of a wait may come later."""
CHARGE = Charge([window(100_000, 1, "hour")])
WINDOW_KEY = "ratelimit:{caller}:w:p:3600"
MOST_OUTAGE = 60.0
"""Seconds that a fail-over may take on a busy machine, where a vote may have to be taken again."""
MOST_MOVE = 1.0
"""Seconds within which a running process follows what the sentinels say; they are told it at once."""
MOST_LATE_MOVE = 4.0
"""Seconds for this if the sentinels may only be asked, every two seconds at most."""
FEWER_RIGHTS = (
    "resetkeys resetchannels -@all +auth +client|setname +client|setinfo +sentinel|get-master-addr-by-name"
)
RIGHTS = f"{FEWER_RIGHTS} +sentinel|master +subscribe &+switch-master &+promoted-slave"
MOST_LOST = 400
"""Units that a primary may take with it: what it had admitted and not handed on, in a second at most."""


@pytest.fixture(params=KINDS)
def sentinels(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sentinels]:
    """Three sentinels, a primary and two replicas, to be killed."""
    sentinels = Sentinels(request.param, tmp_path)
    with running(sentinels):
        yield sentinels


@asynccontextmanager
async def backends(url: str, number: int = 1, timeout: float = TIMEOUT) -> AsyncIterator[list[RedisBackend]]:
    """Connected backends, as several processes would have them."""
    opened = [RedisBackend(url, timeout=timeout) for _ in range(number)]
    try:
        for backend in opened:
            await backend.open()
        yield opened
    finally:
        for backend in opened:
            await backend.close()


class Load:
    """Charges some two hundred times a second for each backend, until told to stop."""

    def __init__(self, backends: list[RedisBackend], *, pause: float = 0.005) -> None:
        self.admitted = 0
        self.failed_at: list[float] = []
        self.waits = Waits()
        self._pause = pause
        self._done = False
        self._tasks = [asyncio.create_task(self._run(backend)) for backend in backends]

    async def stop(self) -> None:
        """Wait for what is under way; raises what a charge should not have raised."""
        self._done = True
        await asyncio.gather(*self._tasks)
        assert self.waits.longest < TIMEOUT + SLACK + self.waits.late

    async def _run(self, backend: RedisBackend) -> None:
        while not self._done:
            async with self.waits.one():
                try:
                    self.admitted += (await backend.acquire(CHARGE, new_id())).admitted
                except BackendError:
                    self.failed_at.append(time.monotonic())
            await self.waits.pause(self._pause)


@pytest.mark.parametrize("end", ["killed", "hung"])
async def test_a_primary_that_is_gone_is_replaced(
    sentinels: Sentinels, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed, or hanging, under load: `BackendError` and nothing else until a replica took over.

    What the primary had admitted and not yet handed on to a replica is lost, and nothing else. One that
    hung and wakes up again is not gone back to, though it still takes itself for the primary.
    """
    owed = Charge([slots(5), daily(1_000)])
    async with backends(sentinels.url, 2) as (one, two):
        await eventually(lambda: _all_serve(one, two))
        held = (await one.acquire(owed, new_id(), 100)).reservation
        before = (await peeked(two, CHARGE)).used(0)
        load = Load([one, two])
        await asyncio.sleep(0.5)
        gone, gone_at = sentinels.primary, time.monotonic()
        (gone.kill if end == "killed" else gone.stop_signal)()
        await eventually(lambda: _all_away(one, two))
        released = asyncio.ensure_future(one.finish(held, EstimateAction.GIVE_BACK))
        await eventually(lambda: _all_there(one, two), MOST_OUTAGE)
        outage = time.monotonic() - gone_at
        await released
        gone.continue_signal()
        await asyncio.sleep(0.5)
        await load.stop()
        counted = [(await peeked(each, CHARGE)).used(0) - before for each in (one, two)]
        assert [figures[:2] for figures in (await peeked(two, owed)).statuses] == [(0, 0), (0, 0)]
        wait_until(lambda: sentinels.primary is not gone, "sentinel that is asked")
    lost = load.admitted - counted[0]
    with capsys.disabled():
        print(f"\n{gone.kind} {end}: away for {outage:.2f} s, lost {lost} of {load.admitted} units")  # noqa: T201
    assert counted[0] == counted[1]
    assert lost <= MOST_LOST


async def test_a_demoted_primary_is_left(sentinels: Sentinels) -> None:
    """A fail-over that an operator asks for is followed, though the old primary stays there as a replica."""
    async with backends(sentinels.url) as (backend,):
        before = sentinels.primary
        await backend.acquire(CHARGE, new_id())
        with sentinels.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE)
        wait_until(lambda: sentinels.primary is not before, "fail-over")

        async def is_counted() -> bool:
            try:
                return (await backend.acquire(CHARGE, new_id())).admitted
            except BackendError:
                return False

        await eventually(is_counted, MOST_OUTAGE)
        with sentinels.primary.client() as client:
            wait_until(lambda: client.role()[0] == b"master", "primary")

            async def is_there() -> bool:
                await is_counted()
                return bool(client.exists(WINDOW_KEY))

            await eventually(is_there, MOST_OUTAGE)


@pytest.mark.parametrize(("rights", "most_move"), [(RIGHTS, MOST_MOVE), (FEWER_RIGHTS, MOST_LATE_MOVE)])
async def test_a_planned_fail_over_moves_running_processes(
    sentinels: Sentinels,
    rights: str,
    most_move: float,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The old primary takes writes for ten seconds more: nobody counts on it, or settles there.

    Requests wait for the move and none fails; it is said once by each process, and called no outage. The
    rights that are documented are enough, and with fewer it takes no longer than between two questions.
    """
    caplog.set_level(logging.WARNING, "ratelimit_mw")
    old = sentinels.primary
    held = Charge([slots(5), daily(1_000)])
    for sentinel in sentinels.sentinels:
        with sentinel.client() as client:
            client.execute_command("ACL", "SETUSER", "workers", "on", ">secret", *rights.split())
    url = f"{sentinels.url}?sentinel_username=workers&sentinel_password=secret"
    async with backends(url, 2, timeout=5) as (one, two):
        reservation = (await one.acquire(held, new_id(), 100)).reservation
        load = Load([one, two], pause=0.02)
        with sentinels.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE)
        await eventually(lambda: _is_named(sentinels, old), MOST_OUTAGE)
        named_at = time.monotonic()
        await eventually(lambda: _has_moved(caplog, 2), MOST_OUTAGE)
        move = time.monotonic() - named_at
        with old.client() as client:
            assert client.role()[0] == b"master"
            before = client.get(WINDOW_KEY)
            await asyncio.sleep(0.5)
            assert client.get(WINDOW_KEY) == before
        await load.stop()
        assert await one.settle(reservation, 30) is Settlement.SETTLED
        async with backends(sentinels.url, timeout=5) as (new,):
            counted = [(await peeked(each, CHARGE)).used(0) for each in (one, two, new)]
            assert (await peeked(new, held)).statuses[1][:2] == (30, 0)
    with capsys.disabled():
        lost = load.admitted - counted[0]
        print(f"\n{old.kind} demoted: moved in {move:.2f} s, lost {lost} of {load.admitted} units")  # noqa: T201
    assert len(set(counted)) == 1
    assert load.failed_at == []
    assert move < most_move
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert all("backend has moved: the sentinels name " in each for each in said)


async def test_a_sentinel_that_missed_a_fail_over_leads_nobody_back(sentinels: Sentinels) -> None:
    """Asked alone it names the old primary, which still takes writes: what a later fail-over said counts."""
    old, (first, second, third) = sentinels.primary, sentinels.sentinels
    async with backends(sentinels.url, timeout=5) as (backend,):
        await backend.acquire(CHARGE, new_id())
        third.kill()
        with first.client() as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE)
        await eventually(lambda: _is_named(sentinels, old), MOST_OUTAGE)
        new = sentinels.primary
        await eventually(lambda: _counts_on(backend, new), MOST_OUTAGE)
        first.kill()
        second.kill()
        await asyncio.to_thread(third.restart)
        with new.client() as server, old.client() as zombie:
            assert master_of(third)["port"] == old.port
            zombie.replicaof("NO", "ONE")
            before = zombie.get(WINDOW_KEY)
            server.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.5)
            await eventually(lambda: _counts_on(backend, new), MOST_OUTAGE)
            assert zombie.get(WINDOW_KEY) == before


async def test_sentinels_that_are_down_are_passed_over(sentinels: Sentinels) -> None:
    """One sentinel that answers is enough; with none, the backend is away and comes back on its own."""
    first, second, third = sentinels.sentinels
    first.kill()
    second.kill()
    async with backends(sentinels.url, timeout=5) as (backend,):
        assert (await backend.acquire(CHARGE, new_id())).admitted
    third.kill()
    async with backends(sentinels.url) as (backend,):
        with pytest.raises(BackendError, match=r"no sentinel names the primary|no connection within"):
            await backend.acquire(CHARGE, new_id())
        second.restart()
        await eventually(lambda: _all_serve(backend), MOST_OUTAGE)


async def test_settings_name_sentinels(sentinels: Sentinels) -> None:
    """A limiter and the live keys find the primary under both schemes."""
    for scheme in ("redis", "valkey"):
        settings = BackendSettings(url=SecretURL(f"{sentinels.url}/0".replace("redis", scheme, 1)), timeout=5)
        async with (
            Limiter(Settings(backend=settings)) as limiter,
            await limiter.acquire(api_key="k") as lease,
        ):
            assert lease.decision.policy == "shared"
        store = open_key_store(settings)
        await store.write({"hash": b"entry"})
        assert await store.entries() == {"hash": b"entry"}
        await store.close()


async def test_servers_and_sentinels_have_logins_of_their_own(tmp_path: Path) -> None:
    """The URL's user and password are the servers'; its query has those of the sentinels."""
    sentinels = Sentinels("redis", tmp_path, password="p@ss", sentinel_password="s&ntinel")
    with running(sentinels):
        hosts = sentinels.url.partition("://")[2]
        url = f"redis+sentinel://:p%40ss@{hosts}/0?sentinel_password=s%26ntinel"
        async with backends(url, timeout=5) as (backend,):
            assert (await backend.acquire(CHARGE, new_id())).admitted
        async with backends(f"redis+sentinel://:p%40ss@{hosts}/0", timeout=2) as (backend,):
            with pytest.raises(BackendError, match="Authentication required"):
                await backend.acquire(CHARGE, new_id())


async def _all_there(*backends: RedisBackend) -> bool:
    return all(backend.error is None for backend in backends)


async def _all_serve(*backends: RedisBackend) -> bool:
    try:
        return all([(await backend.acquire(CHARGE, new_id())).admitted for backend in backends])
    except BackendError:
        return False


async def _all_away(*backends: RedisBackend) -> bool:
    return all(backend.error is not None for backend in backends)


async def _is_named(sentinels: Sentinels, old: StoreServer) -> bool:
    """Whether all sentinels that run name another primary than `old`."""
    for sentinel in (each for each in sentinels.sentinels if each.alive):
        with sentinel.client() as client:
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        if int(port) == old.port:
            return False
    return True


async def _has_moved(caplog: pytest.LogCaptureFixture, times: int) -> bool:
    return sum("has moved" in record.message for record in caplog.records) == times


async def _counts_on(backend: RedisBackend, server: StoreServer) -> bool:
    """Whether a charge changes what a server holds."""
    try:
        with server.client() as client:
            before = client.get(WINDOW_KEY)
            return await _all_serve(backend) and client.get(WINDOW_KEY) != before
    except redis.ConnectionError:
        return False  # a server that is promoted cuts all connections
