"""Calendar days and months in a time zone, as microseconds since 1970."""

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

from ratelimit_mw._internal.model.limits import SECOND

KEPT_AFTER_END = 2 * 86_400 * SECOND
"""Microseconds after the end of a period in which it can still be settled."""


Kind = Literal["daily", "monthly"]


class Period(NamedTuple):
    """One day or month: `start` <= t < `end`, in microseconds since 1970."""

    label: str
    """`2026-11-21` or `2026-11`."""
    start: int
    end: int


def period_at(kind: Kind, timezone: str, now: int) -> Period:
    """The day or month of `timezone` that holds `now`.

    A day lasts 23 or 25 hours where the clocks change, and starts at its first existing instant.
    """
    period = _last_seen.get((kind, timezone))
    if period is None or not period.start <= now < period.end:
        period = _last_seen[kind, timezone] = _find(kind, timezone, now)
    return period


_last_seen: dict[tuple[str, str], Period] = {}
# Bounded by the settings: as many entries as there are time zones in them.


def _find(kind: Kind, timezone: str, now: int) -> Period:
    zone = _zone(timezone)
    day = datetime.fromtimestamp(now // SECOND, UTC).astimezone(zone).date()
    period = _period(kind, timezone, day)
    # A zone may skip or repeat midnight: let the boundaries, not the local date, have the last word.
    if now < period.start:
        period = _period(kind, timezone, _previous(kind, day))
    elif now >= period.end:
        period = _period(kind, timezone, _next(kind, day))
    return period


@lru_cache(maxsize=256)
def _zone(timezone: str) -> ZoneInfo:
    return ZoneInfo(timezone)


@lru_cache(maxsize=1024)
def _period(kind: Kind, timezone: str, day: date) -> Period:
    first = day if kind == "daily" else day.replace(day=1)
    label = first.isoformat() if kind == "daily" else first.isoformat()[:7]
    return Period(label, _starts(first, timezone), _starts(_next(kind, first), timezone))


def _next(kind: Kind, day: date) -> date:
    if kind == "daily":
        return day + timedelta(days=1)
    return (day.replace(day=28) + timedelta(days=4)).replace(day=1)


def _previous(kind: Kind, day: date) -> date:
    return (day if kind == "daily" else day.replace(day=1)) - timedelta(days=1)


def _starts(day: date, timezone: str) -> int:
    """The first instant that the zone's clocks show `day`."""
    zone = _zone(timezone)
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    instant = midnight.astimezone(UTC)
    if instant.astimezone(zone).date() < day:
        # The instant lies before a gap that swallows midnight.
        instant = midnight.replace(fold=1).astimezone(UTC)
    while instant.astimezone(zone).date() < day:
        instant += timedelta(minutes=1)
    while (instant - timedelta(minutes=1)).astimezone(zone).date() >= day:
        instant -= timedelta(minutes=1)
    return int(instant.timestamp()) * SECOND
