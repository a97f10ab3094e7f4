"""Bodies of refusals that are kept: nobody is told another refusal's figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw._internal.cache.refusals import CachedRefusal
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, refusal_of
from ratelimit_mw._internal.responses import refusals
from ratelimit_mw._internal.responses.refusals import RefusalWriter
from ratelimit_mw._internal.settings import ResponseSettings

WINDOWS = [Window(2, 1, "minute"), Window(3, 1, "minute"), Window(3, 1, "hour")]


@st.composite
def _refused(draw: st.DrawFn) -> Decision:
    """A refusal by one or more of a caller's windows; few values, so that many are nearly the same."""
    statuses = tuple(
        LimitStatus(
            Counter("caller", "p", window),
            WindowStatus(draw(st.integers(0, 3)), draw(st.sampled_from([0, SECOND, 1_000])), wait),
        )
        for window, wait in zip(
            WINDOWS, draw(st.lists(st.sampled_from([0, 1_000, SECOND + 1]))), strict=False
        )
    )
    if not any(limit_status.status.refuses for limit_status in statuses):
        statuses = (LimitStatus(Counter("caller", "p", WINDOWS[0]), WindowStatus(2, SECOND, SECOND)),)
    now, cost = draw(st.sampled_from([5 * SECOND, 5 * SECOND + 1])), draw(st.integers(1, 2))
    return Decision(False, now, cost, 0, statuses, refusal_of(statuses, 0, now))


@given(refused=st.lists(_refused(), max_size=30), body=st.sampled_from(["json", "problem"]))
def test_a_kept_body_says_what_a_new_one_would(refused: list[Decision], body: str) -> None:
    """However often and in whatever order callers are refused, each gets its own answer."""
    settings = ResponseSettings.model_validate({"body": body})
    keeping = RefusalWriter(settings)
    assert [keeping(each) for each in refused] == [RefusalWriter(settings)(each) for each in refused]


def test_the_bodies_kept_are_bounded() -> None:
    """However many callers are refused, so many bodies are kept at most."""
    writer = RefusalWriter(ResponseSettings())
    for used in range(refusals.MAX_BODIES + 10):
        statuses = (LimitStatus(Counter("caller", "p", WINDOWS[0]), WindowStatus(used, SECOND, SECOND)),)
        writer(Decision(False, SECOND, 1, 0, statuses, refusal_of(statuses, 0, SECOND)))
    assert len(writer._bodies) <= refusals.MAX_BODIES


@pytest.mark.parametrize("wait", [1_000, 999_999, SECOND, SECOND + 1, 1_500_000, 2 * SECOND, 61 * SECOND])
def test_an_answer_is_given_again_as_long_as_its_seconds_are_the_same(wait: int) -> None:
    """Milliseconds go on; from the microsecond on at which the whole seconds are others it is made anew."""
    writer, counter = RefusalWriter(ResponseSettings()), Counter("caller", "p", WINDOWS[0])

    def refused_at(age: int) -> Decision:
        statuses = (LimitStatus(counter, WindowStatus(2, wait - age, wait - age)),)
        return Decision(False, 5 * SECOND + age, 1, 0, statuses, refusal_of(statuses, 0, 5 * SECOND + age))

    outcome = Outcome.from_statuses(False, 5 * SECOND, [WindowStatus(2, wait, wait)], NO_RESERVATION)
    refused = CachedRefusal(Charge([counter]), outcome, 0.0, 1.0, ("rate", "p"))
    first = writer(refused_at(0))
    writer.remember(refused, first, refused_at(0))
    seconds = dict(first.headers)[b"retry-after"]
    for age in sorted({0, 1, wait % SECOND - 1, wait % SECOND, wait % SECOND + 1, wait - 1}):
        if 0 <= age < wait:
            new, again = writer(refused_at(age)), writer.again(refused, age)
            is_same = dict(new.headers)[b"retry-after"] == seconds
            assert again == (new if is_same else None), age
