"""Reservations: what an admitted charge holds, and the ids of leases."""

import os

import pytest

from ratelimit_mw._internal.model.metered import Meter
from ratelimit_mw._internal.model.reservation import (
    LEASE_ID_SIZE,
    NO_RESERVATION,
    Reservation,
    ReservationKey,
    new_lease_id,
)

ID = b"i" * LEASE_ID_SIZE
SLOT = (ReservationKey("caller", "slots"),)
DAY = (ReservationKey("caller", "USD:2026-11-28", 1),)
METERS = (Meter("caller", "p", "tokens", ()), Meter("caller", "p", "images", ()))


@pytest.mark.parametrize(
    ("reservation", "has_price", "has_estimate", "is_leased"),
    [
        (NO_RESERVATION, False, False, False),
        (Reservation(ID, SLOT), False, False, True),
        (Reservation(ID, SLOT, DAY), False, False, True),
        (Reservation(ID, (), DAY), False, False, False),
        (Reservation(ID, (), DAY, price=1), True, True, True),
        (Reservation(ID, SLOT, DAY, price=1), True, True, True),
        (Reservation(ID, price=1), False, False, False),
        (Reservation(ID, meters=METERS, estimates=(0, 1)), False, True, True),
        (Reservation(ID, meters=METERS, estimates=(0, 0)), False, False, False),
        (Reservation(ID, SLOT, meters=METERS, estimates=(0, 0)), False, False, True),
    ],
)
def test_what_lapses_is_leased(
    reservation: Reservation, has_price: bool, has_estimate: bool, is_leased: bool
) -> None:
    """Slots and estimates lapse where nobody renews them; a budget or a meter that holds nothing doesn't."""
    assert (reservation.has_price, reservation.has_estimate, reservation.is_leased) == (
        has_price,
        has_estimate,
        is_leased,
    )


WHOLE = Reservation(ID, SLOT, DAY, 30.0, 5, "EUR", METERS, (1, 2))


@pytest.mark.parametrize(
    ("reservation", "without_slots"),
    [
        (WHOLE, Reservation(ID, (), DAY, 30.0, 5, "EUR", METERS, (1, 2))),
        (Reservation(ID, SLOT, DAY), Reservation(ID, (), DAY)),
        (Reservation(ID, SLOT, meters=METERS), Reservation(ID, meters=METERS)),
        (Reservation(ID, SLOT), NO_RESERVATION),
    ],
)
def test_freed_slots_leave_the_estimates(reservation: Reservation, without_slots: Reservation) -> None:
    """A reservation without its slots is all else, under the same lease; or nothing."""
    assert reservation.without_slots() == without_slots


@pytest.mark.parametrize(
    ("reservation", "without_meters"),
    [
        (WHOLE, Reservation(ID, SLOT, DAY, 30.0, 5, "EUR")),
        (Reservation(ID, SLOT, meters=METERS), Reservation(ID, SLOT)),
        (Reservation(ID, (), DAY, meters=METERS), Reservation(ID, (), DAY)),
        (Reservation(ID, meters=METERS), NO_RESERVATION),
        (Reservation(ID, SLOT, DAY), Reservation(ID, SLOT, DAY)),
    ],
)
def test_settled_units_leave_the_rest(reservation: Reservation, without_meters: Reservation) -> None:
    """A reservation without its meters is all else, under the same lease; or nothing."""
    assert reservation.without_meters() == without_meters


def test_reservations_of_one_lease_differ_by_what_they_hold() -> None:
    """Two reservations are the same where each of their values is."""
    assert Reservation(ID, SLOT, DAY, 30.0, 5, "EUR", METERS, (1, 2)) == WHOLE
    assert hash(Reservation(ID, SLOT, DAY, 30.0, 5, "EUR", METERS, (1, 2))) == hash(WHOLE)
    others = [WHOLE.without_slots(), WHOLE.without_meters(), NO_RESERVATION, "a text"]
    assert [each == WHOLE for each in others] == [False] * 4


def test_no_id_is_given_twice() -> None:
    """Every lease has an id of its own, however many are made."""
    ids = [new_lease_id() for _ in range(2_000)]
    assert len(set(ids)) == len(ids)
    assert {len(each) for each in ids} == {LEASE_ID_SIZE}


def test_a_child_process_has_ids_of_its_own() -> None:
    """Parent and child don't go on with the random numbers that were fetched before the fork."""
    new_lease_id()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"".join(new_lease_id() for _ in range(10)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    told = os.read(read, 10 * LEASE_ID_SIZE)
    os.close(read)
    os.close(write)
    theirs = {told[at : at + LEASE_ID_SIZE] for at in range(0, len(told), LEASE_ID_SIZE)}
    assert len(theirs) == 10
    assert theirs.isdisjoint(new_lease_id() for _ in range(300))
