"""Units that a process admitted without the backend: which of them it is told of, and how often."""

from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.metered import MAX_AMOUNT
from ratelimit_mw._internal.outage.unsynced import ANY_COST, STEPS, UnsyncedWindow, boundless

MINUTE = 60 * SECOND
STEP = MINUTE // STEPS


def waiting_in(counts: str = "requests", quota: int = 2_000) -> UnsyncedWindow:
    """Units under a window of a minute that wait."""
    window = Window(quota, 1, "minute", counts)
    return UnsyncedWindow(Counter("a", "p", window), window)


def told_of(charge: Charge | None) -> int:
    """Return the units that a charge tells of."""
    assert charge is not None
    return charge.estimates[0]


def test_all_that_is_in_the_window_is_told_once() -> None:
    """One charge tells of units that came at several times; when it has arrived nothing is left."""
    waiting = waiting_in()
    for now in (0, 1, STEP, 5 * STEP):
        waiting.add(now, 3)
    assert waiting.units(5 * STEP) == 12
    charge = waiting.to_tell(5 * STEP)
    assert told_of(charge) == 12
    waiting.told(charge)
    assert waiting.is_over
    assert waiting.to_tell(5 * STEP) is None
    assert waiting.units(5 * STEP) == 0


def test_what_may_have_arrived_is_told_by_the_same_charge_again() -> None:
    """The charge and its id stay the same until it has arrived; what was admitted since comes after it."""
    waiting = waiting_in()
    waiting.add(0, 3)
    charge, lease_id = waiting.to_tell(1), waiting.lease_id
    waiting.add(2, 4)
    assert waiting.to_tell(2) is charge
    assert waiting.lease_id == lease_id
    assert waiting.units(2) == 7
    waiting.told(None)
    waiting.told(Charge(()))
    assert waiting.to_tell(2) is charge
    assert not waiting.is_over
    waiting.told(charge)
    assert told_of(waiting.to_tell(3)) == 4
    assert waiting.lease_id != lease_id


def test_what_has_left_the_window_is_told_no_more() -> None:
    """Units leave to the microsecond, those of one step together with the last of them."""
    waiting = waiting_in()
    for now in (0, 1, STEP):
        waiting.add(now, 3)
    assert [waiting.units(MINUTE + now) for now in (0, 1, STEP - 1, STEP)] == [9, 3, 3, 0]
    assert told_of(waiting.to_tell(MINUTE + 1)) == 3
    assert waiting_in().to_tell(0) is None


def test_a_charge_in_doubt_goes_when_all_of_it_has_left_the_window() -> None:
    """By then it has left the backend's window too, if it arrived there."""
    waiting = waiting_in()
    waiting.add(0, 3)
    charge = waiting.to_tell(0)
    waiting.add(STEP, 4)
    assert waiting.to_tell(MINUTE - 1) is charge
    assert told_of(waiting.to_tell(MINUTE)) == 4
    assert waiting.to_tell(MINUTE + STEP) is None
    assert waiting.is_over


def test_a_charge_in_doubt_is_told_as_long_as_any_of_it_is_in_the_window() -> None:
    """It goes with the latest of its units, not with the first."""
    waiting = waiting_in()
    waiting.add(0, 3)
    waiting.add(5 * STEP, 4)
    charge = waiting.to_tell(5 * STEP)
    assert waiting.to_tell(MINUTE + 5 * STEP - 1) is charge
    assert waiting.to_tell(MINUTE + 5 * STEP) is None


def test_more_than_one_charge_can_tell_is_told_in_parts() -> None:
    """A charge has at most the largest amount of a unit; the rest keeps the time of the last unit."""
    waiting = waiting_in()
    waiting.add(0, MAX_AMOUNT)
    waiting.add(STEP, 5)
    charge = waiting.to_tell(STEP)
    assert told_of(charge) == MAX_AMOUNT
    waiting.told(charge)
    assert not waiting.is_over
    assert waiting.units(MINUTE) == 5
    assert told_of(waiting.to_tell(MINUTE + STEP - 1)) == 5


def test_the_charge_is_counted_in_the_same_window_without_a_limit() -> None:
    """It leaves a record as units do, also where it tells of requests, and outlasts the window."""
    for counts in ("requests", "tokens"):
        waiting = waiting_in(counts)
        waiting.add(0, 3)
        charge = waiting.to_tell(0)
        assert charge is not None
        (counter,) = charge.counters
        assert isinstance(counter.limit, Window)
        assert (counter.partition, counter.scope, counter.limit.seconds) == ("a", "p", 60)
        assert (counter.limit.quota, counter.limit.granule) == (ANY_COST, MINUTE // 1_000)
        assert (charge.is_recorded, charge.lease_seconds) == (True, 60.0)
    exact = boundless(Counter("a", "p", Window(7, 1, "minute"))).limit
    assert isinstance(exact, Window)
    assert exact.granule == 0
