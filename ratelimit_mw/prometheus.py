"""Metrics for Prometheus (extra `metrics`): what the limiter of this process has done and what it waits for.

    from ratelimit_mw.prometheus import export
    export(limiter)

Labels are names from the settings, never a caller. Requests are not slowed down: figures are read when they
are scraped or, where several processes share one port, once a second.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.values import ValueClass

from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.observe.stats import CALL_DURATION, METRICS, Metric
from ratelimit_mw._internal.runtime.liveness import LifeSign

logger: logging.Logger = logging.getLogger("ratelimit_mw")

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that puts `prometheus_client` into its multi-process mode."""
MIRROR_SECONDS = 1.0
"""Seconds between two writes of a process's figures in multi-process mode.

A scraped figure is at most that old."""

_BOUNDS = [*map(str, CALL_DURATION.bounds), "+Inf"]

_exported = False


def export(limiter: Limiter, registry: CollectorRegistry = REGISTRY) -> None:
    """Let Prometheus read the figures of a limiter, with all else that this process tells it.

    Where `PROMETHEUS_MULTIPROC_DIR` is set, the figures of all processes are added up by whichever of them is
    scraped, as with every metric of `prometheus_client` in that mode: through its `MultiProcessCollector`,
    not `registry`. Raises ValueError when the figures of another limiter have the names already.
    """
    global _exported  # noqa: PLW0603 - one process, one set of names
    if FOLDER not in os.environ:
        registry.register(LimiterCollector(limiter))
        return
    if _exported:
        raise ValueError(
            "the figures of a limiter of this process are exported already: export one limiter per process"
        )
    _exported = True
    Mirror(limiter).start()


class LimiterCollector(Collector):
    """Reads a limiter's `stats` whenever it is scraped, from any thread."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Family]:
        """Every metric, with the figures of this moment."""
        stats = self._limiter.stats()
        for metric in METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.text, labels=metric.labels)
            for values, number in metric.read(stats).items():
                family.add_metric(values, number)
            yield family
        counts, seconds = CALL_DURATION.read(stats)
        buckets = list(zip(_BOUNDS, accumulate(counts), strict=True))
        duration = HistogramMetricFamily(CALL_DURATION.name, CALL_DURATION.text)
        duration.add_metric([], buckets, seconds)
        yield duration


class Mirror:
    """Writes a limiter's figures into the files that the processes of one service share.

    `prometheus_client` adds up only its own counters and gauges over processes, and those it keeps itself.
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._lock = threading.Lock()
        self._pairs = [(metric, _shared(metric)) for metric in METRICS]
        self._has_failed = False
        self._life_sign = LifeSign(Path(os.environ[FOLDER]))
        self._told: dict[str, dict[tuple[str, ...], float]] = {}
        self._buckets = [_shared_sample("_bucket", bound) for bound in _BOUNDS]
        self._seconds = _shared_sample("_sum")
        self._told_duration: tuple[Sequence[int], float] = (), 0.0

    def start(self) -> None:
        """Write now, once a second, and when the process ends; also in a process that is forked off this."""
        # Nobody is forked off while figures are read: a lock that is held then is never released there.
        lock = self._lock
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
        os.register_at_fork(after_in_child=self._begin_anew)
        atexit.register(self._try)
        self._limiter.engine.at_close.append(self._try)
        self._run()

    def update(self) -> None:
        """Write what has changed since the last time."""
        with self._lock:
            stats = self._limiter.stats()
            for metric, shared in self._pairs:
                told, now = self._told.setdefault(metric.name, {}), metric.read(stats)
                for values, number in now.items():
                    child = shared.labels(*values) if values else shared
                    if isinstance(child, Gauge):
                        child.set(number)
                    elif number > told.get(values, 0):  # a backend may have begun to count anew
                        child.inc(number - told.get(values, 0))
                    told[values] = number
                for values in told.keys() - now.keys():
                    if isinstance(shared, Gauge):  # such as settings that are no longer in force
                        shared.labels(*values).set(0)
            self._update_duration(*CALL_DURATION.read(stats))

    def _update_duration(self, counts: Sequence[int], seconds: float) -> None:
        """Add to the files' histogram what came since the last time."""
        told_counts, told_seconds = self._told_duration
        if not told_counts or sum(counts) < sum(told_counts):  # the backend may have begun to count anew
            told_counts, told_seconds = [0] * len(counts), 0.0
        for bucket, count, told in zip(self._buckets, counts, told_counts, strict=True):
            bucket.inc(max(count - told, 0))
        self._seconds.inc(max(seconds - told_seconds, 0.0))
        self._told_duration = counts, seconds

    def _begin_anew(self) -> None:
        """Write the figures of a process that was forked off, which counts from nothing on."""
        self._told.clear()
        self._told_duration = (), 0.0
        self._run()

    def _run(self) -> None:
        threading.Thread(target=self._again_and_again, name="ratelimit_mw metrics", daemon=True).start()

    def _again_and_again(self) -> None:
        while True:
            self._try()
            time.sleep(MIRROR_SECONDS)

    def _try(self) -> None:
        try:
            self.update()
            self._life_sign.give()
            for pid in self._life_sign.bury_dead():
                # A worker that is stopped can't be relied on to take its gauges along.
                with suppress(FileNotFoundError):  # another process was quicker
                    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
        except Exception:
            if not self._has_failed:
                logger.exception("metrics could not be written; this is tried again every second")
            self._has_failed = True


def _shared(metric: Metric) -> Counter | Gauge:
    if metric.kind == "counter":
        return Counter(metric.name, metric.text, metric.labels, registry=None)
    # The backend is there when all processes reach it; the rest adds up.
    mode: Literal["livemin", "livesum"] = "livemin" if metric.name == "ratelimit_backend_up" else "livesum"
    return Gauge(metric.name, metric.text, metric.labels, registry=None, multiprocess_mode=mode)


def _shared_sample(suffix: str, bound: str | None = None) -> Any:
    """A number of the histogram in this process's file: the library's `Histogram` only takes single calls."""
    name, labels = CALL_DURATION.name, ("le",) if bound else ()
    values = (bound,) if bound else ()
    return ValueClass("histogram", name, name + suffix, labels, values, CALL_DURATION.text)
