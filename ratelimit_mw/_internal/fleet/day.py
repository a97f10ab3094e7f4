"""The last day of the fleet, in steps of five minutes: read when somebody looks at it, old steps once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ratelimit_mw._internal.backends.figures_store import DAY_BUCKET, Counts, FiguresStore
from ratelimit_mw._internal.fleet.reading import by_plan
from ratelimit_mw._internal.fleet.series import point_of, with_gaps
from ratelimit_mw._internal.fleet.snapshot import Outcomes, Point

STEPS = 288
OPEN = 2
"""The last steps, which may still grow."""


class DayStep(NamedTuple):
    """Five minutes of the fleet."""

    at: int
    """Its start, in seconds since 1970."""
    plans: Mapping[str, Outcomes]


class Day(NamedTuple):
    """The last day, oldest step first; the last step is still growing."""

    now: float
    series: Sequence[Point]
    steps: Sequence[DayStep]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"now": self.now, "bucket": DAY_BUCKET, "series": [point.as_dict() for point in self.series]}


class DayReader:
    """Reads the last day from the store of figures."""

    def __init__(self, store: FiguresStore) -> None:
        self._store = store
        self._known: dict[int, Counts] = {}
        self._settled = 0
        """The last step that had stopped growing when it was read."""

    async def read(self) -> Day:
        """The last day. Raises `BackendError`."""
        now = await self._store.now()
        newest = int(now // DAY_BUCKET)
        steps = range(newest - STEPS + 1, newest + 1)
        unread = [step for step in steps if step not in self._known or step > self._settled]
        known = self._known | dict(zip(unread, await self._store.day(unread), strict=True))
        self._known, self._settled = {step: known[step] for step in steps}, newest - OPEN
        return Day(
            round(now, 3),
            with_gaps([point_of(step * DAY_BUCKET, known[step]) for step in steps]),
            tuple(DayStep(step * DAY_BUCKET, dict(sorted(by_plan([known[step]]).items()))) for step in steps),
        )
