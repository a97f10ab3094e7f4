"""Points of the charts: what workers reported in each bucket, and where nobody reported anything."""

from collections.abc import Sequence
from dataclasses import replace

from ratelimit_mw._internal.backends.figures_store import Counts
from ratelimit_mw._internal.fleet.reading import NOTHING, total
from ratelimit_mw._internal.fleet.snapshot import Point, Snapshot


def point_of(at: int, counts: Counts) -> Point:
    """Return the point of a bucket; one without any report says so."""
    return Point(at, total(counts), known=bool(counts))


def with_gaps(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points; one without a report counts as known between two with reports, and as the last one.

    A worker without work reports every five to six seconds, so a bucket of five seconds may lack one.
    """
    if not points:
        return ()
    reported = [point.known for point in points[:-1]] + [True]
    before, after = [False, *reported], [*reported[1:], True]
    return tuple(
        point._replace(known=is_known or (before[index] and after[index]))
        for index, (point, is_known) in enumerate(zip(points, reported, strict=True))
    )


def continued(snapshot: Snapshot, seconds: float) -> Snapshot:
    """Return a snapshot so many seconds later, with nothing known since then."""
    if not snapshot.series or seconds <= 0:
        return snapshot
    now, bucket = round(snapshot.now + seconds, 3), snapshot.bucket
    *before, growing = snapshot.series
    newest = int(now // bucket) * bucket
    if newest == growing.at:
        return replace(snapshot, now=now)
    # The bucket that was growing was not read to its end.
    added = (Point(at, NOTHING, known=False) for at in range(growing.at + bucket, newest + 1, bucket))
    series = (*before, growing._replace(known=False), *added)
    return replace(snapshot, now=now, series=series[-len(snapshot.series) :])
