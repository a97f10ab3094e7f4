"""Servers for every variant, and what Redis did while one of them was under load."""

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load import Load, Sample, run_load
from tests.apps import AppServer
from tests.processes import ServerError
from tests.servers import StoreServer


@dataclass(frozen=True, slots=True)
class Case:
    """One variant under one load."""

    variant: str
    load: Load
    environment: tuple[tuple[str, str], ...] = ()
    workers: int = 1

    @property
    def server(self) -> tuple[str, tuple[tuple[str, str], ...], int]:
        """What tells the servers apart."""
        return self.variant, self.environment, self.workers


@dataclass(slots=True)
class Result:
    """What one case met, a value for each round."""

    share: list[float] = field(default_factory=list)
    """Of the bare app's throughput just before and just after."""
    rate: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    app_us: list[float] = field(default_factory=list)
    """CPU time of the app's server for each request, in microseconds; 0 where there is no /proc."""
    redis_us: list[float] = field(default_factory=list)
    """CPU time of Redis for each request, in microseconds."""
    calls: list[float] = field(default_factory=list)
    """Calls of a script for each request."""
    refused: int = 0
    failed: int = 0

    def medians(self) -> dict[str, float]:
        """The median of every figure."""
        names = ("share", "rate", "p50", "p99", "app_us", "redis_us", "calls")
        figures = {name: getattr(self, name) for name in names}
        medians = {name: statistics.median(values) for name, values in figures.items() if values}
        return {**medians, "refused": self.refused, "failed": self.failed}


class Measurement(NamedTuple):
    """A sample and what each of its requests cost."""

    sample: Sample
    app_us: float
    redis_us: float
    calls: float


class Bench:
    """Servers that are up, one for each variant, all on one Redis."""

    def __init__(self, store: StoreServer, client: Any) -> None:
        self.store = store
        self.client = client
        self.missing: dict[str, str] = {}
        """Variants that did not start, each with the reason."""
        self._servers: dict[object, AppServer] = {}

    def start(self, stack: ExitStack, folder: Path, cases: Sequence[Case]) -> None:
        """Serve what the cases need, each once."""
        for case in cases:
            if case.server in self._servers or case.variant in self.missing:
                continue
            environment = {
                "BENCH_VARIANT": case.variant,
                "BENCH_REDIS": self.store.url,
                **dict(case.environment),
            }
            arguments = ["--loop", "uvloop", "--http", "httptools", "--factory"]
            server = AppServer(
                "benchmarks.apps:app",
                folder / str(len(self._servers)),
                *arguments,
                workers=case.workers,
                environment=environment,
            )
            stack.callback(server.stop)
            try:
                server.start()
            except ServerError as error:
                self.missing[case.variant] = str(error).strip().splitlines()[-1]
            else:
                self._servers[case.server] = server

    def run(self, case: Case) -> "Measurement":
        """One measurement, on an empty Redis."""
        server = self._servers[case.server]
        self.client.flushall()
        before = self._spent(server)
        sample = run_load(server.port, case.load)
        requests = max(sample.requests, 1)
        app, store, calls = (
            (now - then) / requests for now, then in zip(self._spent(server), before, strict=True)
        )
        return Measurement(sample, app * 1e6, store * 1e6, calls)

    def _spent(self, server: AppServer) -> tuple[float, float, float]:
        """CPU seconds of the app's server and of Redis, and calls of scripts, until now."""
        cpu: dict[str, Any] = self.client.info("cpu")
        stats: dict[str, Any] = self.client.info("commandstats")
        calls = sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))
        app = sum(_cpu_seconds(pid) for pid in server.worker_pids())
        return app, cpu["used_cpu_user"] + cpu["used_cpu_sys"], calls

    def measure(self, cases: Sequence[Case], rounds: int) -> dict[Case, Result]:
        """Every case once a round, the bare app in between; the order turns round each time."""
        results = {case: Result() for case in cases if case.server in self._servers}
        for case in results:
            self.run(Case(case.variant, Load(case.load.connections, 1, 1.0), case.environment, case.workers))
        for number in range(rounds):
            order = list(results)[:: -1 if number % 2 else 1]
            for before, group in _groups(order, 3):
                yardstick = [self._bare(before)]
                measured = [(case, self.run(case)) for case in group]
                yardstick.append(self._bare(before))
                for case, measurement in measured:
                    _record(results[case], measurement, statistics.mean(yardstick))
        return results

    def _bare(self, like: Case) -> float:
        server = ("bare", (), like.workers)
        case = next((known for known in self._servers if known == server), None)
        if case is None:
            raise ServerError("the bare app is not served")
        return self.run(Case("bare", like.load, (), like.workers)).sample.rate


def _groups(cases: list[Case], size: int) -> Iterator[tuple[Case, list[Case]]]:
    """A few cases at a time that share their connections and workers, and the first of them."""
    for _, alike in groupby(cases, key=lambda case: (case.load.connections, case.workers)):
        group = list(alike)
        for at in range(0, len(group), size):
            yield group[at], group[at : at + size]


def _record(result: Result, measurement: Measurement, bare: float) -> None:
    sample = measurement.sample
    result.share.append(sample.rate / bare)
    result.rate.append(sample.rate)
    result.p50.append(sample.p50)
    result.p99.append(sample.p99)
    result.app_us.append(measurement.app_us)
    result.redis_us.append(measurement.redis_us)
    result.calls.append(measurement.calls)
    result.refused += sample.refused
    result.failed += sample.failed


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
