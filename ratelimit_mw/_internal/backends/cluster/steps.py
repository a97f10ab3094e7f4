"""Steps of a charge on a cluster: one for each partition, and how their answers are put together."""

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from ratelimit_mw._internal.model.backend import BackendError, Settlement, UnderWay
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Metering, Reservation, ReservationKey
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus

T = TypeVar("T")


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
            lease_id,
            slots,
            periods,
            charge.lease_seconds,
            priced,
            charge.currency,
            meters,
            estimates,
            _metering_of(reservations),
        )
    statuses = in_order_of(charge, steps, statuses_met(steps, outcomes))
    outcome = Outcome.from_statuses(True, outcomes[0].now, statuses, reservation)
    outcome.times = tuple([each.now for each in outcomes])
    return outcome


def _metering_of(reservations: Iterable[Reservation]) -> Metering | None:
    """Put together what is known of the units of all steps."""
    known = [each.metering for each in reservations if each.metering is not None]
    if not known:
        return None
    metering = Metering()
    for each in known:
        metering.times.update(each.times)
        metering.by_script |= each.by_script
        metering.is_restored = metering.is_restored or each.is_restored
    return metering


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


class ByAll(Generic[T]):
    """Operations on the parts of a reservation, under way. Awaiting it waits for all of them."""

    def __init__(self, sent: Sequence[UnderWay[T]]) -> None:
        self._sent = sent
        self._said: dict[int, T | BackendError] = {}
        """Answers and errors so far, by the index of their part."""

    def __await__(self) -> Generator[Any, None, Any]:
        for index, each in enumerate(self._sent):
            try:
                self._said[index] = yield from each.__await__()
            except BackendError as error:
                self._said[index] = error
        said = self._together()
        if isinstance(said, BackendError):
            raise said
        return said

    def tell(self, listener: Callable[[Any], object]) -> None:
        """Call `listener` once all have their answers: with these together, or with the error of one."""
        self._listener = listener
        for index, each in enumerate(self._sent):
            each.tell(partial(self._told, index))
        if not self._sent:
            listener(self._together())

    def combine(self, answers: Sequence[T]) -> Any:
        """Make one answer of those of all parts: here of no more than that each was done."""

    def _told(self, index: int, said: T | BackendError) -> None:
        self._said[index] = said
        if len(self._said) == len(self._sent):
            self._listener(self._together())

    def _together(self) -> Any:
        in_order = [self._said[index] for index in range(len(self._sent))]
        errors = [said for said in in_order if isinstance(said, BackendError)]
        return (
            errors[-1]
            if errors
            else self.combine([said for said in in_order if not isinstance(said, BackendError)])
        )


class MetByAll(ByAll[Settlement]):
    """The settles of a reservation's parts, under way. Awaiting it tells what they have met together."""

    def combine(self, answers: Sequence[Settlement]) -> Settlement:
        """Combine the settlements into one: the first that is not `REPEATED`.

        The result is `REPEATED` if all of them are, and `UNKNOWN` if there are no parts.
        """
        return next(
            (each for each in answers if each is not Settlement.REPEATED),
            answers[0] if answers else Settlement.UNKNOWN,
        )


def _of(keys: Iterable[ReservationKey], partition: str) -> tuple[ReservationKey, ...]:
    return tuple(held for held in keys if held.partition == partition)
