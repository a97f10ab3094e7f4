"""Points of the charts, and the gaps where nobody reported."""

import pytest

from ratelimit_mw._internal.fleet.series import continued, point_of, with_gaps
from ratelimit_mw._internal.fleet.snapshot import Snapshot

BUCKET = 5


@pytest.mark.parametrize(
    ("reported", "known"),
    [
        ("", ""),
        ("x", "x"),
        (".", "x"),
        ("xxxx", "xxxx"),
        ("xx.xx", "xxxxx"),  # a worker without work, which reports every five to six seconds
        ("xx..xx", "xx..xx"),
        ("...xxx", "...xxx"),
        ("xx.", "xxx"),  # the last one is still growing
        ("xx..", "xxxx"),
        ("xx....", "xx...x"),
        ("x.x.x.", "xxxxxx"),
    ],
)
def test_what_nobody_reported_is_not_known(reported: str, known: str) -> None:
    """A bucket without a report is a gap, unless it stands alone or is still growing."""
    counts = {"x": {"admitted pro": 1}, ".": dict[str, int]()}
    points = [point_of(BUCKET * place, counts[each]) for place, each in enumerate(reported)]
    assert "".join("x" if point.known else "." for point in with_gaps(points)) == known


def snapshot_of(now: float) -> Snapshot:
    """A snapshot at this moment, with an admitted request in each of four buckets."""
    series = tuple(point_of(at, {"admitted pro": 1}) for at in (980, 985, 990, 995))
    return Snapshot(now, BUCKET, series, (), (), (), True, True)


@pytest.mark.parametrize(
    ("seconds", "points"),
    [
        (0.0, [(980, True), (985, True), (990, True), (995, True)]),
        (2.5, [(980, True), (985, True), (990, True), (995, True)]),
        (3.0, [(985, True), (990, True), (995, False), (1000, False)]),
        (11.0, [(995, False), (1000, False), (1005, False)]),
        (900.0, [(1885, False), (1890, False), (1895, False)]),
    ],
)
def test_nothing_is_known_of_the_time_since_a_snapshot(
    seconds: float, points: list[tuple[int, bool]]
) -> None:
    """The chart goes on while the backend is away; what was growing then was not read to its end."""
    later = continued(snapshot_of(997.0), seconds)
    assert later.now == 997.0 + seconds
    assert len(later.series) == 4
    assert [(point.at, point.known) for point in later.series][-len(points) :] == points
