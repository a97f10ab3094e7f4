"""Store of the figures of one process, for the memory backend."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import nlargest

from ratelimit_mw._internal.backends.figures_store import (
    BUCKET,
    CALLERS_LIFE,
    DAY_BUCKET,
    DAY_KEPT,
    DAY_LIFE,
    KEPT,
    MOST_WATCHED,
    SIGHTINGS_BUCKET,
    TOTALS_LIFE,
    Counts,
    FiguresQuery,
    Reading,
    Report,
)


class MemoryFiguresStore:
    """Figures of one process."""

    is_shared = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._totals: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._callers: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._routes: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._day: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._sightings: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._watched: dict[str, float] = {}
        self._identities: OrderedDict[str, float] = OrderedDict()
        self._workers: dict[str, tuple[str, float]] = {}

    async def now(self) -> float:
        """The clock of this process, in seconds since 1970."""
        return self._clock()

    async def write(self, report: Report) -> Sequence[str]:
        """Add a report to the bucket of this moment; returns the callers that are watched."""
        now = self._clock()
        bucket = int(now // BUCKET)
        _add(self._totals, bucket, report.totals, TOTALS_LIFE // BUCKET)
        _add(self._callers, bucket, report.callers, CALLERS_LIFE // BUCKET)
        _add(self._routes, bucket, report.routes, CALLERS_LIFE // BUCKET)
        _add(self._day, int(now // DAY_BUCKET), report.totals, DAY_LIFE // DAY_BUCKET, DAY_KEPT)
        minutes = CALLERS_LIFE // SIGHTINGS_BUCKET
        _add(self._sightings, int(now // SIGHTINGS_BUCKET), report.sightings, minutes)
        for each in report.identities:
            self._identities[each] = now
            self._identities.move_to_end(each)
        while len(self._identities) > KEPT:
            self._identities.popitem(last=False)
        self._workers[report.worker] = (report.about, now)
        self._watched = {caller: until for caller, until in self._watched.items() if until >= now}
        return [*self._watched][:MOST_WATCHED]

    async def leave(self, worker: str) -> None:
        """A worker ends."""
        self._workers.pop(worker, None)

    async def read(self, query: FiguresQuery) -> Reading:
        """Look figures up."""
        seen = [each for each, at in self._identities.items() if at >= query.since]
        return Reading(
            [dict(self._totals.get(bucket, {})) for bucket in query.totals],
            [dict(self._callers.get(bucket, {})) for bucket in query.callers],
            seen[::-1],
            dict(self._workers),
            [dict(self._routes.get(bucket, {})) for bucket in query.callers],
        )

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""
        found = [self._callers.get(bucket, {}) for bucket in buckets]
        return [{name: counts[name] for name in names if name in counts} for counts in found]

    async def day(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of plans in each of these buckets of five minutes."""
        return [dict(self._day.get(bucket, {})) for bucket in buckets]

    async def watch(self, caller: str, seconds: float) -> None:
        """Have workers report where a caller comes from, for so long."""
        self._watched[caller] = self._clock() + seconds

    async def sightings(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """Reports about watched callers in each of these minutes."""
        return [dict(self._sightings.get(bucket, {})) for bucket in buckets]

    async def close(self) -> None:
        """There is nothing to close."""


def _add(
    buckets: OrderedDict[int, dict[str, int]], bucket: int, counts: Counts, life: int, most: int = KEPT
) -> None:
    """Add to a bucket, keep its highest counts, and forget the buckets whose time is over."""
    kept = buckets.setdefault(bucket, {})
    for name, count in counts.items():
        kept[name] = kept.get(name, 0) + count
    if len(kept) > most:
        buckets[bucket] = dict(nlargest(most, kept.items(), key=lambda each: each[1]))
    while (first := next(iter(buckets))) < bucket - life:
        del buckets[first]
