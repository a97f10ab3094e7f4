"""Days and months of every time zone: without gaps, without overlaps, named as the calendar names them."""

import zoneinfo
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.periods import KEPT_AFTER_END, Kind, period_at

KINDS: list[Kind] = ["daily", "monthly"]
ZONES = sorted(zoneinfo.available_timezones() - {"localtime"})
NOON_OF_2000, END_OF_2037 = 946_728_000, 2_145_916_800


def label_at(kind: Kind, zone: str, now: int) -> str:
    """Return the label that a zone's calendar shows at a time."""
    local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now)).astimezone(
        zoneinfo.ZoneInfo(zone)
    )
    return f"{local:%Y-%m-%d}" if kind == "daily" else f"{local:%Y-%m}"


@given(
    kind=st.sampled_from(KINDS),
    zone=st.sampled_from(ZONES),
    now=st.integers(NOON_OF_2000 * SECOND, END_OF_2037 * SECOND),
)
def test_every_instant_is_in_one_period(kind: Kind, zone: str, now: int) -> None:
    """A period holds its instant, begins where the one before ends, and is named by its first instant."""
    period = period_at(kind, zone, now)
    assert period.start <= now < period.end
    assert period.label == label_at(kind, zone, period.start)
    assert period_at(kind, zone, period.start) == period_at(kind, zone, period.end - 1) == period
    assert period_at(kind, zone, period.end).start == period.end
    assert period_at(kind, zone, period.start - 1).end == period.start
    hours = (period.end - period.start) / (3_600 * SECOND)
    assert 22 <= hours <= 48 if kind == "daily" else 27 * 24 <= hours <= 32 * 24


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"])
def test_the_label_is_the_date_on_the_zones_clocks(zone: str) -> None:
    """Also hour by hour through a year in which the clocks change."""
    start = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    for hour in range(366 * 24):
        now = (start + hour * 3_600) * SECOND
        assert period_at("daily", zone, now).label == label_at("daily", zone, now)


@pytest.mark.parametrize(
    ("zone", "day", "start"),
    [
        ("UTC", "2026-11-21", "2026-11-21T00:00:00+00:00"),
        ("America/Havana", "2025-11-02", "2025-11-02T00:00:00-04:00"),  # midnight comes twice
        ("Asia/Beirut", "2026-03-29", "2026-03-29T01:00:00+03:00"),  # there is no midnight
        ("Africa/Cairo", "2026-10-30", "2026-10-30T00:00:00+02:00"),  # in its place 23:00 comes twice
    ],
)
def test_a_day_starts_at_its_first_instant(zone: str, day: str, start: str) -> None:
    """Also where the clocks change at midnight, and show it twice or never."""
    began = int(datetime.fromisoformat(start).timestamp()) * SECOND
    for since in (0, 1, 1_800 * SECOND, 7_200 * SECOND):
        period = period_at("daily", zone, began + since)
        assert (period.label, period.start) == (day, began)
    assert period_at("daily", zone, began - 1).end == began


def test_a_period_can_be_settled_for_two_days() -> None:
    """So that a job that ends after midnight, or after a weekend's outage, is still charged."""
    assert timedelta(microseconds=KEPT_AFTER_END) == timedelta(days=2)
