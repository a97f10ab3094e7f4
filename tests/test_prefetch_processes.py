"""Units taken ahead by worker processes on a real server, by its clock and theirs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limiter, Settings
from ratelimit_mw.limits import SECOND
from tests.conftest import StartServer
from tests.servers import StoreServer

QUOTA = 600
PROCESSES = 3
TASKS = 8
"""Requests that each process has under way at once."""


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


@contextmanager
def working(url: str, folder: Path, seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that ask for units without a pause, for so many seconds from when they are ready."""
    command = [sys.executable, "-m", "tests.test_prefetch_processes", url, str(seconds)]
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            output = stack.enter_context((folder / f"worker-{number}").open("wb"))
            process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=output)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + 30
        while not all(_admitted(folder / f"worker-{n}") for n in range(PROCESSES)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield processes


def _admitted(file: Path) -> list[tuple[int, int]]:
    """Of each admission of a process: from when to when it may have happened."""
    whole = file.read_text().rpartition("\n")[0]
    lines = [line.split() for line in whole.splitlines()]
    return [(int(before), int(after)) for before, after in lines if before != "asked"]


def _all_admitted(folder: Path) -> list[tuple[int, int]]:
    return [each for number in range(PROCESSES) for each in _admitted(folder / f"worker-{number}")]


def surely_in(admitted: list[tuple[int, int]], length: int) -> int:
    """The most admissions that some interval of this length is sure to hold."""
    first, last = sorted(at for at, _ in admitted), sorted(at for _, at in admitted)
    return max(bisect_left(last, at + length) - n for n, at in enumerate(first))


def test_no_interval_holds_more_and_nearly_all_can_be_had(redis_server: StoreServer, tmp_path: Path) -> None:
    """Three processes that never stop asking get most of the limit, and never more than it.

    How much at least is shown in `test_prefetch.py`, where no machine is too busy to ask for it.
    """
    with working(redis_server.url, tmp_path, 2.5) as processes:
        for process in processes:
            assert process.wait(30) == 0
    admitted = _all_admitted(tmp_path)
    assert surely_in(admitted, SECOND) <= QUOTA
    lasted = (max(admitted)[1] - min(admitted)[0]) / SECOND
    assert lasted > 1
    asked = sum(int((tmp_path / f"worker-{n}").read_text().split()[-1]) for n in range(PROCESSES))
    assert len(admitted) > 0.7 * min(QUOTA * lasted, asked)


def test_no_interval_holds_more_when_workers_pause_and_die(redis_server: StoreServer, tmp_path: Path) -> None:
    """One is stopped again and again for longer than its units last, one is killed with units in hand."""
    with working(redis_server.url, tmp_path, 2.5) as (paused, killed, other):
        for number in range(12):
            paused.send_signal(signal.SIGSTOP)
            time.sleep(0.06)  # more than twice as long as a block lives
            paused.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            if number == 5:
                killed.kill()
        assert other.wait(30) == paused.wait(30) == 0
    admitted = _all_admitted(tmp_path)
    assert surely_in(admitted, SECOND) <= QUOTA, "a second held more than was sold"
    lasted = [max(_admitted(tmp_path / f"worker-{n}"))[1] for n in range(PROCESSES)]
    assert lasted[0] > lasted[1], "the one that was stopped did not go on"


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
        policy = limiter.policies.match(limiter.identity_of(api_key="k"), "GET", path)
        _calls(server)
        lease = await limiter.charge(policy)
        for number in range(3_999):
            lease = await limiter.charge(policy)
            assert lease.allowed
            if number % 20 == 0:
                await asyncio.sleep(0.001)  # as requests arrive: not all at once
        assert _calls(server) < 4_000 / 5
        assert sum(limiter.tally.totals().values()) == 4_000
        window, figures = next(iter((await limiter.peek(policy)).windows()))
        assert 4_000 <= figures.used <= 4_000 * 1.03
        shown = [figures.used for _, figures in lease.decision.windows()]
        assert all(3_500 <= used <= 4_000 * 1.03 for used in shown)
        assert window.text == "100000/minute"


@pytest.mark.parametrize(("path", "plan"), [("/shared", {}), ("/", {"concurrent": 500})])
async def test_what_is_not_the_callers_own_windows_alone_goes_on_as_ever(
    server: StoreServer, path: str, plan: dict[str, object]
) -> None:
    """Requests that take a slot, or draw on what all callers share, ask the server each time."""
    async with Limiter(settings(server.url, "100000/minute", **plan)) as limiter:
        policy = limiter.policies.match(limiter.identity_of(api_key="k"), "GET", path)
        assert policy.stock is None
        for _ in range(300):
            async with await limiter.charge(policy) as lease:
                assert lease.allowed
        assert limiter.backend.load.operations >= 300


async def test_units_in_hand_are_spent_while_the_server_is_away(start_server: StartServer) -> None:
    """For as long as they last; then the settings decide."""
    server = start_server("redis")
    async with Limiter(settings(server.url, "100000/hour", on_failure="deny")) as limiter:
        policy = limiter.policies.match(limiter.identity_of(api_key="k"), "GET", "/")
        while policy.stock is None or policy.stock.block is None:
            assert (await limiter.charge(policy)).allowed
            await asyncio.sleep(0)
        left = policy.stock.block.left
        server.kill()
        decisions = [(await limiter.charge(policy)).decision.policy for _ in range(left + 1)]
        assert decisions == ["shared"] * left + ["deny"]


async def test_a_reset_forgets_what_is_in_hand(server: StoreServer) -> None:
    """After it a caller starts from nothing, with nothing in hand that is counted nowhere."""
    async with Limiter(settings(server.url, "100000/hour")) as limiter:
        policy = limiter.policies.match(limiter.identity_of(api_key="k"), "GET", "/")
        while policy.stock is None or policy.stock.block is None:
            await limiter.charge(policy)
            await asyncio.sleep(0)
        await limiter.reset(policy)
        lease = await limiter.charge(policy)
        assert [figures.used for _, figures in lease.decision.windows()] == [1]


# what the processes do ------------------------------------------------------------------------------


async def ask(url: str, seconds: float) -> None:
    """Ask for units, and write of each that was had from when to when that may have been."""
    async with Limiter(settings(url, f"{QUOTA}/second")) as limiter:
        policy = limiter.policies.match(limiter.identity_of(api_key="k"), "GET", "/")
        end, asked = time.monotonic() + seconds, 0

        async def work() -> None:
            nonlocal asked
            while time.monotonic() < end:
                asked += 1
                before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
                lease = await limiter.charge(policy)
                if lease.allowed:
                    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
                    os.write(1, b"%d %d\n" % (before, after))
                await asyncio.sleep(0 if lease.allowed else 0.001)

        await asyncio.gather(*[work() for _ in range(TASKS)])
        os.write(1, b"asked %d\n" % asked)


if __name__ == "__main__":
    asyncio.run(ask(sys.argv[1], float(sys.argv[2])))
