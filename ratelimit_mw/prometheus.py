"""Metrics for Prometheus (extra `metrics`): what one limiter of this process has done and what it waits for.

    from ratelimit_mw.prometheus import LimiterCollector
    REGISTRY.register(LimiterCollector(limiter))

Labels are the names of plans and kinds of outcome, never a caller. Each worker tells of itself alone: scrape
every worker, or let them push.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ratelimit_mw.limiter import Limiter


class LimiterCollector(Collector):
    """Reads a limiter's `stats` whenever it is scraped; costs requests nothing."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Metric]:
        """Every metric, with the figures of this moment."""
        stats = self._limiter.stats()
        decisions = CounterMetricFamily(
            "ratelimit_decisions",
            "Decisions about requests, by plan and outcome.",
            labels=["plan", "outcome"],
        )
        for (plan, outcome), number in stats.decisions.items():
            decisions.add_metric([plan, outcome], number)
        yield decisions
        without = CounterMetricFamily(
            "ratelimit_decisions_without_backend",
            "Decisions while the backend was away, by what the settings say.",
            labels=["policy"],
        )
        for policy, number in stats.decisions_without_backend.items():
            without.add_metric([policy], number)
        yield without
        for name, text, number in (
            ("ratelimit_backend_batches", "Calls of the script.", stats.load.batches),
            ("ratelimit_backend_operations", "Operations in those calls.", stats.load.operations),
            (
                "ratelimit_backend_failures",
                "Operations that the server answered with an error.",
                stats.load.failed,
            ),
            ("ratelimit_slots_lost", "Slots lost before they could be renewed.", stats.slots_lost),
            ("ratelimit_settles_ignored", "Settles that changed nothing.", stats.settles_ignored),
            ("ratelimit_untold_lost", "Counts of an outage that were given up.", stats.untold_lost),
        ):
            yield CounterMetricFamily(name, text, value=number)
        for name, text, number in (
            ("ratelimit_backend_up", "1 while the backend is there, 0 while it is away.", stats.backend_up),
            ("ratelimit_owed", "Releases and settles that wait to be written.", stats.load.owed),
            ("ratelimit_leases", "Leases that this process renews.", stats.leases),
            ("ratelimit_untold", "Counts of an outage that the backend has to be told.", stats.untold),
        ):
            yield GaugeMetricFamily(name, text, value=number)
        version = GaugeMetricFamily("ratelimit_settings", "1 for the settings in force.", labels=["version"])
        version.add_metric([stats.version], 1)
        yield version
