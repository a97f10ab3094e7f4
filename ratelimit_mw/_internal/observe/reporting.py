"""Reports to the fleet, once a second: decisions by outcome and caller, and this process's own state."""

import json
import logging
import os
import secrets
import socket
import threading
import time
from asyncio import sleep, timeout
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from typing import Protocol

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.figures_store import FiguresStore, Report
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.observe.decision_counts import CallerCounts, DecisionCounts, RouteCounts
from ratelimit_mw._internal.observe.sightings import rule_name
from ratelimit_mw._internal.observe.stats import Stats
from ratelimit_mw._internal.runtime.compiled import is_compiled
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.upkeep import Job

logger = logging.getLogger("ratelimit_mw")

REPORT_SECONDS = 1.0
IDLE_SECONDS = 5.0
"""Seconds between two reports of a worker that decides nothing, and over which requests are averaged."""
BUSIEST = 80
MOST_REFUSED = 40
"""Callers in a report, by their requests and by those that were refused."""
MOST_ROUTES = 200
"""Outcomes of rules in a report."""
CLOSE_SECONDS = 1.0
"""Seconds that shutdown waits for the last report at most."""
LONGEST = 200
"""Characters of a name in a report."""
REPORTED = "reported"
"""Stands beside the outcomes of plans in every report: a bucket without it is unknown, and not calm."""
_SAMPLES = 60


class Watching(Protocol):
    """Addresses that requests come from and routes that they go to, while somebody looks."""

    def watch(self, callers: Sequence[str], /) -> None:
        """Count these callers from now on, and no others."""

    def take(self) -> Mapping[str, int]:
        """The counts of watched callers since the last call."""

    def take_routes(self) -> Mapping[str, int]:
        """The counts of the app's routes since the last call."""


class Reporter:
    """Reports what a limiter has counted. A report that fails is dropped: these are figures, not limits."""

    def __init__(
        self, store: FiguresStore, counts: DecisionCounts, stats: Callable[[], Stats], watching: Watching
    ) -> None:
        self.store = store
        self._watching = watching
        self.lost: int = 0
        """Reports that did not reach the backend."""
        self.is_serving = False
        """Whether to report although nothing was decided yet."""
        self._counts = counts
        self._stats = stats
        self._told: Mapping[tuple[str, str, str, str], int] = {}
        self._name, self._pid = "", 0
        self._last = 0.0
        self._failure = ""
        self._round_trips: deque[float] = deque(maxlen=_SAMPLES)
        self._recent: deque[tuple[float, int]] = deque()
        # A limiter serves all event loops of its process, and each of them runs the job.
        self._lock = threading.Lock()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Report what this process counts, from nothing on."""
        self._lock = threading.Lock()
        self._told, self._last, self.lost = {}, 0.0, 0
        self._recent.clear()
        self._round_trips.clear()

    def job(self) -> Job:
        """Make the job that each event loop repeats."""
        return Job("reporting figures", REPORT_SECONDS, self.run, self.close, waits=True)

    async def run(self) -> None:
        """Report, unless another event loop has just done so."""
        if time.monotonic() - self._last >= REPORT_SECONDS / 2:
            await self.report()

    async def report(self) -> None:
        """Report what was counted since the last time."""
        while self._counts.add_up_some():  # in several turns of the event loop, so that none takes long
            await sleep(0)
        report = self._take()
        if report is None:
            return
        if report.callers:  # which make it long; else it goes together with what else is asked in this turn
            await sleep(0)
        start = time.perf_counter()
        try:
            watched = await self.store.write(report)
        except BackendError as error:
            self.lost += 1
            self._watching.watch(())
            self._tell(error)
            await self.store.close()  # the next report looks anew for a server that takes writes
        else:
            self._failure = ""
            self._watching.watch(watched)
            self._round_trips.append(time.perf_counter() - start)

    def _tell(self, error: BackendError) -> None:
        """Once, where a backend that is there refuses reports alone; one that is away tells so itself."""
        if isinstance(error, ReplyError) and str(error) != self._failure:
            self._failure = str(error)
            logger.warning("figures for top and the dashboard could not be written to the backend: %s", error)

    async def close(self) -> None:
        """Report what is left, unless the backend is away, and take leave."""
        try:
            if self._stats().backend_up:
                async with timeout(CLOSE_SECONDS):
                    await self._take_leave()
        except (BackendError, TimeoutError):
            self.lost += 1
        finally:
            await self.store.close()

    async def _take_leave(self) -> None:
        report = self._take(is_last=True)
        if report is not None:
            await self.store.write(report)
        if self._name:
            await self.store.leave(self._name)

    def _take(self, *, is_last: bool = False) -> Report | None:
        """Make a report of the counts since the last one; None if there is nothing to report."""
        with self._lock:
            now = time.monotonic()
            counted = self._counted()
            number = sum(counted.values())
            self._recent.append((now, number))
            while self._recent[0][0] <= now - IDLE_SECONDS:
                self._recent.popleft()
            is_idle = not any(each for _, each in self._recent)
            if is_idle and (is_last or not self._is_due(now)):
                return None
            self._last = now
            callers, identities = _callers(self._counts.take_callers())
            routes = {**_routes(self._counts.take_routes()), **self._watching.take_routes()}
            sightings = self._watching.take()
            totals = {**counted, name_of(REPORTED, ""): 1}
            return Report(self._own_name(), self._about(), totals, callers, identities, routes, sightings)

    def _is_due(self, now: float) -> bool:
        return (self.is_serving or bool(self._told)) and now - self._last >= IDLE_SECONDS

    def _counted(self) -> dict[str, int]:
        """Decisions since the last time, by outcome and plan."""
        totals = self._counts.totals()
        counted: dict[str, int] = {}
        for what, number in totals.items():
            grown = number - self._told.get(what, 0)
            if grown:
                name = name_of(what[2], what[0])
                counted[name] = counted.get(name, 0) + grown
        self._told = totals
        return counted

    def _own_name(self) -> str:
        if self._pid != os.getpid():  # of a server that forks
            self._pid = os.getpid()
            self._name = f"{_host()}:{self._pid}:{secrets.token_hex(2)}"
        return self._name

    def _about(self) -> str:
        stats = self._stats()
        p50, p99 = _percentiles(self._round_trips)
        about = {
            "host": _host(),
            "pid": os.getpid(),
            "version": stats.version,
            "compiled": is_compiled(),
            "backend_up": stats.backend_up,
            "latency_ms": {"p50": p50, "p99": p99},
            "requests": round(sum(number for _, number in self._recent) / IDLE_SECONDS, 1),
            "leases": stats.leases,
            "owed": stats.load.owed + stats.unsynced,
        }
        return json.dumps(about, separators=(",", ":"))


def name_of(outcome: str, whom: str) -> str:
    """Return the name of the count of an outcome, for a plan or a partition."""
    return f"{outcome} {whom[:LONGEST]}".encode("utf-8", "replace").decode()


def _routes(counts: RouteCounts) -> dict[str, int]:
    """The counts of the rules with the most requests, by outcome and rule."""
    named: dict[str, int] = {}
    for methods, path, outcome in nlargest(MOST_ROUTES, counts, key=counts.__getitem__):
        name = name_of(outcome, rule_name(methods, path))
        named[name] = named.get(name, 0) + counts[methods, path, outcome]
    return named


def _callers(counts: CallerCounts) -> tuple[dict[str, int], list[str]]:
    """The counts of the busiest and the most refused, by outcome and partition, and who they are."""
    asked = [sum(outcomes.values()) for _, outcomes in counts]
    refused = [sum(outcomes.values()) - outcomes.get("admitted", 0) for _, outcomes in counts]
    every = range(len(counts))
    chosen = dict.fromkeys(nlargest(BUSIEST, every, asked.__getitem__))
    chosen |= dict.fromkeys(nlargest(MOST_REFUSED, every, refused.__getitem__))
    named: dict[str, int] = {}
    identities = []
    for identity, outcomes in map(counts.__getitem__, chosen):
        who = (identity.partition, identity.plan, identity.account, identity.api_key_hash)
        identities.append(json.dumps([each and each[:LONGEST] for each in who], separators=(",", ":")))
        for outcome, number in outcomes.items():
            name = name_of(outcome, identity.partition)
            named[name] = named.get(name, 0) + number
    return named, identities


def _percentiles(seconds: deque[float]) -> tuple[float | None, float | None]:
    """The median and the 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return _percentile(ordered, 0.5), _percentile(ordered, 0.99)


def _percentile(ordered: list[float], share: float) -> float | None:
    """The value in milliseconds below which a share of these seconds is, between the two nearest."""
    if not ordered:
        return None
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return round(1_000 * (ordered[below] + (position - below) * (ordered[above] - ordered[below])), 3)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isascii() and c.isprintable())[:64]
