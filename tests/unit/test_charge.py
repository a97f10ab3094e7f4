"""Charges: what all requests of a caller on a route have in common."""

import pytest

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance, Limit, Slots, Window

WINDOW = Window(5, 1, "minute")


@pytest.mark.parametrize("others", [[Slots(1)], [Allowance(1, "daily")], [Slots(1), Allowance(1, "daily")]])
def test_only_units_of_windows_are_taken_ahead(others: list[Limit]) -> None:
    """A slot and an estimate are held from the moment of their request, so neither is taken before it."""
    for limits in (others, [WINDOW, *others]):
        with pytest.raises(ValueError, match="only units of windows"):
            Charge([Counter("caller", "p", each) for each in limits], ahead=1)
    assert Charge([Counter("caller", "p", WINDOW)], ahead=1).ahead == 1


@pytest.mark.parametrize(
    ("partitions", "is_one"), [([], True), (["a"], True), (["a", "a"], True), (["a", "b"], False)]
)
def test_what_one_partition_counts_is_one_question(partitions: list[str], is_one: bool) -> None:
    """A cluster is asked in steps only where a charge is counted under several partitions."""
    assert Charge([Counter(each, "p", WINDOW) for each in partitions]).is_of_one == is_one
