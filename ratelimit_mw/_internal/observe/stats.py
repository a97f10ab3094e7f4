"""Figures of a limiter in one process, of work done and work that waits, and their names in monitoring."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ratelimit_mw._internal.model.backend import WAITS, Load
from ratelimit_mw._internal.runtime.compiled import is_compiled
from ratelimit_mw._internal.runtime.version import __version__


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one moment, since the limiter was made."""

    backend_up: bool
    load: Load
    totals: Mapping[tuple[str, str, str, str], int]
    """Decisions by plan, route, outcome and limit; see `decision_counts.Totals`."""
    decisions_without_backend: Mapping[str, int]
    """By what the settings say: `local`, `allow`, `deny`."""
    leases: int
    """Leases that are being renewed."""
    slots_lost: int
    settles_ignored: int
    unsynced: int
    """Holds and counters of an outage that the backend has still to be told."""
    unsynced_lost: int
    version: str
    """Short name of the settings in force."""

    @property
    def decisions(self) -> dict[tuple[str, str], int]:
        """By plan and outcome: `admitted`, `shadow` (would have been refused), or the reason of a refusal."""
        decisions: dict[tuple[str, str], int] = {}
        for (plan, _, outcome, _), number in self.totals.items():
            decisions[plan, outcome] = decisions.get((plan, outcome), 0) + number
        return decisions


class Metric(NamedTuple):
    """One figure as monitoring sees it, under a name that Prometheus gives a counter's `_total`."""

    name: str
    text: str
    kind: Literal["counter", "gauge"]
    unit: str
    """Unit of the values, as OpenTelemetry writes it: `s` for seconds, words in braces for things."""
    labels: tuple[str, ...]
    read: Callable[[Stats], Mapping[tuple[str, ...], float]]
    """Its values by those of the labels. A counter's only grow."""


class Histogram(NamedTuple):
    """Histogram of durations in seconds."""

    name: str
    text: str
    bounds: tuple[float, ...]
    """Upper bounds of the buckets in seconds; the last bucket, without one, comes after them."""
    read: Callable[[Stats], tuple[Sequence[int], float]]
    """Function that returns the count of each bucket alone and the sum in seconds. Both only grow."""


def _plain(
    kind: Literal["counter", "gauge"], name: str, unit: str, text: str, read: Callable[[Stats], float]
) -> Metric:
    return Metric(name, text, kind, unit, (), lambda stats: {(): float(read(stats))})


METRICS = (
    Metric(
        "ratelimit_decisions",
        "Decisions about requests, by plan, route rule, outcome and the limit that refused.",
        "counter",
        "{decision}",
        ("plan", "route", "outcome", "limit"),
        lambda stats: {tuple(labels): number for labels, number in stats.totals.items()},
    ),
    Metric(
        "ratelimit_decisions_without_backend",
        "Decisions while the backend was away, by the on_failure that decided.",
        "counter",
        "{decision}",
        ("policy",),
        lambda stats: {(policy,): number for policy, number in stats.decisions_without_backend.items()},
    ),
    _plain(
        "counter",
        "ratelimit_backend_batches",
        "{call}",
        "Calls of this library's script in the backend.",
        lambda stats: stats.load.batches,
    ),
    _plain(
        "counter",
        "ratelimit_backend_operations",
        "{operation}",
        "Operations in the calls of the script: decisions, releases, settles and others.",
        lambda stats: stats.load.operations,
    ),
    _plain(
        "counter",
        "ratelimit_backend_failures",
        "{operation}",
        "Operations that the server answered with an error.",
        lambda stats: stats.load.failed,
    ),
    _plain(
        "counter",
        "ratelimit_backend_mended",
        "{count}",
        "Stored counts that were damaged, and were repaired.",
        lambda stats: stats.load.mended,
    ),
    _plain(
        "counter",
        "ratelimit_slots_lost",
        "{slot}",
        "Slots lost because they were not renewed in time.",
        lambda stats: stats.slots_lost,
    ),
    _plain(
        "counter",
        "ratelimit_settles_ignored",
        "{settle}",
        "Settles that changed nothing: another amount was settled before, or the backend has no record.",
        lambda stats: stats.settles_ignored,
    ),
    _plain(
        "counter",
        "ratelimit_unsynced_lost",
        "{count}",
        "Counts of an outage that never reached the backend.",
        lambda stats: stats.unsynced_lost,
    ),
    _plain(
        "gauge",
        "ratelimit_backend_up",
        "1",
        "1 while the backend answers, 0 while it is away.",
        lambda stats: stats.backend_up,
    ),
    _plain(
        "gauge",
        "ratelimit_owed",
        "{operation}",
        "Releases and settles that wait to be written to the backend.",
        lambda stats: stats.load.owed,
    ),
    _plain(
        "gauge",
        "ratelimit_leases",
        "{lease}",
        "Leases that are being renewed.",
        lambda stats: stats.leases,
    ),
    _plain(
        "gauge",
        "ratelimit_unsynced",
        "{count}",
        "Counts of an outage that still have to be sent to the backend.",
        lambda stats: stats.unsynced,
    ),
    Metric(
        "ratelimit_settings_info",
        "Processes in which the settings of this version are in force.",
        "gauge",
        "{process}",
        ("version",),
        lambda stats: {(stats.version,): 1.0},
    ),
    Metric(
        "ratelimit_info",
        "Processes that run this version of ratelimit_mw on this Python, compiled or not.",
        "gauge",
        "{process}",
        ("version", "python", "compiled"),
        lambda _: {(__version__, sys.version.partition(" ")[0], str(is_compiled()).lower()): 1.0},
    ),
)
"""Every figure that is exported. Labels are names from the settings, never a caller."""

CALL_DURATION = Histogram(
    "ratelimit_backend_call_duration_seconds",
    "Seconds that calls of the script took, including the wait of the first operation in each call.",
    WAITS,
    lambda stats: (stats.load.waits, stats.load.waited),
)
