"""The table of what was measured, and that of goals."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Medians = Mapping[str, Mapping[str, float]]
"""Figures of each case, by its name; the figures have the names of `Result.medians`."""

BARE_US = 68
"""CPU of the bare app a request, in microseconds, where the goals for Redis were set: 61 to 75."""

SHARES = (
    ("one window in Redis, one busy caller", "redis-1", 0.78, None),
    ("one window in Redis, 1,000 callers", "redis-1 x1000", 0.72, None),
    ("two windows and a slot in Redis, one busy caller", "redis-2", 0.70, None),
    ("two windows and a slot in Redis, 1,000 callers", "redis-2 x1000", 0.62, None),
    ("two windows and a slot in memory, one busy caller", "memory", 0.85, "headers"),
    ("two windows and a slot in memory, 1,000 callers", "memory x1000", 0.85, "headers"),
    ("two windows, a slot and a price in Redis, 100 callers", "priced x100", 0.58, None),
    ("two windows and a slot with on_decision, 100 callers", "on_decision x100", 0.62, None),
    ("two windows and a slot with identify, 100 callers", "identify x100", 0.62, None),
    ("two windows and a slot in Python alone, 100 callers", "redis-2 pure x100", 0.56, None),
    ("refusing an exhausted key", "refuse", 1.30, "refusal"),
    ("two windows in Redis, with prefetch", "prefetch", 0.85, "headers"),
)
"""Description, its case, the goal, and the case that bounds it."""
REDIS_CPU = (
    ("two windows and a slot, one caller", "redis-2", 10),
    ("two windows and a slot, 1,000 callers", "redis-2 x1000", 20),
    ("one window, one caller", "redis-1", 5),
    ("one window, 1,000 callers", "redis-1 x1000", 10),
)
"""Description, its case, and the goal in microseconds."""


class Line(NamedTuple):
    """One goal and what was measured for it."""

    what: str
    figure: float | None
    goal: float | None = None
    unit: str = ""
    at_most: bool = False
    """Whether less is better."""
    floor: float | None = None
    """Figure of the same run without any decision: nobody's figure is better, but for chance."""

    @property
    def verdict(self) -> str:
        """Whether the goal is met, and if not, whether the floor meets it; empty without a goal."""
        if self.goal is None or self.figure is None:
            return ""
        if self._meets(self.figure):
            return "met"
        return "MISSED" if self.floor is None or self._meets(self.floor) else "MISSED, by the floor too"

    def _meets(self, figure: float) -> bool:
        return self.goal is not None and (figure <= self.goal if self.at_most else figure >= self.goal)


def goals(cases: Medians, memory: Mapping[str, float]) -> list[Line]:
    """The lines of the table, from the medians of each case by its name."""

    def figure(case: str | None, name: str) -> float | None:
        return cases.get(case, {}).get(name) if case else None

    def ratio(name: str, upper: str, lower: str) -> float | None:
        over, under = figure(upper, name), figure(lower, name)
        return over / under if over is not None and under else None

    one, two = "one window", "two windows and a slot"
    alone, busy = "added latency, one connection", "p99 under 32 connections"
    added = [(one, "redis-1 latency"), (two, "redis-2 latency")]
    return [
        *(
            Line(what, figure(case, "share"), goal, "of bare", floor=figure(floor, "share"))
            for what, case, goal, floor in SHARES
        ),
        *(
            Line(f"Redis CPU, {what}", figure(case, "redis_us"), goal, "us/request", True)
            for what, case, goal in REDIS_CPU
        ),
        *(
            Line(
                f"Redis CPU over the bare app's, {what}",
                figure(case, "redis_cpu"),
                goal / BARE_US,
                f"{goal} of {BARE_US} us",
                at_most=True,
            )
            for what, case, goal in REDIS_CPU
        ),
        *(
            Line(f"{alone}, {what}", ratio("added_us", case, "get latency"), 1.3, "GETs", True)
            for what, case in added
        ),
        *(
            Line(f"{busy}, {what}", ratio("p99", case, "bare"), 2.0, "times bare", True)
            for what, case in ((one, "redis-1"), (two, "redis-2"))
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
    """The goals as text."""
    lines = list(lines)
    wide = max((len(line.what) for line in lines), default=0)
    rows = [f"{'':<{wide}}{'measured':>10}{'goal':>8}{'floor':>8}"]
    for line in lines:
        measured = "-" if line.figure is None else f"{line.figure:.2f}"
        goal = "" if line.goal is None else f"{line.goal:.3g}"
        floor = "" if line.floor is None else f"{line.floor:.2f}"
        row = f"{line.what:<{wide}}{measured:>10}{goal:>8}{floor:>8}  {line.unit:<11} {line.verdict}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def table(medians: Medians) -> str:
    """Return the measurements as text: medians, and quartiles where the bare app is the measure."""
    wide = max(18, *map(len, medians)) if medians else 18
    head = f"{'':<{wide}}{'share':>6}{'':>12}{'app/bare':>9}{'':>12}{'req/s':>7}{'p50 us':>8}{'p99 us':>8}"
    rows = [f"{head}{'app us':>8}{'usr+sys':>10}{'Redis us':>10}{'usr+sys':>10}{'/ bare':>9}{'calls':>7}"]
    for name, its in medians.items():
        row = f"{name:<{wide}}{its['share']:>6.2f}{_quartiles(its, 'share'):>12}"
        row += f"{its['cpu']:>9.2f}{_quartiles(its, 'cpu'):>12}"
        row += f"{its['rate']:>7.0f}{its['p50']:>8.0f}{its['p99']:>8.0f}"
        row += f"{its['app_us']:>8.1f}{_split(its, 'app'):>10}"
        row += (
            f"{its['redis_us']:>10.1f}{_split(its, 'redis'):>10}{its['redis_cpu']:>9.3f}{its['calls']:>7.2f}"
        )
        row += f"  {its['refused']:.0f} refused" if its["refused"] else ""
        rows.append(row + (f"  {its['failed']:.0f} FAILED" if its["failed"] else ""))
    return "\n".join(rows)


def _quartiles(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[f'{name}_q1']:.2f}-{figures[f'{name}_q3']:.2f}"


def _split(figures: Mapping[str, float], of: str) -> str:
    return f"{figures[f'{of}_user_us']:.0f}+{figures[f'{of}_system_us']:.0f}"
