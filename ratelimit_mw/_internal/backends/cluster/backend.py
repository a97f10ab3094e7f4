"""The shared backend on a cluster: each partition on a node of its own, and one step for each of them.

A charge of several partitions is made step by step, the caller's own first and shared ones last; where a step
refuses or fails, the steps before it are undone.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Generator, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ratelimit_mw._internal.backends.cluster.nodes import Nodes
from ratelimit_mw._internal.backends.cluster.router import Router
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.batcher import Batcher
from ratelimit_mw._internal.backends.redis.operations import Sender
from ratelimit_mw._internal.backends.redis.packing import renewed
from ratelimit_mw._internal.backends.redis.time_limit import time_limit
from ratelimit_mw._internal.model.backend import Asked, BackendError, EstimateAction, Load, Settlement
from ratelimit_mw._internal.model.charge import Charge, Clock
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, ReservationKey
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.runtime.leaf import Numbers

T = TypeVar("T")


class ClusterBackend:
    """Windows, slots and budgets in a Redis or Valkey cluster, decided by the clocks of its nodes."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "ratelimit",
        timeout: float = 0.1,
        options: dict[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`url` names some of the nodes; the rest is as of `RedisBackend`."""
        self._timeout = timeout
        nodes = Nodes(url, timeout=timeout, options=options)
        self._partitions = _Partitions(
            nodes, namespace=namespace, timeout=timeout, options=options, clock=clock
        )
        self.call_observers = self._partitions.call_observers

    @property
    def error(self) -> BackendError | None:
        """Error that marks a node as away; None while all nodes are there or were not asked yet."""
        return self._partitions.error

    @property
    def load(self) -> Load:
        """Load of all nodes together: operations carried, and operations that wait."""
        return self._partitions.load

    @property
    def is_away(self) -> bool:
        """Whether one of the nodes is thought to be."""
        return self._partitions.is_away

    async def open(self) -> None:
        """Connect to all nodes ahead of the first request. One that is away is no error."""
        await self._partitions.open()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        await self._partitions.close()

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Asked:
        """Send a charge of all of `charge`'s counters, or none, on its way."""
        if charge.is_of_one:
            return self._partitions.ask(charge, lease_id, price)
        return _AskedInSteps(self._acquire_in_time(charge, lease_id, price))

    def take_over(self) -> None:
        """Send what event loops that have ended owed, and undo what they left half done."""
        self._partitions.take_over()

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all of `charge`'s counters, or none."""
        if charge.is_of_one:
            return await self._partitions.acquire(charge, lease_id, price)
        return await self._acquire_in_time(charge, lease_id, price)

    async def _acquire_in_time(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        loop, steps = asyncio.get_running_loop(), _steps_of(charge)
        deadline = loop.time() + self._timeout
        async with time_limit(self._timeout):
            outcomes = await self._take_steps(steps, lease_id, price)
        if outcomes[-1].admitted:
            return _admission(charge, lease_id, price, steps, outcomes)
        admitted = outcomes[:-1]
        rest = await self._stand(steps[len(outcomes) :], price, deadline - loop.time())
        statuses = _statuses(steps, [*outcomes, *rest])
        for place in range(len(admitted)):
            step = steps[place].charge
            statuses[place] = [
                _without(status, step.cost_at(at), price) for at, status in enumerate(statuses[place])
            ]
        in_order = _in_order(charge, steps, statuses)
        return Outcome.from_statuses(False, outcomes[0].now, in_order, NO_RESERVATION)

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere, once however often it is asked for."""
        steps = _steps_of(charge)
        outcomes = await _all([self._partitions.restore(step.charge, lease_id, price) for step in steps])
        return _admission(charge, lease_id, price, steps, outcomes)

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        if charge.is_of_one:
            return await self._partitions.peek(charge, price)
        steps = _steps_of(charge)
        outcomes = await self._peek(steps, price)
        statuses = _in_order(charge, steps, _statuses(steps, outcomes))
        return Outcome.from_statuses(
            all(each.admitted for each in outcomes), outcomes[0].now, statuses, NO_RESERVATION
        )

    async def renew(self, hold: Reservation, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        (kept,) = await self._renew([(hold, lease)], is_upkeep=False)
        if isinstance(kept, BackendError):
            raise kept
        return kept

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many holds, each for its own time, as one operation for each partition; the answer to each,
        or why there is none.
        """
        return await self._renew(renewals, is_upkeep=True)

    async def _renew(
        self, renewals: Sequence[tuple[Reservation, float]], *, is_upkeep: bool
    ) -> Sequence[bool | BackendError]:
        parts: dict[str, list[tuple[int, Reservation, float]]] = {}
        for place, (hold, lease) in enumerate(renewals):
            for part in _parts_of(hold):
                if part.slots or part.has_estimate:
                    partition = _partitions_of(part)[0]
                    parts.setdefault(partition, []).append((place, part, lease))
        sent = []
        for found in parts.values():
            operation = self._partitions.send_renewals([each[1:] for each in found], is_upkeep=is_upkeep)
            sent.append((operation, found))
        kept: list[bool | BackendError] = [True] * len(renewals)
        for operation, found in sent:
            for (place, _, _), answer in zip(found, await renewed(operation, len(found)), strict=True):
                if answer is not True and kept[place] is not False:
                    kept[place] = answer
        return kept

    def finish(self, hold: Reservation, money: EstimateAction) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        parts = _parts_of(hold)
        if len(parts) == 1:
            return self._partitions.finish(hold, money)
        finished = asyncio.gather(*[self._partitions.finish(part, money) for part in parts])
        finished.add_done_callback(lambda done: done.cancelled() or done.exception())
        return finished

    async def settle(self, hold: Reservation, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        parts = [part for part in _parts_of(hold) if part.periods]
        met = await _all([self._partitions.settle(part, amount, replace=replace) for part in parts])
        return _met_by_all(met)

    async def settle_units(self, hold: Reservation, units: Units, *, replace: bool = False) -> Settlement:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        parts = [part for part in _parts_of(hold) if any(meter.unit in units for meter in part.meters)]
        met = await _all([self._partitions.settle_units(part, units, replace=replace) for part in parts])
        return _met_by_all(met)

    def keep(self, hold: Reservation) -> Awaitable[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        kept = asyncio.gather(*[self._partitions.keep(part) for part in _parts_of(hold)])
        kept.add_done_callback(lambda done: done.cancelled() or done.exception())
        return kept

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        await _all([self._partitions.reset(step.charge) for step in _steps_of(charge)])

    async def _take_steps(self, steps: Sequence["_Step"], lease_id: bytes, price: int) -> list[Outcome]:
        """Take all steps, or those up to the first that refuses, and undo the others again."""
        outcomes: list[Outcome] = []
        try:
            for step in steps:
                outcomes.append(await self._partitions.acquire(step.charge, lease_id, price))
                if not outcomes[-1].admitted:
                    self._give_back(steps, lease_id, outcomes)
                    break
        except BaseException:  # failed, cancelled, or ended by hand
            self._give_back(steps, lease_id, outcomes)
            raise
        return outcomes

    async def _stand(self, steps: Sequence["_Step"], price: int, timeout: float) -> list[Outcome]:
        """Peek at the limits that were not asked, so that the wait told to the caller covers them, too.

        A limit that can't be asked changes nothing about the refusal, and is reported as unused.
        """
        try:
            async with time_limit(timeout):
                return await self._peek(steps, price)
        except BackendError:
            return [
                Outcome(False, 0, Numbers([0, 0, 0] * len(step.places)), NO_RESERVATION) for step in steps
            ]

    async def _peek(self, steps: Sequence["_Step"], price: int) -> list[Outcome]:
        return await _all([self._partitions.peek(step.charge, price) for step in steps])

    def _give_back(self, steps: Sequence["_Step"], lease_id: bytes, outcomes: Iterable[Outcome]) -> None:
        for step, outcome in zip(steps, outcomes, strict=False):
            if outcome.admitted:
                self._partitions.give_back(step.charge, lease_id, outcome)


class _Partitions(RedisBackend):
    """Decides about charges of one partition each, on the node that serves it."""

    def __init__(self, nodes: Nodes, **options: Any) -> None:
        super().__init__(nodes.url_of(nodes.seeds[0]), **options)
        self._nodes = nodes

    def _new_batcher(self) -> Sender:
        new_batcher = partial(
            Batcher,
            timeout=self._timeout,
            clock_argument=self._clock_argument,
            call_observers=self.call_observers,
        )
        return Router(self._nodes, new_batcher, timeout=self._timeout, prefix=self._prefix)


class _AskedInSteps:
    """A charge of several partitions on its way; it undoes its own steps where it is cancelled."""

    def __init__(self, steps: Coroutine[Any, Any, Outcome]) -> None:
        self._steps = steps

    def __await__(self) -> Generator[Any, None, Outcome]:
        return self._steps.__await__()

    def give_up(self) -> None:
        """Do nothing: what was cancelled has undone its steps."""


class _Step(NamedTuple):
    """The part of a charge that one node decides about."""

    charge: Charge
    places: tuple[int, ...]
    """Indexes of the step's counters in the whole charge."""


class _Steps(tuple[_Step, ...]):
    """Cached steps of a charge of several partitions, one for each partition."""

    __slots__ = ()


def _steps_of(charge: Charge) -> Sequence[_Step]:
    """A step for each partition, in the order of the counters."""
    if charge.is_of_one:
        return [_Step(charge, tuple(range(len(charge.counters))))]
    prepared = charge.prepared
    if isinstance(prepared, _Steps):
        return prepared
    places: dict[str, list[int]] = {}
    for place, counter in enumerate(charge.counters):
        places.setdefault(counter.partition, []).append(place)
    steps = _Steps(
        _Step(
            Charge(
                [charge.counters[place] for place in found],
                charge.cost,
                lease=charge.lease,
                estimates=charge.units,
            ),
            tuple(found),
        )
        for found in places.values()
    )
    charge.prepared = steps
    return steps


def _admission(
    charge: Charge, lease_id: bytes, price: int, steps: Sequence[_Step], outcomes: Sequence[Outcome]
) -> Outcome:
    holds = [outcome.hold for outcome in outcomes]
    slots = tuple(held for hold in holds for held in hold.slots)
    periods = tuple(held for hold in holds for held in hold.periods)
    meters = tuple(meter for hold in holds for meter in hold.meters)
    estimates = tuple(estimate for hold in holds for estimate in hold.estimates)
    hold = NO_RESERVATION
    if slots or periods or meters:
        priced = price if periods else 0
        hold = Reservation(lease_id, slots, periods, charge.lease, priced, charge.currency, meters, estimates)
    statuses = _in_order(charge, steps, _statuses(steps, outcomes))
    return Outcome.from_statuses(True, outcomes[0].now, statuses, hold)


def _statuses(steps: Sequence[_Step], outcomes: Sequence[Outcome]) -> list[list[Status]]:
    """The statuses that each step has met."""
    return [step.charge.statuses(outcome) for step, outcome in zip(steps, outcomes, strict=True)]


def _in_order(charge: Charge, steps: Sequence[_Step], parts: Sequence[Sequence[Status]]) -> list[Status]:
    """Statuses of the steps, in the order of the charge's counters."""
    found = {
        place: status
        for step, part in zip(steps, parts, strict=True)
        for place, status in zip(step.places, part, strict=True)
    }
    return [found[place] for place in range(len(charge.counters))]


def _without(status: Status, cost: int, price: int) -> Status:
    """Status of a limit that admitted a charge, once the charge is undone."""
    if isinstance(status, WindowStatus):
        used = status.used - cost
        return WindowStatus(used, status.reset_after_us if used else 0, 0)
    if isinstance(status, SlotStatus):
        return SlotStatus(status.active - 1, is_full=False)
    return BudgetStatus(status.spent, status.held - price, is_short=False)


def _parts_of(hold: Reservation) -> list[Reservation]:
    """A hold for each partition that it lies in."""
    partitions = _partitions_of(hold)
    if len(partitions) <= 1:
        return [hold]
    return [_part_of(hold, each) for each in partitions]


def _partitions_of(hold: Reservation) -> list[str]:
    partitions = [held.partition for held in (*hold.slots, *hold.periods)]
    return list(dict.fromkeys([*partitions, *[meter.partition for meter in hold.meters]]))


def _part_of(hold: Reservation, partition: str) -> Reservation:
    metered = [
        each for each in zip(hold.meters, hold.estimates, strict=True) if each[0].partition == partition
    ]
    return hold.with_places(
        _of(hold.slots, partition),
        _of(hold.periods, partition),
        tuple([meter for meter, _ in metered]),
        tuple([estimate for _, estimate in metered]),
    )


def _met_by_all(met: Sequence[Settlement]) -> Settlement:
    """Combine the settlements of a reservation's parts into one: the first that is not `REPEATED`.

    The result is `REPEATED` if all of them are, and `UNKNOWN` if there are no parts.
    """
    return next(
        (each for each in met if each is not Settlement.REPEATED), met[0] if met else Settlement.UNKNOWN
    )


def _of(places: Iterable[ReservationKey], partition: str) -> tuple[ReservationKey, ...]:
    return tuple(held for held in places if held.partition == partition)


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The answers of all; waits for all of them also where one fails."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
