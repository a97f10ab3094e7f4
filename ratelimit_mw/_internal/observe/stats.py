"""What a limiter has done and what it waits for, in one process; and how monitoring calls these figures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ratelimit_mw._internal.model.charge import WAITS, Load


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


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure as monitoring sees it, under a name that Prometheus gives a counter's `_total`."""

    name: str
    text: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    read: Callable[[Stats], Mapping[tuple[str, ...], float]]
    """Its values by those of the labels. A counter's only grow."""


def _plain(kind: Literal["counter", "gauge"], name: str, text: str, read: Callable[[Stats], float]) -> Metric:
    return Metric(name, text, kind, (), lambda stats: {(): float(read(stats))})


_LIMITS = (*[(f"{seconds:g}",) for seconds in WAITS], ("+Inf",))

METRICS = (
    Metric(
        "ratelimit_decisions",
        "Decisions about requests, by plan, route rule, outcome and the limit that refused.",
        "counter",
        ("plan", "route", "outcome", "limit"),
        lambda stats: {tuple(labels): number for labels, number in stats.totals.items()},
    ),
    Metric(
        "ratelimit_decisions_without_backend",
        "Decisions while the backend was away, by what the settings say.",
        "counter",
        ("policy",),
        lambda stats: {(policy,): number for policy, number in stats.decisions_without_backend.items()},
    ),
    _plain("counter", "ratelimit_backend_batches", "Calls of the script.", lambda stats: stats.load.batches),
    _plain(
        "counter",
        "ratelimit_backend_operations",
        "Operations in those calls.",
        lambda stats: stats.load.operations,
    ),
    _plain(
        "counter",
        "ratelimit_backend_wait_seconds",
        "Seconds that those calls took, with the wait of the first operation in each.",
        lambda stats: stats.load.waited,
    ),
    Metric(
        "ratelimit_backend_calls",
        "Those calls that took at most so many seconds.",
        "counter",
        ("le",),
        lambda stats: dict(zip(_LIMITS, accumulate(stats.load.waits), strict=True)),
    ),
    _plain(
        "counter",
        "ratelimit_backend_failures",
        "Operations that the server answered with an error.",
        lambda stats: stats.load.failed,
    ),
    _plain(
        "counter",
        "ratelimit_backend_mended",
        "Stored counts that were damaged, and were mended.",
        lambda stats: stats.load.mended,
    ),
    _plain(
        "counter",
        "ratelimit_slots_lost",
        "Slots lost before they could be renewed.",
        lambda stats: stats.slots_lost,
    ),
    _plain(
        "counter",
        "ratelimit_settles_ignored",
        "Settles with another amount than before, or of no record that is left.",
        lambda stats: stats.settles_ignored,
    ),
    _plain(
        "counter",
        "ratelimit_unsynced_lost",
        "Counts of an outage that were given up.",
        lambda stats: stats.unsynced_lost,
    ),
    _plain(
        "gauge",
        "ratelimit_backend_up",
        "1 while the backend is there, 0 while it is away.",
        lambda stats: stats.backend_up,
    ),
    _plain(
        "gauge",
        "ratelimit_owed",
        "Releases and settles that wait to be written.",
        lambda stats: stats.load.owed,
    ),
    _plain("gauge", "ratelimit_leases", "Leases that are being renewed.", lambda stats: stats.leases),
    _plain(
        "gauge",
        "ratelimit_unsynced",
        "Counts of an outage that the backend has to be told.",
        lambda stats: stats.unsynced,
    ),
    Metric(
        "ratelimit_settings",
        "Processes in which the settings of this version are in force.",
        "gauge",
        ("version",),
        lambda stats: {(stats.version,): 1.0},
    ),
)
"""Every figure that is exported. Labels are names from the settings, never a caller."""
