"""The leaf that is written in C and its equal in Python: the same rules hold for both."""

import importlib.util
import itertools
import struct
import sysconfig
import threading
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ratelimit_mw

FOLDER = Path(ratelimit_mw.__file__).parent / "_internal" / "runtime"
COMPILED = FOLDER / f"leaf{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load(path: Path, loader: type[Any]) -> Any:
    spec = importlib.util.spec_from_loader("leaf", loader("leaf", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LEAVES = [_load(FOLDER / "leaf.py", SourceFileLoader)]
if COMPILED.exists():
    LEAVES.append(_load(COMPILED, ExtensionFileLoader))

each_leaf = pytest.mark.parametrize("leaf", LEAVES, ids=["python", "compiled"][: len(LEAVES)])

STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 400), st.integers(1, 9)),
    st.tuples(st.just("extend"), st.integers(0, 400), st.integers(1, 9)),
    st.tuples(st.just("drop"), st.integers(-1, 500), st.just(0)),
    st.tuples(st.just("cap"), st.integers(0, 500), st.just(0)),
    st.tuples(st.just("clear"), st.just(0), st.just(0)),
)


@each_leaf
@given(steps=st.lists(STEP, max_size=300))
def test_entries_are_a_list_of_pairs(leaf: Any, steps: list[tuple[str, int, int]]) -> None:
    """Entries equal a plain list of pairs, whatever is added, changed and dropped."""
    entries, pairs = leaf.Entries(), list[list[int]]()
    for step in steps:
        pairs = _changed(entries, pairs, *step)
        assert len(entries) == len(pairs)
        if pairs:
            assert (entries.first_time(), entries.last_time()) == (pairs[0][0], pairs[-1][0])
        total = sum(cost for _, cost in pairs)
        for needed in {1, total // 2 or 1, total or 1, total + 1}:
            sums = itertools.accumulate(cost for _, cost in pairs)
            reached = [time for (time, _), so_far in zip(pairs, sums, strict=True) if so_far >= needed]
            assert entries.time_of_sum(needed) == next(iter(reached), -1)


def _changed(entries: Any, pairs: list[list[int]], what: str, number: int, cost: int) -> list[list[int]]:
    """Change the entries, and the list that is their model; returns the list."""
    if what == "append":
        entries.append(number, cost)
        return [*pairs, [number, cost]]
    if what == "extend" and pairs:
        entries.extend_last(number, cost)
        return [*pairs[:-1], [number, pairs[-1][1] + cost]]
    if what == "drop":
        stay = list(itertools.dropwhile(lambda pair: pair[0] <= number, pairs))
        gone = pairs[: len(pairs) - len(stay)]
        assert entries.drop_until(number) == sum(each for _, each in gone)
        return stay
    if what == "cap":
        entries.cap_times(number)
        early = pairs
        while early and early[-1][0] >= number:
            early = early[:-1]
        late = sum(each for _, each in pairs[len(early) :])
        return pairs if early == pairs else [*early, [number, late]]
    if what == "clear":
        entries.clear()
        return []
    return pairs


@each_leaf
def test_empty_entries_have_neither_first_nor_last(leaf: Any) -> None:
    """Asking empty entries for a time, or changing their last pair, is an IndexError."""
    entries = leaf.Entries()
    for ask in (entries.first_time, entries.last_time, lambda: entries.extend_last(1, 1)):
        with pytest.raises(IndexError):
            ask()


@each_leaf
def test_the_lock_keeps_other_threads_out(leaf: Any) -> None:
    """The thread that has the lock may take it again; another waits until it was given back as often."""
    lock = leaf.Lock()
    steps: list[str] = []

    def other() -> None:
        with lock:
            steps.append("other")

    thread = threading.Thread(target=other)
    with lock:
        with lock:
            thread.start()
            thread.join(0.05)
            steps.append("inner")
        thread.join(0.05)
        steps.append("outer")
    thread.join(5)
    assert steps == ["inner", "outer", "other"]


@each_leaf
@given(number=st.integers(-(2**62), 2**62))
def test_digits_are_decimal(leaf: Any, number: int) -> None:
    """A number is written as Python writes it."""
    assert leaf.digits(number) == b"%d" % number


INT64 = st.integers(-(2**63), 2**63 - 1)


@each_leaf
@given(first=st.lists(INT64, max_size=14), then=st.lists(INT64, max_size=40))
def test_numbers_are_a_list(leaf: Any, first: list[int], then: list[int]) -> None:
    """However many are added behind the first ones, each number is found at its place, and none elsewhere."""
    numbers = leaf.Numbers(first)
    for number in then:
        numbers.append(number)
    together = first + then
    assert (len(numbers), list(numbers)) == (len(together), together)
    assert [numbers.at(place) for place in range(len(together))] == together
    with pytest.raises(IndexError):
        numbers.at(len(together))


@each_leaf
@given(before=st.binary(max_size=3), numbers=st.lists(INT64, max_size=20), after=st.binary(max_size=9))
def test_numbers_are_read_from_bytes(leaf: Any, before: bytes, numbers: list[int], after: bytes) -> None:
    """Numbers that were packed are read again from the place where they stand, whatever is around them."""
    packed = before + struct.pack(f"<{len(numbers)}q", *numbers) + after
    assert list(leaf.numbers_in(packed, len(before), len(numbers))) == numbers
    for at, count in ((len(before), len(packed) + 1), (len(packed) + 1, 1)):
        with pytest.raises((ValueError, struct.error)):
            leaf.numbers_in(packed, at, count)
