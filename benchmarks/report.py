"""The table of goals and figures."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Line(NamedTuple):
    """One goal and what was measured for it."""

    what: str
    figure: float | None
    goal: float | None = None
    unit: str = ""
    at_most: bool = False
    """Whether less is better."""

    @property
    def verdict(self) -> str:
        """Whether the goal is met; empty without one."""
        if self.goal is None or self.figure is None:
            return ""
        return "met" if (self.figure <= self.goal if self.at_most else self.figure >= self.goal) else "MISSED"


def goals(cases: Mapping[str, Mapping[str, float]], memory: Mapping[str, float]) -> list[Line]:
    """The lines of the table, from the medians of each case by its name."""

    def figure(case: str, name: str) -> float | None:
        return cases.get(case, {}).get(name)

    def ratio(upper: float | None, lower: float | None) -> float | None:
        return upper / lower if upper is not None and lower else None

    def added(case: str) -> float | None:
        spent, bare = figure(f"{case} latency", "p50"), figure("bare latency", "p50")
        return spent - bare if spent is not None and bare is not None else None

    share = [
        ("one window in Redis, one busy caller", "redis-1", 0.78),
        ("one window in Redis, 1,000 callers", "redis-1 x1000", 0.72),
        ("two windows and a slot in Redis, one busy caller", "redis-2", 0.70),
        ("two windows and a slot in Redis, 1,000 callers", "redis-2 x1000", 0.62),
        ("two windows and a slot in memory, one busy caller", "memory", 0.85),
        ("two windows and a slot in memory, 1,000 callers", "memory x1000", 0.85),
        ("refusing an exhausted key", "refuse", 1.30),
        ("two windows in Redis, with prefetch", "prefetch", 0.85),
    ]
    cpu = [
        ("Redis CPU, two windows and a slot, one caller", "redis-2", 10),
        ("Redis CPU, two windows and a slot, 1,000 callers", "redis-2 x1000", 20),
        ("Redis CPU, one window, one caller", "redis-1", 5),
        ("Redis CPU, one window, 1,000 callers", "redis-1 x1000", 10),
    ]
    return [
        *(Line(what, figure(case, "share"), goal, "of bare") for what, case, goal in share),
        *(Line(what, figure(case, "redis_us"), goal, "us/request", True) for what, case, goal in cpu),
        Line(
            "added latency, one window, one connection",
            ratio(added("redis-1"), added("get")),
            1.3,
            "GETs",
            True,
        ),
        Line(
            "added latency, two windows and a slot", ratio(added("redis-2"), added("get")), 1.3, "GETs", True
        ),
        Line(
            "p99 under 32 connections, one window",
            ratio(figure("redis-1", "p99"), figure("bare", "p99")),
            2.0,
            "times bare",
            True,
        ),
        Line(
            "p99 under 32 connections, two windows and a slot",
            ratio(figure("redis-2", "p99"), figure("bare", "p99")),
            2.0,
            "times bare",
            True,
        ),
        Line("bytes in Redis per remembered request", memory.get("bytes_per_request"), 15, "bytes", True),
        Line("the same, window full", memory.get("bytes_per_request_full"), None, "bytes"),
        Line(
            "bytes in Redis per caller and window, seen once", memory.get("bytes_per_caller"), None, "bytes"
        ),
        Line("script calls per request, 32 connections", figure("redis-2", "calls"), None, "calls"),
        Line("script calls per request, one connection", figure("redis-2 latency", "calls"), None, "calls"),
        Line("one redis-py GET", figure("get", "share"), None, "of bare"),
        Line("the server alone, without a framework", figure("server", "share"), None, "of bare"),
    ]


def render(lines: Iterable[Line]) -> str:
    """The table as text."""
    rows = [f"{'':<56}{'measured':>10}{'goal':>8}"]
    for line in lines:
        measured = "-" if line.figure is None else f"{line.figure:.2f}"
        goal = "" if line.goal is None else f"{line.goal:g}"
        rows.append(f"{line.what:<56}{measured:>10}{goal:>8}  {line.unit:<11} {line.verdict}".rstrip())
    return "\n".join(rows)
