"""Units taken ahead by worker processes on a real server, by its clock and theirs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.cache.prefetch import steady_clock
from ratelimit_mw._internal.cache.prefetch_state import PrefetchedBlock, PrefetchState
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.policy.policy import Policy
from tests.conftest import StartServer
from tests.support.servers import StoreServer
from tests.support.slots import until
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

QUOTA = 600
PROCESSES = 3
TASKS = 8
"""Requests that each process has under way at once."""
PAUSES = (0.005, 0.06) * 4
"""Seconds. A block lives half as long as the longer ones."""
PATIENCE = 120.0
"""Seconds after which something is wrong that has not happened, however busy the machine is."""


def settings(url: str, *rates: str, **plan: object) -> Settings:
    """A plan that takes units ahead, and a route that every caller shares."""
    return Settings.model_validate(
        {
            "backend": {"url": url, "timeout": 5},
            "identity": {"hash_secret": "a secret of some length, for tests alone"},
            "plans": {"default": {"requests": rates, "prefetch": True, **plan}},
            "routes": [
                {"path": "/shared", "total": ["100000/minute"]},
                {"path": "/own", "requests": ["50000/minute"], "slot": False},
            ],
        }
    )


def shared(url: str) -> Settings:
    """A limit of all callers that workers take units ahead of, and plans that ask for their own limits."""
    said = settings(url, "100000/second", on_failure="deny", prefetch=False, concurrent=TASKS)
    application = said.application.model_copy(
        update={"requests": (Window(QUOTA, 1, "second"),), "prefetch": True}
    )
    return said.model_copy(update={"application": application})


class Worker:
    """A process that asks for units without a pause until it is told to end."""

    def __init__(self, url: str, file: Path, whose: str) -> None:
        """Start the process; it writes the units that it was given to `file`."""
        command = [sys.executable, "-m", "tests.integration.test_prefetch_processes", url, whose, file.name]
        root = Path(__file__).parents[2]
        self._file = file
        with file.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=root, bufsize=0, stdin=subprocess.PIPE, stdout=output
            )

    def pause(self, seconds: float) -> None:
        """Let it stop when it next has units in hand, and go on after so many seconds or more."""
        self._let_it_get(signal.SIGSTOP)
        until(lambda: os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG), PATIENCE)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """Let it be killed when it next has units in hand."""
        self._let_it_get(signal.SIGKILL)
        assert self._process.wait(PATIENCE) == -signal.SIGKILL

    def _let_it_get(self, number: signal.Signals) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % number)

    def end(self) -> None:
        """Let it end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE) == 0

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()

    @property
    def admitted(self) -> list[tuple[int, int]]:
        """Of each of its admissions: from when to when it may have happened."""
        lines = [line.split() for line in self._lines()]
        return [(int(before), int(after)) for before, after in lines if before != b"asked"]

    @property
    def asked(self) -> int:
        """Number of units that it has asked for, once it has ended."""
        return int(self._lines()[-1].split()[1])

    def was_admitted_since(self, at: int) -> bool:
        """Whether it was admitted with a request of this time or later."""
        lines = self._lines()
        return bool(lines) and int(lines[-1].split()[0]) >= at

    def _lines(self) -> list[bytes]:
        return self._file.read_bytes().rpartition(b"\n")[0].splitlines()


@contextmanager
def working(url: str, folder: Path, whose: str) -> Iterator[list[Worker]]:
    """Processes that ask for units without a pause; each was given some."""
    with ExitStack() as stack:
        workers = []
        for number in range(PROCESSES):
            worker = Worker(url, folder / f"worker-{number}", whose)
            stack.callback(worker.close)
            workers.append(worker)
        until(lambda: all(worker.was_admitted_since(0) for worker in workers), PATIENCE)
        yield workers


def now() -> int:
    """The microseconds of a clock that all processes share."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def surely_in(admitted: list[tuple[int, int]], length: int) -> int:
    """The most admissions that some interval of this length is sure to hold."""
    first, last = sorted(at for at, _ in admitted), sorted(at for _, at in admitted)
    return max(bisect_left(last, at + length) - n for n, at in enumerate(first))


@pytest.mark.parametrize("whose", ["own", "shared"])
def test_no_interval_holds_more_and_nearly_all_can_be_had(
    redis_server: StoreServer, tmp_path: Path, whose: str
) -> None:
    """Three processes that never stop asking get most of the limit, and never more than it.

    How much at least is shown in `test_prefetch.py`, where no machine is too busy to ask for it.
    """
    with working(redis_server.url, tmp_path, whose) as workers:
        time.sleep(2.5)
        for worker in workers:
            worker.end()
    admitted = [each for worker in workers for each in worker.admitted]
    assert surely_in(admitted, SECOND) <= QUOTA
    lasted = (max(admitted)[1] - min(admitted)[0]) / SECOND
    assert lasted > 1
    assert len(admitted) > 0.7 * min(QUOTA * lasted, sum(worker.asked for worker in workers))


@pytest.mark.parametrize("whose", ["own", "shared"])
def test_no_interval_holds_more_when_workers_pause_and_die(
    redis_server: StoreServer, tmp_path: Path, whose: str
) -> None:
    """One stops again and again with units in hand, also for longer than they last; one is killed with some.

    Nothing depends on how fast that goes: a worker stops when it has units, and all is over when the others
    have gone on for a window. On a busy machine fewer admissions are sure to lie in an interval, never more.
    """
    with working(redis_server.url, tmp_path, whose) as workers:
        paused, killed, other = workers
        for number, seconds in enumerate(PAUSES):
            paused.pause(seconds)
            if number == len(PAUSES) // 2:
                killed.die()
        window_is_over = now() + SECOND
        until(lambda: paused.was_admitted_since(window_is_over), PATIENCE)
        until(lambda: other.was_admitted_since(window_is_over), PATIENCE)
        paused.end()
        other.end()
    admitted = [each for worker in workers for each in worker.admitted]
    assert surely_in(admitted, SECOND) <= QUOTA


def _calls(server: StoreServer) -> int:
    with server.client() as client:
        stats: dict[str, Any] = client.info("commandstats")
        calls = int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])
        client.config_resetstat()
    return calls


@pytest.mark.parametrize("path", ["/", "/own"])
async def test_most_requests_ask_nobody(server: StoreServer, path: str) -> None:
    """A busy caller costs far fewer calls than requests, also on a route with limits of its own."""
    async with Limiter(settings(server.url, "100000/minute", "1000000/hour", concurrent=5)) as limiter:
        limiter.apply(settings(server.url, "100000/minute", "1000000/hour"))
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", path)
        _calls(server)
        lease = await limiter.engine.charge(policy)
        for number in range(3_999):
            lease = await limiter.engine.charge(policy)
            assert lease.allowed
            if number % 20 == 0:
                await asyncio.sleep(0.001)  # as requests arrive: not all at once
        assert _calls(server) < 4_000 / 5
        assert sum(limiter.engine.decision_counts.totals().values()) == 4_000
        window, status = next(iter((await limiter.engine.peek(policy)).windows()))
        assert 4_000 <= status.used <= 4_000 * 1.03
        shown = [figures.used for _, figures in lease.decision.windows()]
        assert all(3_500 <= used <= 4_000 * 1.03 for used in shown)
        assert window.text == "100000/minute"


async def test_a_shared_limit_costs_few_calls_and_no_step_on_a_cluster(cluster: Cluster) -> None:
    """Callers ask for their own limits, and hardly ever for the one that all of them share."""
    said = settings(cluster.url, "100000/minute", prefetch=False)
    application = said.application.model_copy(
        update={"requests": (Window(1_000_000, 1, "minute"),), "prefetch": True}
    )
    async with Limiter(said.model_copy(update={"application": application})) as limiter:
        engine = limiter.engine
        policies = [
            engine.policies.match(engine.identity_of(api_key=f"k{number}"), "GET", "/")
            for number in range(20)
        ]
        for number in range(2_000):
            lease = await engine.charge(policies[number % 20])
            assert lease.allowed
        steps = engine.backend.load.operations
        assert 2_000 <= steps < 2_000 * 1.2
        shared_limit = (await engine.peek(policies[0])).limits[-1]
        assert isinstance(shared_limit.status, WindowStatus)
        assert shared_limit.counter.owner == "everyone"
        assert 2_000 <= shared_limit.status.used <= 2_000 * 1.5


@pytest.mark.parametrize(("path", "plan"), [("/shared", {}), ("/", {"concurrent": 500})])
async def test_what_is_not_the_callers_own_windows_alone_goes_on_as_ever(
    server: StoreServer, path: str, plan: dict[str, object]
) -> None:
    """Requests that take a slot, or draw on what all callers share, ask the server each time."""
    async with Limiter(settings(server.url, "100000/minute", **plan)) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", path)
        assert policy.prefetch_state is None
        for _ in range(300):
            async with await limiter.engine.charge(policy) as lease:
                assert lease.allowed
        assert limiter.engine.backend.load.operations >= 300


async def test_units_in_hand_are_spent_while_the_server_is_away(start_server: StartServer) -> None:
    """For as long as they last; then the settings decide."""
    server = start_server("redis")
    async with Limiter(settings(server.url, "100000/hour", on_failure="deny")) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
        while policy.prefetch_state is None or policy.prefetch_state.block is None:
            assert (await limiter.engine.charge(policy)).allowed
            await asyncio.sleep(0)
        left = policy.prefetch_state.block.left
        server.kill()
        decisions = [(await limiter.engine.charge(policy)).decision for _ in range(left + 1)]
        assert [each.policy for each in decisions] == ["shared"] * left + ["deny"]
        assert {(each.cost, each.price_micros) for each in decisions} == {(1, 0)}


async def test_a_reset_forgets_what_is_in_hand(server: StoreServer) -> None:
    """After it a caller starts from nothing, with nothing in hand that is counted nowhere."""
    async with Limiter(settings(server.url, "100000/hour")) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
        while policy.prefetch_state is None or policy.prefetch_state.block is None:
            await limiter.engine.charge(policy)
            await asyncio.sleep(0)
        await limiter.engine.reset(policy)
        lease = await limiter.engine.charge(policy)
        assert [figures.used for _, figures in lease.decision.windows()] == [1]


# what the processes do ------------------------------------------------------------------------------


async def ask(url: str, whose: str, name: str) -> None:
    """Ask for units until the input ends, and write of each that was had from when to when it may have been.

    Each line of the input is a signal, which this process sends to itself when it has units in hand.
    """
    loop, clock, asked = asyncio.get_running_loop(), steady_clock(), 0
    over, signals = asyncio.Event(), deque[int]()

    def listen() -> None:
        lines = os.read(sys.stdin.fileno(), 100)
        signals.extend(map(int, lines.split()))
        if not lines:
            loop.remove_reader(sys.stdin)
            over.set()

    def have_units(block: PrefetchedBlock | None) -> bool:
        return block is not None and block.left > 1 and clock() < block.until

    async def work(limiter: Limiter, policy: Policy, prefetch_state: PrefetchState) -> None:
        nonlocal asked
        while not over.is_set():
            asked += 1
            before = now()
            lease = await limiter.engine.charge(policy)
            if lease.allowed:
                os.write(1, b"%d %d\n" % (before, now()))
                limiter.engine.leases.end(lease, failed=False)
            if signals and have_units(prefetch_state.block):
                os.kill(os.getpid(), signals.popleft())
            await asyncio.sleep(0 if lease.allowed else 0.001)

    loop.add_reader(sys.stdin, listen)
    own = settings(url, f"{QUOTA}/second", on_failure="deny")
    async with Limiter(own if whose == "own" else shared(url)) as limiter:
        key = "k" if whose == "own" else name  # callers of their own share one limit
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key=key), "GET", "/")
        state = policy.prefetch_state if policy.ahead is None else policy.ahead.shared[0]
        assert state is not None
        await asyncio.gather(*[work(limiter, policy, state) for _ in range(TASKS)])
    os.write(1, b"asked %d\n" % asked)


if __name__ == "__main__":
    asyncio.run(ask(*sys.argv[1:]))
