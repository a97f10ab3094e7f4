"""Live keys that fit the settings: kept up to date change by change, with what a look at all would find."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw import KeyEntry, Settings
from ratelimit_mw._internal.live.sound_keys import SoundKeys
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.layered import MOST_CHANGED, Layered

HASHES = [f"sha256:{number:064x}" for number in range(6)]
SETTINGS = Settings.model_validate(
    {
        "plans": {"team": {"share": "account"}, "crew": {"share": "account"}, "pro": {}},
        "keys": [
            {"hash": HASHES[0], "plan": "team", "account": "acme"},
            {"hash": HASHES[1], "plan": "pro", "account": "bolt"},
        ],
    }
)
entries = st.builds(
    KeyEntry,
    st.sampled_from(["team", "crew", "pro", "nowhere"]),
    st.sampled_from([None, "acme", "bolt"]),
    st.sampled_from([None, ("5/minute",), ("5/never",)]),
    st.sampled_from([None, 3, 0]),
)
changes = st.lists(st.dictionaries(st.sampled_from(HASHES), st.none() | entries, min_size=1), max_size=8)


def texts(sound: SoundKeys) -> dict[str, list[str]]:
    """The problems as they are told."""
    return {name: list(map(str, problems)) for name, problems in sound.problems.items()}


@given(changes)
def test_changes_one_by_one_lead_to_what_a_look_at_all_finds(steps: list[dict[str, KeyEntry | None]]) -> None:
    """Whatever the order of changes, the same keys are sound, and the same problems are told."""
    kept: dict[str, KeyEntry] = {}
    followed = SoundKeys(SETTINGS)
    for step in steps:
        kept |= {name: entry for name, entry in step.items() if entry is not None}
        kept = {name: entry for name, entry in kept.items() if step.get(name, entry) is not None}
        followed.update(kept, step)
        whole = SoundKeys(SETTINGS)
        whole.update(kept, kept)
        assert dict(followed.keys) == dict(whole.keys)
        assert texts(followed) == texts(whole)
        assert {*followed.keys, *followed.problems} == kept.keys()


def test_one_changed_key_makes_no_other_be_looked_at() -> None:
    """The work for a change doesn't grow with the keys that are set: these stay the same objects."""
    kept = {f"sha256:{number:064x}": KeyEntry("pro", account=f"a{number}") for number in range(500)}
    sound = SoundKeys(SETTINGS)
    sound.update(kept, kept)
    before = sound.keys
    sound.update(_Forbidden({HASHES[3]: KeyEntry("pro")}), [HASHES[3]])
    changed = [name for name in before if before[name] is not sound.keys[name]]
    assert changed == [HASHES[3]]


class _Forbidden(dict[str, KeyEntry]):
    """Entries of which only those that were changed may be looked at."""

    def __missing__(self, name: str) -> KeyEntry:
        raise AssertionError(name)

    def get(self, name: str, default: object = None) -> KeyEntry:
        """Look one up."""
        return self[name]


@given(
    st.dictionaries(st.text("ab"), st.integers()),
    st.lists(st.dictionaries(st.text("abc"), st.none() | st.integers())),
)
def test_a_layered_mapping_is_the_changed_one(
    items: dict[str, int], steps: list[dict[str, int | None]]
) -> None:
    """It has what a plain copy with the changes would have, and no change of it changes an earlier one."""
    mapping, plain = Layered(items), dict(items)
    for step in steps:
        earlier, before = mapping, dict(mapping)
        mapping = mapping.with_changes(step)
        plain = {name: value for name, value in {**plain, **step}.items() if value is not None}
        assert (dict(mapping), len(mapping)) == (plain, len(plain))
        assert dict(earlier) == before


def test_a_layered_mapping_shares_what_did_not_change() -> None:
    """A few changes cost no copy of everything; many are put together now and then."""
    mapping = Layered({str(number): number for number in range(5_000)})
    changed = mapping.with_changes({"a": 1})
    assert changed._base is mapping._base
    for number in range(MOST_CHANGED + 1):
        changed = changed.with_changes({f"b{number}": number})
        assert len(changed._changed) <= MOST_CHANGED
    assert len(changed) == 5_001 + MOST_CHANGED + 1


async def test_many_items_are_worked_on_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the event loops, a pause comes after every few items; in a loop itself there is none."""
    done: list[int] = []
    pauses: list[int] = []
    monkeypatch.setattr(time, "sleep", lambda _: pauses.append(len(done)))

    def work() -> None:
        for each in threads.in_pieces(range(1_000), 10):
            done.append(each)  # noqa: PERF402 - as far as it has got

    work()
    assert pauses == []
    done.clear()
    await threads.call(work)
    assert pauses == list(range(10, 1_001, 10))


async def test_checking_keys_pauses_after_every_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece of the work on thousands of keys grows with their number."""
    made: list[None] = []
    pauses = [0]
    monkeypatch.setattr(time, "sleep", lambda _: pauses.append(len(made)))

    class Counted(dict[str, KeyEntry]):
        def get(self, name: str, default: object = None) -> KeyEntry:
            made.append(None)
            return self[name]

    kept = {f"sha256:{number:064x}": KeyEntry("pro", account=f"a{number}") for number in range(2_000)}
    sound = SoundKeys(SETTINGS)
    await threads.call(lambda: sound.update(Counted(kept), kept))
    assert len(sound.keys) == 2_000
    assert max(later - sooner for sooner, later in pairwise(pauses)) <= threads.PIECE
    assert len(pauses) > 2 * 2_000 / threads.PIECE  # for those of an account together, too
