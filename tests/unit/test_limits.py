"""The three kinds of limit: what each of them means, in figures and in words."""

import pytest

from ratelimit_mw._internal.model.limits import ANSWERS, Allowance, Budget, Slots, Window, part_of

MINUTE = 60_000_000


@pytest.mark.parametrize(
    ("multiple", "unit", "seconds", "text", "phrase"),
    [
        (1, "second", 1, "5/second", "1 second"),
        (2, "second", 2, "5/2 seconds", "2 seconds"),
        (1, "minute", 60, "5/minute", "1 minute"),
        (1, "hour", 3_600, "5/hour", "1 hour"),
        (3, "hour", 10_800, "5/3 hours", "3 hours"),
        (1, "day", 86_400, "5/day", "1 day"),
        (1, "month", 2_592_000, "5/month", "1 month"),
        (1, "year", 31_536_000, "5/year", "1 year"),
    ],
)
def test_a_window_has_one_length(multiple: int, unit: str, seconds: int, text: str, phrase: str) -> None:
    """A month is 30 days and a year 365; the plural is written from two on."""
    window = Window(5, multiple, unit)
    assert (window.seconds, window.length) == (seconds, seconds * 1_000_000)
    assert (window.text, window.name, window.phrase) == (text, text, phrase)


@pytest.mark.parametrize(
    ("quota", "whole", "granule"), [(1_000, 0, 0), (1_001, 0, MINUTE // 1_000), (800, 1_001, MINUTE // 1_000)]
)
def test_a_window_is_exact_up_to_a_thousand(quota: int, whole: int, granule: int) -> None:
    """Above 1,000 the thousandth of a window is one entry, for all plans that share a count alike."""
    assert Window(quota, 1, "minute", whole=whole).granule == granule


@pytest.mark.parametrize(
    ("counts", "is_metered", "counts_answers", "name"),
    [
        ("requests", False, False, "5/minute"),
        ("tokens", True, False, "5 tokens/minute"),
        (f"{ANSWERS}login", True, True, "5/minute"),
    ],
)
def test_a_window_is_named_by_what_it_counts(
    counts: str, is_metered: bool, counts_answers: bool, name: str
) -> None:
    """Requests that are counted by their answers are settled as units are, and told as requests."""
    window = Window(5, 1, "minute", counts)
    assert (window.is_metered, window.counts_answers, window.name) == (is_metered, counts_answers, name)


@pytest.mark.parametrize(
    ("amount", "share", "part"), [(100, 0.29, 29), (10, 0.55, 5), (3, 0.1, 1), (7, 1.0, 7)]
)
def test_a_share_is_that_of_its_decimals(amount: int, share: float, part: int) -> None:
    """A share is rounded down from the decimal that the settings wrote, and is at least 1."""
    assert part_of(amount, share) == part


def test_a_share_of_a_limit_knows_the_whole() -> None:
    """Callers of a plan may use a part of a shared limit, which stays one count; the whole is not a part."""
    window, slots = Window(10, 1, "minute"), Slots(10)
    assert (window.at_share(0.5).quota, window.at_share(0.5).whole) == (5, 10)
    assert (slots.at_share(0.5).limit, slots.at_share(0.5).whole) == (5, 10)
    assert (window.at_share(1.0), slots.at_share(1.0)) == (window, slots)


def test_a_budget_has_an_allowance_for_each_amount() -> None:
    """An amount of nothing is an allowance that refuses; a period without one has no limit."""
    both = Budget(daily=0, monthly=7, currency="EUR", timezone="Asia/Tokyo", warn_at=0.8)
    assert both.allowances == (
        Allowance(0, "daily", "EUR", "Asia/Tokyo", 0.8),
        Allowance(7, "monthly", "EUR", "Asia/Tokyo", 0.8),
    )
    assert Budget().allowances == ()
