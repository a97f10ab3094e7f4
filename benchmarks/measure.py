"""Servers for every variant, and what they and Redis did while one of them was under load."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load import Load, Sample, run_load
from tests.support.apps import ROOT, AppServer
from tests.support.processes import ServerError
from tests.support.servers import StoreServer

SPREAD = ("share", "cpu")
"""Figures whose quartiles are told beside their medians."""
MET_IN_A_SECOND = 1000
"""Callers that the slowest of servers meets at least."""
REMEMBERED = 16_384
"""Callers that a process remembers."""


@dataclass(frozen=True, slots=True)
class Case:
    """One variant under one load."""

    variant: str
    load: Load
    environment: tuple[tuple[str, str], ...] = ()
    workers: int = 1
    yardstick: str = "bare"
    """The variant that it is compared with."""
    stored: int = 0
    """Callers that Redis knows before: `key-0`, `key-1` and so on. Others come for the first time."""

    @property
    def server(self) -> tuple[object, ...]:
        """Key that tells the servers apart: each meets its own callers alone."""
        return self.variant, self.environment, self.workers, self.load.callers

    @property
    def bare(self) -> "Case":
        """Case that this one is compared with, which knows no callers."""
        return Case(self.yardstick, replace(self.load, callers=1), workers=self.workers)

    @property
    def first(self) -> "Case":
        """Enough of it for the server to meet all callers that it can remember."""
        seconds = 1 + (self.load.callers // MET_IN_A_SECOND if self.load.callers <= REMEMBERED else 0)
        return replace(self, load=replace(self.load, seconds=seconds))


@dataclass(slots=True)
class Result:
    """Figures of one case, a value for each round, by the names of `figures_of`."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    refused: int = 0
    failed: int = 0

    def add(self, sample: Sample, figures: dict[str, float]) -> None:
        """Another round."""
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)
        self.refused += sample.refused
        self.failed += sample.failed

    def medians(self) -> dict[str, float]:
        """The median of every figure, and of some the quartiles, such as `share_q1` and `share_q3`."""
        medians = {name: statistics.median(values) for name, values in self.figures.items()}
        for name in SPREAD:
            values = self.figures[name] * (2 if len(self.figures[name]) == 1 else 1)
            medians[f"{name}_q1"], _, medians[f"{name}_q3"] = statistics.quantiles(values, method="inclusive")
        return {**medians, "refused": self.refused, "failed": self.failed}


class Cpu(NamedTuple):
    """CPU time in user mode and in the kernel."""

    user: float
    system: float

    @property
    def total(self) -> float:
        """Both."""
        return self.user + self.system

    def since(self, before: "Cpu", requests: int) -> "Cpu":
        """Return the CPU time that was spent on each of so many requests, in microseconds."""
        user, system = ((now - then) / requests * 1e6 for now, then in zip(self, before, strict=True))
        return Cpu(user, system)


class Measurement(NamedTuple):
    """A sample, and what each of its requests cost in microseconds."""

    sample: Sample
    app: Cpu
    """Of the app's server; nothing where there is no /proc."""
    redis: Cpu
    calls: float
    """Calls of a script."""


def figures_of(measured: Measurement, bare: Sequence[Measurement]) -> dict[str, float]:
    """Return the figures of a measurement, against those of the bare app just before and just after it.

    `share` is that of its throughput, `cpu` the app's CPU in multiples of its, `redis_cpu` that of Redis
    likewise, and `added_us` the additional time of the median request.
    """
    sample, app, redis, calls = measured
    bare_us = statistics.mean(each.app.total for each in bare)
    return {
        "share": sample.rate / statistics.mean(each.sample.rate for each in bare),
        "cpu": app.total / bare_us if bare_us else 0.0,
        "redis_cpu": redis.total / bare_us if bare_us else 0.0,
        "added_us": sample.p50 - statistics.mean(each.sample.p50 for each in bare),
        "rate": sample.rate,
        "p50": sample.p50,
        "p99": sample.p99,
        "app_us": app.total,
        "app_user_us": app.user,
        "app_system_us": app.system,
        "redis_us": redis.total,
        "redis_user_us": redis.user,
        "redis_system_us": redis.system,
        "calls": calls,
    }


class Bench:
    """Servers that are up, one for each variant, all on one Redis."""

    def __init__(self, store: StoreServer, client: Any) -> None:
        self.store = store
        self.client = client
        self.missing: dict[str, str] = {}
        """Variants that did not start, each with the reason."""
        self._servers: dict[object, AppServer] = {}
        self.held: list[str] = []
        """Lines about the memory that Redis took for each load of callers."""
        self._holds: object = None

    def start(self, stack: ExitStack, folder: Path, cases: Sequence[Case]) -> None:
        """Serve what the cases need, each once."""
        for case in [needed for each in cases for needed in (each.bare, each)]:
            if case.server in self._servers or case.variant in self.missing:
                continue
            arguments = ["--loop", "uvloop", "--http", "httptools", "--factory"]
            server = AppServer(
                "benchmarks.apps:app",
                folder / str(len(self._servers)),
                *arguments,
                workers=case.workers,
                environment=self._environment(case),
            )
            stack.callback(server.stop)
            try:
                server.start()
            except ServerError as error:
                self.missing[case.variant] = str(error).strip().splitlines()[-1]
            else:
                self._servers[case.server] = server

    def port_of(self, case: Case) -> int:
        """The port at which a case is served."""
        return self._servers[case.server].port

    def measure(self, cases: Sequence[Case], rounds: int) -> dict[Case, Result]:
        """Every case once a round, between two measurements of its yardstick; every other round backwards."""
        served = [case for case in cases if {case.server, case.bare.server} <= self._servers.keys()]
        results = {case: Result() for case in served}
        for case in dict.fromkeys(warm for each in served for warm in (each.bare, each.first)):
            self.run(case)
        for number in range(rounds):
            bare: tuple[Case, Measurement] | None = None
            for case in served[:: -1 if number % 2 else 1]:
                before = bare[1] if bare is not None and bare[0] == case.bare else self.run(case.bare)
                measured = self.run(case)
                bare = case.bare, self.run(case.bare)
                results[case].add(measured.sample, figures_of(measured, (before, bare[1])))
        return results

    def run(self, case: Case) -> Measurement:
        """One measurement."""
        server = self._servers[case.server]
        if case != case.bare:
            self._fill(case)
        app, redis, calls = self._spent(server)
        sample = run_load(server.port, case.load)
        requests = max(sample.requests, 1)
        app_now, redis_now, calls_now = self._spent(server)
        spent_by_app, spent_by_redis = app_now.since(app, requests), redis_now.since(redis, requests)
        return Measurement(sample, spent_by_app, spent_by_redis, (calls_now - calls) / requests)

    def _fill(self, case: Case) -> None:
        """Leave in Redis the callers that the case wants there, and nothing else."""
        holds = (case.variant, case.environment, case.stored) if case.stored else None
        if holds is not None and holds == self._holds:
            return
        self.client.flushall()
        self._holds = holds
        if case.stored:
            command = [sys.executable, "-m", "benchmarks.stored", str(case.stored)]
            began = time.monotonic()
            subprocess.run(command, check=True, cwd=ROOT, env=self._servers[case.server].environment())
            memory: dict[str, Any] = self.client.info("memory")
            self.held.append(
                f"{case.variant}: {case.stored:,} callers, {self.client.dbsize():,} keys, "
                f"{memory['used_memory'] / 1e6:,.1f} MB, in {time.monotonic() - began:.1f} s"
            )

    def _environment(self, case: Case) -> dict[str, str]:
        return {"BENCH_VARIANT": case.variant, "BENCH_REDIS": self.store.url, **dict(case.environment)}

    def _spent(self, server: AppServer) -> tuple[Cpu, Cpu, int]:
        """CPU seconds of the app's server and of Redis, and calls of scripts, until now."""
        cpu: dict[str, Any] = self.client.info("cpu")
        stats: dict[str, Any] = self.client.info("commandstats")
        calls = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))
        workers = [_cpu_seconds(pid) for pid in server.worker_pids()]
        app = Cpu(sum(each.user for each in workers), sum(each.system for each in workers))
        return app, Cpu(cpu["used_cpu_user"], cpu["used_cpu_sys"]), calls


def _cpu_seconds(pid: int) -> Cpu:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Cpu(0.0, 0.0)
    ticks = os.sysconf("SC_CLK_TCK")
    return Cpu(int(fields[11]) / ticks, int(fields[12]) / ticks)


@contextmanager
def awake() -> Iterator[None]:
    """No core falls asleep, as one does while a load waits for its server, which then has to wake it.

    For this, processes turn that run only where nobody else wants to. Linux only.
    """
    turn = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    program = f"import os; {turn}; parent = {os.getpid()}\nwhile os.getppid() == parent: pass"
    turning = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in turning:
            process.kill()
            process.wait()


@contextmanager
def bench() -> Iterator[tuple[Bench, ExitStack, Path]]:
    """A Redis of the benchmark's own, and a stack and a folder for the servers."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        store = StoreServer("redis", folder / "redis")
        stack.callback(store.stop)
        store.start()
        client = stack.enter_context(store.client())
        yield Bench(store, client), stack, folder
