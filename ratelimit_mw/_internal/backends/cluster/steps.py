"""Steps of a charge on a cluster: one for each partition, and how their answers are put together."""

from collections.abc import Awaitable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from ratelimit_mw._internal.model.backend import BackendError, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, ReservationKey
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus


class Step(NamedTuple):
    """The part of a charge that one node decides about."""

    charge: Charge
    places: tuple[int, ...]
    """Indexes of the step's counters in the whole charge."""


class _Steps(tuple[Step, ...]):
    """Cached steps of a charge of several partitions, one for each partition."""

    __slots__ = ()


def steps_of(charge: Charge) -> Sequence[Step]:
    """A step for each partition, in the order of the counters."""
    if charge.is_of_one:
        return [Step(charge, tuple(range(len(charge.counters))))]
    prepared = charge.prepared
    if isinstance(prepared, _Steps):
        return prepared
    places: dict[str, list[int]] = {}
    for place, counter in enumerate(charge.counters):
        places.setdefault(counter.partition, []).append(place)
    steps = _Steps(
        Step(
            Charge(
                [charge.counters[place] for place in found],
                charge.cost,
                lease_seconds=charge.lease_seconds,
                estimates=charge.units,
            ),
            tuple(found),
        )
        for found in places.values()
    )
    charge.prepared = steps
    return steps


def admission(
    charge: Charge, lease_id: bytes, price: int, steps: Sequence[Step], outcomes: Sequence[Outcome]
) -> Outcome:
    reservations = [outcome.reservation for outcome in outcomes]
    slots = tuple(held for reservation in reservations for held in reservation.slots)
    periods = tuple(held for reservation in reservations for held in reservation.periods)
    meters = tuple(meter for reservation in reservations for meter in reservation.meters)
    estimates = tuple(estimate for reservation in reservations for estimate in reservation.estimates)
    reservation = NO_RESERVATION
    if slots or periods or meters:
        priced = price if periods else 0
        reservation = Reservation(
            lease_id, slots, periods, charge.lease_seconds, priced, charge.currency, meters, estimates
        )
    statuses = in_order_of(charge, steps, statuses_met(steps, outcomes))
    outcome = Outcome.from_statuses(True, outcomes[0].now, statuses, reservation)
    outcome.times = tuple([each.now for each in outcomes])
    return outcome


def statuses_met(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> list[list[Status]]:
    """The statuses that each step has met."""
    return [step.charge.statuses(outcome) for step, outcome in zip(steps, outcomes, strict=True)]


def in_order_of(charge: Charge, steps: Sequence[Step], parts: Sequence[Sequence[Status]]) -> list[Status]:
    """Statuses of the steps, in the order of the charge's counters."""
    found = {
        place: status
        for step, part in zip(steps, parts, strict=True)
        for place, status in zip(step.places, part, strict=True)
    }
    return [found[place] for place in range(len(charge.counters))]


def status_without(status: Status, cost: int, price: int) -> Status:
    """Status of a limit that admitted a charge, once the charge is undone."""
    if isinstance(status, WindowStatus):
        used = status.used - cost
        return WindowStatus(used, status.reset_after_us if used else 0, 0)
    if isinstance(status, SlotStatus):
        return SlotStatus(status.active - 1, is_full=False)
    return BudgetStatus(status.spent, status.held - price, is_short=False)


def parts_of(reservation: Reservation) -> list[Reservation]:
    """A reservation for each partition that it lies in."""
    partitions = partitions_of(reservation)
    if len(partitions) <= 1:
        return [reservation]
    return [_part_of(reservation, each) for each in partitions]


def partitions_of(reservation: Reservation) -> list[str]:
    partitions = [held.partition for held in (*reservation.slots, *reservation.periods)]
    return list(dict.fromkeys([*partitions, *[meter.partition for meter in reservation.meters]]))


def _part_of(reservation: Reservation, partition: str) -> Reservation:
    metered = [
        each
        for each in zip(reservation.meters, reservation.estimates, strict=True)
        if each[0].partition == partition
    ]
    return reservation.with_keys(
        _of(reservation.slots, partition),
        _of(reservation.periods, partition),
        tuple([meter for meter, _ in metered]),
        tuple([estimate for _, estimate in metered]),
    )


class MetByAll:
    """The settles of a reservation's parts, under way. Awaiting it tells what they have met together."""

    def __init__(self, sent: Sequence[Awaitable[Settlement]]) -> None:
        self._sent = sent

    def __await__(self) -> Generator[Any, None, Settlement]:
        met, error = list[Settlement](), None
        for each in self._sent:
            try:
                met.append((yield from each.__await__()))
            except BackendError as failure:
                error = failure
        if error is not None:
            raise error
        return _met_by_all(met)


def _met_by_all(met: Sequence[Settlement]) -> Settlement:
    """Combine the settlements of a reservation's parts into one: the first that is not `REPEATED`.

    The result is `REPEATED` if all of them are, and `UNKNOWN` if there are no parts.
    """
    return next(
        (each for each in met if each is not Settlement.REPEATED), met[0] if met else Settlement.UNKNOWN
    )


def _of(keys: Iterable[ReservationKey], partition: str) -> tuple[ReservationKey, ...]:
    return tuple(held for held in keys if held.partition == partition)
