"""All that is counted of a caller: asked for and forgotten in parts."""

from ratelimit_mw._internal.limiter.inspect_caller import MAX_COUNTERS, _parts
from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import Window


def test_windows_of_one_unit_are_never_apart() -> None:
    """The estimates of a unit belong to all of its windows: `reset` forgets both with one question."""
    windows = [Window(10, number, "minute", "tokens") for number in (1, 2, 3)]
    counters = [Counter("caller", f"r{route}:tokens", each) for route in range(60) for each in windows]
    parts = list(_parts(counters))
    assert [counter for part in parts for counter in part] == counters
    assert max(map(len, parts)) == MAX_COUNTERS // 3 * 3
    scopes = [{counter.scope for counter in part} for part in parts]
    assert sum(map(len, scopes)) == len(set.union(*scopes))


def test_one_place_with_more_counters_than_a_part_has_is_one_part() -> None:
    """However many they are, and nothing makes no part."""
    counters = [Counter("caller", "p:tokens", Window(10, 1 + n, "minute", "tokens")) for n in range(120)]
    assert list(map(len, _parts(counters))) == [120]
    assert list(_parts([])) == []
