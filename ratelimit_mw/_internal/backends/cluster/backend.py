"""The shared backend on a cluster: each partition on a node of its own, and one step for each of them.

A charge of several partitions is made step by step, the caller's own first and shared ones last; where a step
refuses or fails, the steps before it are undone.
"""

import asyncio
from collections.abc import Coroutine, Generator, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from ratelimit_mw._internal.backends.cluster.nodes import Nodes
from ratelimit_mw._internal.backends.cluster.router import Router
from ratelimit_mw._internal.backends.cluster.steps import (
    ByAll,
    MetByAll,
    Step,
    admission,
    in_order_of,
    partitions_of,
    parts_of,
    status_without,
    statuses_met,
    steps_of,
)
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.batcher import Batcher
from ratelimit_mw._internal.backends.redis.loops import OperationSender
from ratelimit_mw._internal.backends.redis.renewal_packing import renewed
from ratelimit_mw._internal.backends.redis.time_limit import time_limit
from ratelimit_mw._internal.model.backend import (
    BackendError,
    EstimateAction,
    Load,
    PendingCharge,
    Settlement,
    UnderWay,
)
from ratelimit_mw._internal.model.charge import Charge, Clock
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, NO_RESERVATION, Reservation
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
        self.loops = self._partitions.loops

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
        """Connect to all nodes ahead of the first request. One that is away is not an error."""
        await self._partitions.open()

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        await self._partitions.close()

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> PendingCharge:
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
        loop, steps = asyncio.get_running_loop(), steps_of(charge)
        deadline = loop.time() + self._timeout
        async with time_limit(self._timeout):
            outcomes = await self._take_steps(steps, lease_id, price)
        if outcomes[-1].admitted:
            return admission(charge, lease_id, price, steps, outcomes)
        admitted = outcomes[:-1]
        rest = await self._stand(steps[len(outcomes) :], price, deadline - loop.time())
        statuses = statuses_met(steps, [*outcomes, *rest])
        for index in range(len(admitted)):
            step = steps[index].charge
            statuses[index] = [
                status_without(status, step.cost_at(at), price) for at, status in enumerate(statuses[index])
            ]
        in_order = in_order_of(charge, steps, statuses)
        return Outcome.from_statuses(False, outcomes[0].now, in_order, NO_RESERVATION)

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge slots and allowances that were admitted elsewhere, once however often it is asked for."""
        steps = steps_of(charge)
        outcomes = await _all([self._partitions.restore(step.charge, lease_id, price) for step in steps])
        return admission(charge, lease_id, price, steps, outcomes)

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer as `acquire` would, and charge nothing."""
        if charge.is_of_one:
            return await self._partitions.peek(charge, price)
        steps = steps_of(charge)
        outcomes = await self._peek(steps, price)
        statuses = in_order_of(charge, steps, statuses_met(steps, outcomes))
        return Outcome.from_statuses(
            all(each.admitted for each in outcomes), outcomes[0].now, statuses, NO_RESERVATION
        )

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Let the slots last `seconds` from now; false where one of them was lost before."""
        (kept,) = await self._renew([(reservation, seconds)], is_upkeep=False)
        if isinstance(kept, BackendError):
            raise kept
        return kept

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many reservations, each for its own time, as one operation for each partition.

        The answer to each, or the reason why there is none.
        """
        return await self._renew(renewals, is_upkeep=True)

    async def _renew(
        self, renewals: Sequence[tuple[Reservation, float]], *, is_upkeep: bool
    ) -> Sequence[bool | BackendError]:
        parts: dict[str, list[tuple[int, Reservation, float]]] = {}
        for index, (reservation, seconds) in enumerate(renewals):
            for part in parts_of(reservation):
                if part.slots or part.has_estimate:
                    partition = partitions_of(part)[0]
                    parts.setdefault(partition, []).append((index, part, seconds))
        sent = []
        for found in parts.values():
            operation = self._partitions.send_renewals([each[1:] for each in found], is_upkeep=is_upkeep)
            sent.append((operation, found))
        kept: list[bool | BackendError] = [True] * len(renewals)
        for operation, found in sent:
            for (index, _, _), answer in zip(found, await renewed(operation, len(found)), strict=True):
                if answer is not True and kept[index] is not False:
                    kept[index] = answer
        return kept

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        parts = parts_of(reservation)
        if len(parts) == 1:
            return self._partitions.finish(reservation, action)
        return ByAll([self._partitions.finish(part, action) for part in parts])

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> UnderWay[Settlement]:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        parts = [part for part in parts_of(reservation) if part.periods]
        return MetByAll([self._partitions.settle(part, amount, replace=replace) for part in parts])

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> UnderWay[Settlement]:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        parts = [part for part in parts_of(reservation) if any(meter.unit in units for meter in part.meters)]
        return MetByAll([self._partitions.settle_units(part, units, replace=replace) for part in parts])

    def give_back(self, charge: Charge, reservation: Reservation, times: Sequence[int]) -> None:
        """Undo an admitted charge: windows by its time on each node, the rest by its reservation."""
        for step, time in zip(steps_of(charge), times, strict=True):
            self._partitions.undo(step.charge, reservation.id or NO_LEASE_ID, NO_RESERVATION, time)
        if reservation is not NO_RESERVATION:
            self.finish(reservation, EstimateAction.GIVE_BACK)

    def hold_estimate(self, reservation: Reservation) -> UnderWay[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        return ByAll([self._partitions.hold_estimate(part) for part in parts_of(reservation)])

    async def reset(self, charge: Charge) -> None:
        """Forget what was counted under the counters of `charge`."""
        await _all([self._partitions.reset(step.charge) for step in steps_of(charge)])

    async def _take_steps(self, steps: Sequence[Step], lease_id: bytes, price: int) -> list[Outcome]:
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

    async def _stand(self, steps: Sequence[Step], price: int, timeout: float) -> list[Outcome]:
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

    async def _peek(self, steps: Sequence[Step], price: int) -> list[Outcome]:
        return await _all([self._partitions.peek(step.charge, price) for step in steps])

    def _give_back(self, steps: Sequence[Step], lease_id: bytes, outcomes: Iterable[Outcome]) -> None:
        for step, outcome in zip(steps, outcomes, strict=False):
            if outcome.admitted:
                self._partitions.undo(step.charge, lease_id, outcome.reservation, outcome.now)


class _Partitions(RedisBackend):
    """Decides about charges of one partition each, on the node that serves it."""

    def __init__(self, nodes: Nodes, **options: Any) -> None:
        super().__init__(nodes.url_of(nodes.seeds[0]), **options)
        self._nodes = nodes

    def _new_sender(self) -> OperationSender:
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


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The answers of all; waits for all of them also where one fails."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
