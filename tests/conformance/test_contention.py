"""Many processes on one server, by its own clock: nothing is oversold, and nothing sold is refused."""

import asyncio
import json
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limit, Limiter, Settings
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from tests.support.conformance import STORES, SharedServer, daily, new_id, slots, window

PROCESSES = 3
BACKENDS = 3
"""Backends of each process: each has a connection of its own."""
TASKS = 12
"""Requests that each backend has under way at once."""

Ledger = list[tuple[int, int]]
"""The server's time and the cost of each charge that was admitted."""


class Workers:
    """Processes that do the same job at the same time."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "tests.conformance.test_contention", url]
        self._processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(PROCESSES)
        ]
        self._listen()

    def run(self, job: str, *arguments: float) -> list[Any]:
        """Have each process do the job; their answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([job, *arguments]) + "\n")
            process.stdin.flush()
        return self._listen()

    def _listen(self) -> list[Any]:
        answers: list[Any] = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers


@pytest.fixture(scope="module", params=STORES)
def workers(request: pytest.FixtureRequest, shared_server: SharedServer) -> Iterator[Workers]:
    """Processes on one server, of each kind in turn. They end when they have nothing to read any more."""
    with ExitStack() as stack:
        yield Workers(shared_server(request.param).url, stack)


def most_in(ledger: Ledger, length: int) -> int:
    """The largest cost that any interval [t, t + length) holds."""
    ledger = sorted(ledger)
    times = [at for at, _ in ledger]
    sums = [0, *accumulate(cost for _, cost in ledger)]
    return max(sums[last + 1] - sums[bisect_right(times, at - length)] for last, at in enumerate(times))


@pytest.mark.parametrize("quota", [50, 3_000])
def test_no_interval_holds_more_than_the_quota(workers: Workers, quota: int) -> None:
    """No interval of a window's length holds more than the quota of all processes together (invariant 2)."""
    ledger: Ledger = [(at, cost) for answer in workers.run("rate", quota, 2.2) for at, cost in answer]
    assert most_in(ledger, SECOND) <= quota
    lasted = (max(ledger)[0] - min(ledger)[0]) / SECOND
    assert lasted > 1.2
    # They never stop asking, so nearly all there is to have is had.
    assert sum(cost for _, cost in ledger) > 0.8 * quota * lasted


def test_nothing_that_was_sold_is_refused(workers: Workers) -> None:
    """In a fresh window exactly the quota is admitted, to the last unit, whoever asks."""
    answers = workers.run("sold", 1_500, 700)
    assert sum(admitted for admitted, _ in answers) == 1_500
    assert sum(spent for _, spent in answers) == 700


def test_no_more_slots_at_once_than_there_are(workers: Workers) -> None:
    """At no time do the processes together hold more slots than there are, and they get to work."""
    changes = sorted((at, change) for answer in workers.run("slots", 5, 1.5) for at, change in answer)
    assert max(accumulate(change for _, change in changes)) == 5
    assert len(changes) > 100


@pytest.mark.parametrize("settles", [False, True])
def test_estimates_together_never_exceed_a_limit(workers: Workers, settles: bool) -> None:
    """No second holds more than its units, whether all estimates stay or all are settled for less."""
    answers = workers.run("estimates", 3_000 if settles else 900, 2.2, settles)
    ledger: Ledger = [(at, units) for answer in answers for at, units in answer]
    quota = 3_000 if settles else 900
    assert most_in(ledger, SECOND) <= quota
    lasted = (max(ledger)[0] - min(ledger)[0]) / SECOND
    assert lasted > 1.2
    assert len(ledger) > 20 * lasted


def test_failures_let_through_never_exceed_a_limit(workers: Workers) -> None:
    """No second holds more failures than the limit, though successes make room in between."""
    answers = workers.run("failures", 20, 2.2)
    failed: Ledger = [(at, 1) for answer in answers for at in answer[0]]
    assert most_in(failed, SECOND) <= 20
    assert len(failed) > 20
    assert sum(answer[1] for answer in answers) > 60, "successes"


def test_of_a_flood_of_failures_the_limit_gets_through(workers: Workers) -> None:
    """Of a thousand wrong tries from all processes exactly five are let in, and none afterwards."""
    assert sum(workers.run("flood", 5, 340)) == 5
    assert sum(workers.run("flood", 5, 20)) == 0


# what the processes do ------------------------------------------------------------------------------


async def rate(backends: list[RedisBackend], quota: int, seconds: float) -> Ledger:
    """Ask for units of one window without a pause; what was admitted."""
    ledger: Ledger = []
    end = time.monotonic() + seconds
    of = f"quota of {quota}"

    async def ask(backend: RedisBackend, cost: int) -> None:
        charge = Charge([window(quota, 1, "second", of=of), window(10**6, of=of)], cost)
        while time.monotonic() < end:
            outcome = await backend.acquire(charge, new_id())
            if outcome.admitted:
                ledger.append((outcome.now, cost))
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        for backend in backends:
            for task in range(TASKS):
                tasks.create_task(ask(backend, 1 + task % 3 if quota < 1_000 else 1 + 5 * task))
    return ledger


async def sold(backends: list[RedisBackend], quota: int, budget: int) -> tuple[int, int]:
    """Ask until refused twice in a row; how many charges of a window, and of a budget, were admitted."""

    async def ask(backend: RedisBackend, charge: Charge) -> int:
        admitted = refused = 0
        while refused < 2:
            outcome = await backend.acquire(charge, new_id(), 1)
            admitted += outcome.admitted
            refused = 0 if outcome.admitted else refused + 1
        return admitted

    counts = [
        await asyncio.gather(*[ask(backend, charge) for backend in backends for _ in range(TASKS)])
        for charge in (
            Charge([window(quota, 1, "hour"), slots(10**6)]),
            Charge([daily(budget), window(10**6, 1, "hour", of="app")]),
        )
    ]
    return sum(counts[0]), sum(counts[1])


async def take_slots(backends: list[RedisBackend], limit: int, seconds: float) -> Ledger:
    """Take and free slots without a pause; from when to when each was surely held."""
    changes: Ledger = []
    end = time.monotonic() + seconds

    async def work(backend: RedisBackend) -> None:
        charge = Charge([slots(limit, of="slots"), slots(limit + 2, of="app")])
        while time.monotonic() < end:
            outcome = await backend.acquire(charge, new_id())
            if outcome.admitted:
                changes.append((time.monotonic_ns(), 1))
                await asyncio.sleep(0.001)
                changes.append((time.monotonic_ns(), -1))
                await backend.finish(outcome.reservation, EstimateAction.KEEP)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for backend in backends:
            for _ in range(TASKS):
                tasks.create_task(work(backend))
    return changes


async def estimate(backends: list[RedisBackend], quota: int, seconds: float, settles: bool) -> Ledger:
    """Estimate units without a pause, and settle them for less perhaps; what counts in the end."""
    ledger: Ledger = []
    end = time.monotonic() + seconds
    limit = Counter(f"tokens of {quota}", "p:tokens", Window(quota, 1, "second", "tokens"))

    async def ask(backend: RedisBackend, units: int) -> None:
        charge = Charge([limit], estimates={"tokens": units})
        while time.monotonic() < end:
            outcome = await backend.acquire(charge, new_id())
            if outcome.admitted and settles:
                await asyncio.sleep(0.001)
                await backend.settle_units(outcome.reservation, {"tokens": units // 3})
            if outcome.admitted:
                ledger.append((outcome.now, units // 3 if settles else units))
                await backend.finish(outcome.reservation, EstimateAction.KEEP)
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        for backend in backends:
            for task in range(TASKS):
                tasks.create_task(ask(backend, 3 + 6 * task))
    return ledger


async def fail(backends: list[RedisBackend], limit: int, seconds: float) -> tuple[list[int], int]:
    """Try without a pause, mostly in vain; the times of the failures that were let in, and the successes."""
    failed: list[int] = []
    succeeded = 0
    end = time.monotonic() + seconds
    tries = Limit("tries", f"{limit}/second", count="failures").on("ann")

    async def work(limiter: Limiter, number: int) -> None:
        nonlocal succeeded
        while time.monotonic() < end:
            lease = await limiter.acquire(tries)
            if lease.allowed:
                await asyncio.sleep(0.002)
                number += 1
                fails = number % 5 == 0
                limiter.engine.leases.end(lease, fails, 401 if fails else 200)
                if fails:
                    failed.append(lease.decision.now_us)
                else:
                    succeeded += 1
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        for backend in backends:
            limiter = Limiter(Settings(), backend=backend)
            for number in range(TASKS):
                tasks.create_task(work(limiter, number))
    return failed, succeeded


async def flood(backends: list[RedisBackend], limit: int, number: int) -> int:
    """Fail so many times at once; how often that was let in."""
    tries = Limit("flood", f"{limit}/hour", count="failures").on("ann")
    limiters = [Limiter(Settings(), backend=backend) for backend in backends]

    async def try_once(limiter: Limiter) -> bool:
        lease = await limiter.acquire(tries)
        if lease.allowed:
            await asyncio.sleep(0.01)
            limiter.engine.leases.end(lease, True, 401)
        return lease.allowed

    return sum(await asyncio.gather(*[try_once(limiters[each % len(limiters)]) for each in range(number)]))


JOBS: dict[str, Callable[..., Awaitable[object]]] = {
    "rate": rate,
    "sold": sold,
    "slots": take_slots,
    "estimates": estimate,
    "failures": fail,
    "flood": flood,
}


async def serve(url: str) -> None:
    """Do the jobs that come in, one a line, and print their answers, one a line."""
    backends = [RedisBackend(url, timeout=10) for _ in range(BACKENDS)]
    for backend in backends:
        await backend.open()
    answer: object = "ready"
    while True:
        print(json.dumps(answer), flush=True)  # noqa: T201 - the test reads it
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break
        job, *arguments = json.loads(line)
        answer = await JOBS[job](backends, *arguments)
    for backend in backends:
        await backend.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
