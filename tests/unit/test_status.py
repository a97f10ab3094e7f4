"""Statuses: how a window, slots and a budget stand after a decision, each by names of its own."""

import pytest

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome, row_before
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.policy.decision import LimitStatus
from ratelimit_mw._internal.runtime.leaf import Numbers

WINDOW, SLOTS, BUDGET = Window(10, 1, "minute"), Slots(3), Allowance(1_000, "daily")
CHARGE = Charge([Counter("k", "p", limit) for limit in (WINDOW, SLOTS, BUDGET)])
STATUSES: list[Status] = [
    WindowStatus(10, 20 * SECOND, 30 * SECOND),
    SlotStatus(3, is_full=True),
    BudgetStatus(700, 250, is_short=True),
]


def outcome_of(statuses: list[Status]) -> Outcome:
    """A refusal with these statuses."""
    return Outcome.from_statuses(False, 5, statuses, NO_RESERVATION)


def test_a_charge_tells_the_status_of_each_of_its_limits() -> None:
    """An outcome made of statuses has them, each of the kind of its limit."""
    told = CHARGE.statuses(outcome_of(STATUSES))
    assert told == STATUSES
    assert [type(each) for each in told] == [WindowStatus, SlotStatus, BudgetStatus]
    assert isinstance(told[1], SlotStatus)
    assert told[1].is_full is True


def test_the_quick_answers_of_an_outcome_are_those_of_the_statuses() -> None:
    """Figures that headers and warnings read without any status are those of the statuses."""
    outcome = outcome_of(STATUSES)
    assert [outcome.used(place) for place in range(3)] == [10, 3, 700]
    assert outcome.reset_after(0) == 20 * SECOND
    assert outcome.held(2) == 250


@pytest.mark.parametrize("place", range(3))
def test_a_limit_refuses_by_its_own_sign(place: int) -> None:
    """A window refuses while it tells a wait, slots while they are full, a budget while it is short."""
    admitting: list[Status] = [
        WindowStatus(10, SECOND, 0),
        SlotStatus(3, is_full=False),
        BudgetStatus(700, 300, is_short=False),
    ]
    statuses = [*admitting[:place], STATUSES[place], *admitting[place + 1 :]]
    refuses = [status.refuses for status in CHARGE.statuses(outcome_of(statuses))]
    assert refuses == [at == place for at in range(3)]


def test_a_wait_of_a_microsecond_is_a_refusal() -> None:
    """A window refuses to the last moment before its charge fits."""
    assert WindowStatus(10, 1, 1).refuses
    assert not WindowStatus(10, 1, 0).refuses


def test_what_is_spent_or_held_is_taken() -> None:
    """Nobody else can spend what is spent, nor what is held."""
    assert BudgetStatus(700, 250, is_short=False).taken == 950


@pytest.mark.parametrize(
    ("status", "change", "later"),
    [
        (WindowStatus(10, 20, 30), 20, WindowStatus(10, 15, 25)),
        (WindowStatus(10, 20, 0), 20, WindowStatus(10, 15, 0)),
        (WindowStatus(10, 30, 7), 7, WindowStatus(10, 25, 2)),
        (WindowStatus(0, 0, 0), None, WindowStatus(0, 0, 0)),
    ],
)
def test_moments_of_a_window_come_nearer(
    status: WindowStatus, change: int | None, later: WindowStatus
) -> None:
    """Time brings what is to come nearer, and never makes a moment of what has none."""
    assert status.next_change == change
    assert status.after(5) == later


@pytest.mark.parametrize(("place", "kind"), [(0, "window"), (1, "slots"), (2, "budget")])
def test_a_limit_and_its_status_come_together(place: int, kind: str) -> None:
    """Of the three kinds, one names the limit and its status, and the others nothing."""
    counter = CHARGE.counters[place]
    limit_status = LimitStatus(counter, STATUSES[place])
    found = {each: getattr(limit_status, each) for each in ("window", "slots", "budget")}
    assert found.pop(kind) == (counter.limit, STATUSES[place])
    assert list(found.values()) == [None, None]


def test_charges_alike_are_told_how_it_was_before_the_others() -> None:
    """Of three that were admitted together, the first is told neither of the others nor of a refusal."""
    charge = Charge([Counter("k", "p", WINDOW), Counter("k", "p", SLOTS)], cost=2)
    admitted = Outcome(True, 5, row_before(Numbers((9, SECOND, 8, 3, 0, 1)), charge.steps, 2), NO_RESERVATION)
    assert charge.statuses(admitted) == [WindowStatus(5, SECOND, 0), SlotStatus(1, is_full=False)]


def test_slots_of_one_request_end_with_the_shortest_of_them() -> None:
    """They are renewed and freed together: the shortest lease and the shortest `max_hold` count for all."""
    limits = [
        Slots(3, lease_seconds=30.0, max_hold=9.0),
        Slots(5, lease_seconds=10.0, max_hold=60.0),
        Slots(7, lease_seconds=20.0),
    ]
    for order in (limits, limits[::-1]):
        charge = Charge([Counter("k", f"p{place}", limit) for place, limit in enumerate(order)])
        assert (charge.lease_seconds, charge.max_hold) == (10.0, 9.0)
    assert Charge([Counter("k", "p", Slots(3))]).max_hold is None


def test_outcomes_are_told_apart_by_each_of_their_values() -> None:
    """Two outcomes are the same where the answer, its time, all statuses and the reservation are."""
    outcome = outcome_of(STATUSES)
    assert outcome == outcome_of(STATUSES)
    assert hash(outcome) == hash(outcome_of(STATUSES))
    others = [
        Outcome.from_statuses(True, 5, STATUSES, NO_RESERVATION),
        Outcome.from_statuses(False, 6, STATUSES, NO_RESERVATION),
        outcome_of([*STATUSES[:2], BudgetStatus(700, 251, is_short=True)]),
        Outcome.from_statuses(False, 5, STATUSES, Reservation(b"another")),
        "a text",
    ]
    assert [outcome == each for each in others] == [False] * 5
