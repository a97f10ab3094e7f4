"""One limiter in the event loops of several threads."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest

from ratelimit_mw import Limiter, RateLimited
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.outage import reconcile, sync_task
from ratelimit_mw._internal.policy import policy
from tests.support.asgi import settings_of
from tests.support.servers import StoreServer
from tests.support.topologies import Cluster

THREADS, KEYS, QUOTA = 4, 80, 20
EACH = 1_600
"""Requests of each thread: 80 of each key in all."""


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_threads_share_one_count_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread a request comes by, no quota is exceeded, no request lost, and none fails."""
    monkeypatch.setattr(policy, "MAX_POLICIES", KEYS // 2)
    plan = f'plans.default = {{requests = ["{QUOTA}/hour"], concurrent = 50}}'
    limiter = Limiter(settings_of(plan))

    async def ask(thread: int) -> int:
        admitted = 0
        for number in range(EACH):
            key = f"key {(number * 7 + thread) % KEYS}"
            with contextlib.suppress(RateLimited):
                async with await limiter.acquire(api_key=key, address="192.0.2.1") as lease:
                    admitted += lease.allowed
        await limiter.close()
        return admitted

    with ThreadPoolExecutor(THREADS) as threads:
        admitted = sum(threads.map(lambda thread: asyncio.run(ask(thread)), range(THREADS)))
    assert admitted == KEYS * QUOTA
    assert sum(limiter.engine.decision_counts.totals().values()) == THREADS * EACH


@pytest.fixture
def redis_url(redis_server: StoreServer) -> str:
    """The address of a Redis."""
    return redis_server.url


@pytest.fixture
def cluster_url(shared_cluster: Callable[[str], Cluster]) -> str:
    """The address of a cluster."""
    return shared_cluster("redis").url


class Flapping(MemoryBackend):
    """A backend that is reached now and then, until it is back."""

    is_back = False
    asked = 0

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Answer every third question until it is back."""
        self.asked += 1
        if not self.is_back and (self.asked < 0 or self.asked % 3):
            raise BackendError("nobody answers")
        return super().ask(charge, lease_id, price)

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Let others have a turn, as a server does, and answer or not."""
        await asyncio.sleep(0)
        return self.ask(charge, lease_id, price)

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Let others have a turn, as a server does, and answer or not."""
        await asyncio.sleep(0)
        return self.ask(charge, lease_id, price)


CALLERS, SECONDS = 4_000, 20.0


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("most", [reconcile.MAX_UNSYNCED, 300])
def test_threads_owe_and_the_backend_is_told_of_all(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several event loops tells of all their admissions in an outage, while others go on admitting."""
    monkeypatch.setattr(reconcile, "MAX_UNSYNCED", most)
    backend = Flapping()
    text = 'plans.default = {requests = ["9/hour"], concurrent = 5}\nbackend.local_share = 1.0'
    limiter = Limiter(settings_of(text), backend=backend)
    told_all, looked = Event(), 0

    async def ask(thread: int) -> int:
        admitted = 0
        try:
            for number in range(CALLERS // THREADS):
                async with await limiter.acquire(api_key=f"key {thread} {number}") as lease:
                    admitted += lease.allowed
            backend.is_back = True
            give_up = time.monotonic() + SECONDS
            while limiter.stats().unsynced and time.monotonic() < give_up:
                await asyncio.sleep(0.01)
        finally:
            told_all.set()
        return admitted

    def look() -> None:
        """Read the figures from a thread without an event loop all the while."""
        nonlocal looked
        while not told_all.is_set():
            looked += limiter.stats().leases >= 0

    with ThreadPoolExecutor(THREADS + 1) as threads:
        looking = threads.submit(look)
        admitted = sum(threads.map(lambda thread: asyncio.run(ask(thread)), range(THREADS)))
        looking.result()
    assert looked
    stats = limiter.stats()
    assert (admitted, stats.unsynced) == (CALLERS, 0)
    told = sum(log.used for logs in backend._logs.values() for log in logs.values())
    assert told + stats.unsynced_lost >= CALLERS
    assert most < CALLERS or (told, stats.unsynced_lost) == (CALLERS, 0)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_figures_are_read_from_any_thread(scheme: str, request: pytest.FixtureRequest) -> None:
    """A thread without an event loop, such as a metrics server's, reads figures while requests flow."""
    name = "cluster_url" if "cluster" in scheme else "redis_url"
    url = request.getfixturevalue(name)
    text = 'plans.default = {concurrent = 50}\nidentity.hash_secret = "a secret of a test"\n'
    limiter = Limiter(settings_of(f'{text}backend = {{url = "{url}", timeout = 5}}'))
    is_over = Event()

    async def ask(number: int) -> None:
        async with await limiter.acquire(api_key=f"key {number % 40}"):
            await asyncio.sleep(0)

    async def serve() -> None:
        try:
            async with limiter:
                for _ in range(30):
                    await asyncio.gather(*[ask(number) for number in range(100)])
        finally:
            is_over.set()

    def look() -> int:
        number = 0
        while not is_over.is_set():
            stats = limiter.stats()
            number += stats.load.owed >= 0 and stats.backend_up
        return number

    with ThreadPoolExecutor(3) as threads:
        looking = [threads.submit(look) for _ in range(2)]
        threads.submit(lambda: asyncio.run(serve())).result()
        assert min([each.result() for each in looking]) > 0


async def test_what_a_loop_leaves_untold_another_one_tells() -> None:
    """The loop that began to tell may end: whichever serves on tells the rest, without another request."""
    backend = Flapping()
    backend.asked = -(10**6)
    limiter = Limiter(settings_of('plans.default = {requests = ["9/hour"]}'), backend=backend)
    has_asked, may_end = Event(), Event()

    async def ask_and_wait() -> None:
        await limiter.acquire(api_key="a")
        has_asked.set()
        while not may_end.is_set():
            await asyncio.sleep(0.01)

    first = Thread(target=lambda: asyncio.run(ask_and_wait()))
    first.start()
    assert has_asked.wait(SECONDS)
    await limiter.acquire(api_key="b")
    may_end.set()
    first.join(SECONDS)
    assert limiter.stats().unsynced == 2
    backend.is_back = True
    async with asyncio.timeout(SECONDS):
        while limiter.stats().unsynced:
            await asyncio.sleep(0.01)


async def test_telling_goes_on_after_what_it_was_not_made_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Any exception while telling is logged and tried again, and never the end of it."""
    monkeypatch.setattr(sync_task, "PAUSE", 0.01)
    backend = Flapping()
    limiter = Limiter(settings_of('plans.default = {requests = ["9/hour"]}'), backend=backend)

    async def broken(*_: object) -> Outcome:
        raise RuntimeError("no such thing was ever seen")

    await limiter.acquire(api_key="a")
    with monkeypatch.context() as patched:
        patched.setattr(backend, "restore", broken)
        async with asyncio.timeout(SECONDS):
            while "tried again" not in caplog.text:
                await asyncio.sleep(0.01)
    backend.is_back = True
    async with asyncio.timeout(SECONDS):
        while limiter.stats().unsynced:
            await asyncio.sleep(0.01)
    assert await limiter.engine.peek(
        limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
    )
