"""Entries that hold for a while: what holds at which time, and how they are written."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw import KeyEntry
from ratelimit_mw._internal.cli.durations import parse_duration
from ratelimit_mw._internal.cli.output import UsageError
from ratelimit_mw._internal.live.network_entries import network_at, network_of
from ratelimit_mw._internal.live.timed_entries import (
    MOST_NESTED,
    TimedEntry,
    entry_at,
    read_live,
    timed,
    write_live,
)

Held = Callable[[float], KeyEntry | None]
CHANGES = st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from(["set", "remove", "while"]), st.integers(1, 40)),
    max_size=12,
)


@given(CHANGES)
def test_it_goes_back_to_what_held_before(changes: list[tuple[int, str, int]]) -> None:
    """At any time an entry holds what a list of all changes says: the latest one that is not over."""
    now = 0.0
    entry: KeyEntry | None = None

    def nothing(_: float) -> KeyEntry | None:
        return None

    held: Held = nothing
    for number, (passed, kind, seconds) in enumerate(changes):
        now += passed
        new, before = KeyEntry(f"plan-{number}"), held
        if kind == "while":
            until = now + seconds
            entry = timed(new, until, entry)

            def held(
                at: float, until: float = until, new: KeyEntry = new, before: Held = before
            ) -> KeyEntry | None:
                return new if at < until else before(at)

        else:
            entry = new if kind == "set" else None

            def held(at: float, new: KeyEntry | None = entry) -> KeyEntry | None:
                return new

        for at in range(int(now), int(now) + 90):
            found = entry_at(entry, at)
            expected = held(at)
            assert (found and found.plan) == (expected and expected.plan)
        assert entry is None or read_live(write_live(entry)) == entry


def test_what_is_over_by_then_is_left_out() -> None:
    """However often a change for a while is made anew, the entry stays small."""
    entry: KeyEntry | None = KeyEntry("pro")
    for hour in range(1_000):
        entry = timed(KeyEntry("blocked"), hour + 2.0, entry)
    assert isinstance(entry, TimedEntry)
    assert entry.then == KeyEntry("pro")
    assert len(write_live(entry)) < 100


def test_too_many_changes_one_over_the_other_are_refused() -> None:
    """Each shorter than the one below: beyond a bound the next is an error, and so is such a text."""
    entry: KeyEntry | None = None
    for number in range(MOST_NESTED):
        entry = timed(KeyEntry("p"), 100.0 - number, entry)
    with pytest.raises(ValueError, match="on top of each other"):
        timed(KeyEntry("p"), 1.0, entry)
    text = b'{"plan":"p"}'
    for number in range(MOST_NESTED + 2):
        text = b'{"plan":"p","until":%d,"then":%b}' % (100 - number, text)
    with pytest.raises(ValueError, match="on top of each other"):
        read_live(text)


@pytest.mark.parametrize("until", ["true", '"2h"', "NaN", "Infinity", "null", "[]", "1e999"])
def test_a_damaged_end_is_no_entry(until: str) -> None:
    """An end that is not a time makes the entry one that can't be read."""
    with pytest.raises(ValueError, match="that is not a time"):
        read_live(b'{"plan":"p","until":%b}' % until.encode())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7_200),
        ("30m", 1_800),
        ("1d12h", 129_600),
        ("90s", 90),
        ("1D2H", 93_600),
        (" 5m ", 300),
    ],
)
def test_durations(text: str, seconds: int) -> None:
    """Days, hours, minutes and seconds, the larger before the smaller."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2w", "-2h", "1.5h", "2h1d", "0s", "999999999d", "2 hours", "2h2h"]
)
def test_what_is_no_duration(text: str) -> None:
    """Anything else is wrong usage."""
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("name", "is_network"),
    [
        ("192.0.2.0/24", True),
        ("2001:db8::/64", True),
        ("192.0.2.7/32", True),
        ("0.0.0.0/0", True),
        ("192.0.2.7", False),
        ("192.0.2.7/24", False),
        ("::ffff:192.0.2.0/120", False),
        ("2001:DB8::/64", False),
        ("sha256:" + "0" * 64, False),
        ("a/b", False),
    ],
)
def test_names_of_network_entries(name: str, is_network: bool) -> None:
    """Each network has one spelling among the live entries."""
    assert (network_of(name) is not None) == is_network


def test_a_callers_name_is_that_of_its_network() -> None:
    """A caller who is counted by address has an entry by its name; any other has none."""
    names = ["ip:192.0.2.7", "ip:2001:db8:0:1::/64", "ip:unix", "ip:peer:testclient", "k:0123", "a:192.0.2.7"]
    found = ["192.0.2.7/32", "2001:db8:0:1::/64", None, None, None, None]
    assert [network_at(name) for name in names] == found
