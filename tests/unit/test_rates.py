"""Rates as strings: they are read as the `limits` package reads them, whose notation this is."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from ratelimit_mw._internal.model.limits import UNIT_SECONDS, Window
from ratelimit_mw._internal.settings.limits import parse_rate

limits = pytest.importorskip("limits")

_BLANKS = st.sampled_from(["", "", " ", "  ", "\t", "\n", "\x1c", "\x85", "\u2009"])
_COUNTS = st.sampled_from(["1", "5", "007", "60", "999999999", "1_0", "-1", "+1", "1.0", "", "٣", "5 5"])
_SIGNS = st.sampled_from(["/", "/", "per", "PER", "Per", "//", "per per", "", ":", "a"])
_MULTIPLES = st.sampled_from(["", "", "1", "2", "010", "x", "1 1", "-2", "²"])
_UNITS = st.one_of(
    st.sampled_from([f"{unit}{end}" for unit in UNIT_SECONDS for end in ("", "s", "S", "ss", "z")]),
    st.sampled_from(["MINUTE", "Hours", "minute\u017f", "min", "s", "", "week", "per", "second/", "5"]),
)
_RATES = st.tuples(_BLANKS, _COUNTS, _BLANKS, _SIGNS, _BLANKS, _MULTIPLES, _BLANKS, _UNITS, _BLANKS).map(
    "".join
)
_LISTS = st.tuples(_RATES, st.sampled_from([";", ",", "|", ":;", ";;", "&"]), _RATES).map("".join)
_NEAR = st.text("0159/per \tsecondminuthayPERS;,|:\u017f٣", max_size=30)


def as_limits_reads_it(rate: str) -> Window | str:
    """Return the window that `limits` finds in a text, or why it is not exactly one rate."""
    try:
        found = limits.parse_many(rate) if rate.isascii() else []
    except ValueError:
        found = []
    if len(found) == 1:
        return Window(found[0].amount, found[0].multiples, found[0].GRANULARITY.name)
    return "is several rates" if found else "is not a rate"


@example("5/minute:;6/hour")
@example("5/minute;6/hour|7 per day")
@example("5/minute;6/fortnight")
@example("5/minute;")
@example("1" * 100)
@example(" " * 49 + "5/" + " " * 49)
@given(st.one_of(_RATES, _LISTS, _NEAR))
def test_a_rate_is_read_as_limits_reads_it(rate: str) -> None:
    """Any text is the same window here and in `limits`, or here and there no single rate."""
    expected = as_limits_reads_it(rate)
    if isinstance(expected, Window):
        assert parse_rate(rate) == expected
        return
    with pytest.raises(PydanticCustomError) as caught:
        parse_rate(rate)
    assert expected in caught.value.message()


@pytest.mark.parametrize("rate", ["0/minute", "5/0 seconds", "5/00 days", "000 per hour"])
def test_nothing_is_not_a_rate(rate: str) -> None:
    """A count or a multiple of zero is refused: `limits` reads "5/0 seconds" as "5/second"."""
    with pytest.raises(PydanticCustomError, match="never admits anything"):
        parse_rate(rate)
