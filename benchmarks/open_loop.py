"""Latency while requests come at a constant rate: `python -m benchmarks.open_loop`, a part of `make bench`.

Requests do not wait for answers to others, as those of many callers don't: a server that stands still for a
moment makes all of them late that were due meanwhile. Latencies count from the moment at which a request was
due. The rates are shares of what the bare app answers at most; each variant stands beside the bare app at the
same rate in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from benchmarks.load import Connections, Load, share_of
from benchmarks.measure import Bench, Case, bench

VARIANTS = ("bare", "incr", "gcra", "limits", "redis-1", "redis-2")
NAMES = {
    "incr": "INCR",
    "gcra": "GCRA in a script",
    "limits": "limits, moving window",
    "redis-1": "one window",
    "redis-2": "two windows and a slot",
}
SHARES = (0.3, 0.5, 0.7)
TICK = 0.001
"""Seconds between moments at which requests are due."""
LOOK = 2e-4
"""Seconds between looks for answers: a selector waits in whole milliseconds."""
CONNECTIONS = 256
"""Connections: a request that finds none free waits, and that counts."""
PATIENCE = 10.0
"""Seconds that the last answers are waited for."""


class Latencies(NamedTuple):
    """Latencies in milliseconds, by the share of requests that were answered within them."""

    p50: float
    p99: float
    p999: float
    unanswered: int = 0
    """Requests without an answer at the end, and answers of status 400 and above."""


class Schedule:
    """Moments at which requests are due: so many a second, together at each tick."""

    def __init__(self, rate: float, seconds: float) -> None:
        self._each = rate * TICK
        self.ticks = round(seconds / TICK)

    def due_at(self, tick: int) -> int:
        """Return the number of requests that are due at a tick."""
        return int((tick + 1) * self._each) - int(tick * self._each)


class Generator:
    """Sends each request when it is due, over any connection that is free."""

    def __init__(self, port: int, callers: int, connections: int = CONNECTIONS) -> None:
        self.connections = Connections(port, connections, callers)
        self.asked = 0
        """Requests that were due."""
        self._waiting: deque[float] = deque()

    @property
    def is_done(self) -> bool:
        """Whether every request that was due has its answer, or has lost it."""
        found = self.connections
        return len(found.latencies) + len(found.refused) + found.failed == self.asked

    def run(self, schedule: Schedule) -> None:
        """Send all that is due, and wait for the answers. Raises OSError if the server is gone."""
        with closing(self.connections):
            begin = time.perf_counter()
            for tick in range(schedule.ticks):
                at = begin + tick * TICK
                while time.perf_counter() < at:
                    self._turn()
                due = schedule.due_at(tick)
                self._waiting.extend([at] * due)
                self.asked += due
            deadline = time.perf_counter() + PATIENCE
            while not self.is_done and time.perf_counter() < deadline:
                self._turn()

    def _turn(self) -> None:
        """Send what has waited longest, and read what has come."""
        while self._waiting and self.connections.free:
            self.connections.send(self._waiting.popleft())
        time.sleep(LOOK)
        self.connections.receive(0)


def _generate(port: int, rate: float, seconds: float, callers: int) -> Latencies:
    generator = Generator(port, callers)
    generator.run(Schedule(rate, seconds))
    answered = sorted(generator.connections.latencies)
    p50, p99, p999 = (share_of(answered, share) * 1e3 for share in (0.5, 0.99, 0.999))
    return Latencies(p50, p99, p999, generator.asked - len(answered))


def latencies(port: int, rate: float, seconds: float, callers: int) -> Latencies:
    """Put a constant rate on the server at `port`, by another process."""
    numbers = map(str, (port, rate, seconds, callers))
    command = [sys.executable, "-m", "benchmarks.open_loop", "--generate", *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 60)
    return Latencies(*json.loads(done.stdout.splitlines()[-1]))


def measure(
    running: Bench, cases: Sequence[Case], shares: Sequence[float], rounds: int, seconds: float
) -> tuple[float, dict[tuple[str, float], Latencies]]:
    """Requests a second of the bare app at most, and the medians of all rounds by variant and share."""
    bare = next(case for case in cases if case.variant == "bare")
    for case in cases:
        running.run(case.first)
    capacity = statistics.median(running.run(bare).sample.rate for _ in range(3))
    found: dict[tuple[str, float], list[Latencies]] = {}
    for number in range(rounds):
        for share in shares:
            for case in cases[:: -1 if number % 2 else 1]:
                told = latencies(running.port_of(case), share * capacity, seconds, case.load.callers)
                found.setdefault((case.variant, share), []).append(told)
    return capacity, {
        case: Latencies(*[statistics.median(values) for values in zip(*every, strict=True)])
        for case, every in found.items()
    }


def table(medians: dict[tuple[str, float], Latencies]) -> str:
    """The table of latencies, each variant with what it adds to the bare app."""
    lines = [f"{'ms':<26}{'load':>6}{'p50':>9}{'p99':>9}{'p99.9':>9}{'p50 +':>9}{'p99 +':>9}{'p99.9 +':>9}"]
    for (variant, share), each in sorted(medians.items(), key=lambda found: found[0][1]):
        bare = medians["bare", share]
        figures = [*each[:3], *[one - other for one, other in zip(each[:3], bare[:3], strict=True)]]
        lost = f"  {each.unanswered:.0f} without a good answer" if each.unanswered else ""
        row = "".join([f"{figure:>9.2f}" for figure in figures])
        lines.append(f"{NAMES.get(variant, variant):<26}{share:>6.0%}{row}{lost}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.open_loop", description=__doc__)
    parser.add_argument("--only", nargs="+", default=VARIANTS[1:], metavar="VARIANT")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, metavar="SHARE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--callers", type=int, default=100)
    parser.add_argument("--generate", nargs=4, type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        port, rate, seconds, callers = arguments.generate
        print(json.dumps(_generate(int(port), rate, seconds, int(callers))))
        return
    load = Load(callers=arguments.callers, seconds=1)
    cases = [Case(variant, load) for variant in ("bare", *arguments.only)]
    with bench() as (running, stack, folder):
        running.start(stack, folder, cases)
        for variant, reason in running.missing.items():
            print(f"{variant} does not start: {reason}")
        cases = [case for case in cases if case.variant not in running.missing]
        capacity, medians = measure(running, cases, arguments.shares, arguments.rounds, arguments.seconds)
    print(f"the bare app answers {capacity:,.0f} requests a second at most; {arguments.rounds} rounds\n")
    print(table(medians))


if __name__ == "__main__":
    main()
