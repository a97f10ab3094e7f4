"""Reservations and counts that this process admitted alone while the backend was away, told to it afterwards.

Until then a reservation lives in this process's memory; from then on in the shared backend, under the same
lease id. A crash before that loses it.

The event loops of several threads admit here, and a task in one of them tells the backend: their shared state
is changed under `lock`, in which nothing is ever waited for.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import Backend, BackendError, EstimateAction, Settlement, UnderWay
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation, new_lease_id
from ratelimit_mw._internal.outage.sync_task import SyncTask
from ratelimit_mw._internal.outage.unsynced import UNTOUCHED, UnsyncedReservation, UnsyncedWindow, unshared
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.process_end import tell_at_process_end

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

logger = logging.getLogger("ratelimit_mw")

MAX_UNSYNCED = 10_000
"""Reservations, and counters of windows, that may wait for the backend; beyond it the oldest is given up."""
AT_ONCE = 64
"""Number of reservations and counters that the backend is told of at once."""


class OutageReconciler:
    """Keeps reservations that this process admitted alone; tells the backend when it is back."""

    def __init__(
        self,
        shared: Backend,
        local: MemoryBackend,
        clock: Clock,
        on_told: Callable[[Charge, Outcome], None],
    ) -> None:
        """`on_told` learns how a caller stands in the shared backend before the local counts are cleared."""
        self._shared = shared
        self._local = local
        self._clock = clock
        self._on_told = on_told
        self._windows: dict[Counter, UnsyncedWindow] = {}
        self._reservations: dict[bytes, UnsyncedReservation] = {}
        self._budgets: dict[Counter, None] = {}
        self._syncing = SyncTask(self.__len__, self.sync)
        self.lock: AbstractContextManager[bool] = threading.RLock()
        self.lost: int = 0
        """Number of reservations and counters that were given up before the backend was told all of them."""
        renew_after_fork(self)
        tell_at_process_end(self)

    def after_fork(self) -> None:
        """Leave what the backend has to be told to the parent process, which tells it."""
        self.lock = threading.RLock()
        self._syncing.after_fork()
        self.lost = 0
        self._windows.clear()
        self._reservations.clear()
        self._budgets.clear()

    def __len__(self) -> int:
        """Return the number of reservations and counters that the backend has to be told of."""
        return len(self._windows) + len(self._reservations)

    def unsynced(self, counter: Counter) -> int:
        """Units that were admitted here under a window, and that the backend doesn't know of."""
        counter = unshared(counter)
        waiting = self._windows.get(counter)
        units = 0 if waiting is None else waiting.units(self._clock())
        if isinstance(counter.limit, Window) and counter.limit.is_metered:
            for unsynced in self._reservations.values():
                units += sum([used for window, used in unsynced.metered() if window == counter])
        return units

    def add(self, charge: Charge, reservation: Reservation, price: int) -> None:
        """Remember a charge that was admitted here. Waits for nothing; to be called under `lock`."""
        for place, counter in enumerate(charge.counters):
            if isinstance(counter.limit, Window) and not counter.limit.is_metered:
                self._count(counter, counter.limit, charge.cost_at(place))
        if reservation.id:
            self._reservations[reservation.id] = UnsyncedReservation(charge, reservation, price)
            if len(self._budgets) < MAX_UNSYNCED:
                self._budgets.update(dict.fromkeys(charge.allowances))
            if len(self._reservations) > MAX_UNSYNCED:
                self._forget(self._reservations.pop(next(iter(self._reservations))))
                self._note_lost()
        self._syncing.start()

    def open(self, charge: Charge) -> Reservation:
        """Open an estimate of nothing here, under an id of its own. Waits for nothing."""
        with self.lock:
            reservation = self._local.decide(charge, new_lease_id(), 0).reservation
            self.add(charge, reservation, 0)
        return reservation

    def _count(self, counter: Counter, window: Window, cost: int) -> None:
        """Count units that were admitted here, which the backend has to be told of."""
        counter = unshared(counter)
        waiting = self._windows.get(counter)
        if waiting is None:
            waiting = self._windows[counter] = UnsyncedWindow(counter, window)
            if len(self._windows) > MAX_UNSYNCED:
                self._windows.pop(next(iter(self._windows))).forget_on(self._shared)
                self._note_lost()
        waiting.add(self._clock(), cost)

    def give_back(self, charge: Charge, reservation: Reservation, times: Sequence[int]) -> None:
        """Undo a charge that was admitted here, as far as the backend was not told of it."""
        with self.lock:
            for place, counter in enumerate(map(unshared, charge.counters)):
                if isinstance(counter.limit, Window) and not counter.limit.is_metered:  # as in `add`
                    waiting, cost = self._windows.get(counter), charge.cost_at(place)
                    if waiting is not None and waiting.take_back(cost):
                        self._local.give_back(Charge([counter], cost), NO_RESERVATION, times)
        if reservation is not NO_RESERVATION:
            self.finish(reservation, EstimateAction.GIVE_BACK)

    # the life of a reservation, in whichever backend it is -----------------------------------------

    async def renew(self, reservation: Reservation, seconds: float) -> bool:
        """Let the slots last `seconds` from now; false where one of them was lost before."""
        holder = self._local if reservation.id in self._reservations else self._shared
        return await holder.renew(reservation, seconds)

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many reservations, each for its own time; the answer to each, or why there is none."""
        here = [reservation.id in self._reservations for reservation, _ in renewals]
        local = [each for each, is_here in zip(renewals, here, strict=True) if is_here]
        shared = [each for each, is_here in zip(renewals, here, strict=True) if not is_here]
        local_answers = iter(await self._local.renew_all(local))
        answers = iter(await self._shared.renew_all(shared) if shared else ())
        return [next(local_answers if is_here else answers) for is_here in here]

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        with self.lock:
            unsynced = self._reservations.get(reservation.id)
            if unsynced is None:
                return self._shared.finish(reservation, action)
            unsynced.is_slotless = unsynced.is_slotless or bool(reservation.slots)
            if action is not EstimateAction.UNTOUCHED and not unsynced.is_ended:
                unsynced.is_ended, unsynced.is_failed = True, action is EstimateAction.GIVE_BACK
                if action is EstimateAction.GIVE_BACK and not unsynced.is_settled:
                    unsynced.price = 0
                if not unsynced.is_synced:
                    self._count_units(unsynced)
            if unsynced.is_over:
                del self._reservations[reservation.id]
                self._forget(unsynced)
            return self._local.finish(reservation, action)

    def settle(self, reservation: Reservation, amount: int, *, replace: bool = False) -> UnderWay[Settlement]:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        with self.lock:
            unsynced = self._reservations.get(reservation.id)
            if unsynced is None:
                return self._shared.settle(reservation, amount, replace=replace)
            met = self._local.settle(reservation, amount, replace=replace)
            if met.value is Settlement.SETTLED:
                unsynced.price, unsynced.is_settled = amount, True
            return met

    def settle_units(
        self, reservation: Reservation, units: Units, *, replace: bool = False
    ) -> UnderWay[Settlement]:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        with self.lock:
            unsynced = self._reservations.get(reservation.id)
            if unsynced is None:
                return self._shared.settle_units(reservation, units, replace=replace)
            met = self._local.settle_units(reservation, units, replace=replace)
            for unit, used in units.items():
                if replace or unit not in unsynced.units:
                    unsynced.units[unit] = used
            return met

    def _count_units(self, unsynced: UnsyncedReservation) -> None:
        """Count what an ended request has used like units that were admitted: nothing changes it any more."""
        for counter, used in unsynced.metered():
            if used and isinstance(counter.limit, Window):
                self._count(counter, counter.limit, used)
        unsynced.is_metered_out = True

    def hold_estimate(self, reservation: Reservation) -> UnderWay[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        with self.lock:
            unsynced = self._reservations.get(reservation.id)
            if unsynced is None:
                return self._shared.hold_estimate(reservation)
            unsynced.never_lapses = True
            return self._local.hold_estimate(reservation)

    # telling --------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Tell what can be told now, for a bounded time, and report what is lost."""
        if not await self._syncing.finish():
            return  # it goes on in a loop that serves requests
        self._lose_rest("the limiter was closed")

    def at_process_end(self) -> None:
        """Report what the backend was never told, where nobody has closed the limiter."""
        self._lose_rest("the process ended", is_over=True)

    def _lose_rest(self, reason: str, *, is_over: bool = False) -> None:
        with self.lock:
            if len(self):
                self.lost += len(self)
                logger.error("%d counts of this process never reached the backend: %s", len(self), reason)
                if not is_over:
                    for unsynced in self._reservations.values():
                        self._forget(unsynced)
                    for waiting in self._windows.values():
                        waiting.forget_on(self._shared)
                self._windows.clear()
                self._reservations.clear()

    def resume(self) -> None:
        """Go on in the running event loop where the one that told the backend has ended."""
        self._syncing.resume()

    async def leave(self) -> None:
        """Tell no more in the running event loop, which ends; another one goes on with it."""
        await self._syncing.leave()

    async def sync(self) -> None:
        """Tell the backend what it doesn't know yet, as far as it can be told now."""
        if not await self._sync_first():
            return  # the backend is away, as all the others would find
        with self.lock:
            jobs = [partial(self._sync_window, counter) for counter in self._windows]
            jobs += [partial(self._sync_reservation, unsynced) for unsynced in self._reservations.values()]
        for start in range(0, len(jobs), AT_ONCE):
            if not any(await asyncio.gather(*[job() for job in jobs[start : start + AT_ONCE]])):
                return
        with self.lock:
            if not self._reservations:  # so that this process counts nothing which the shared backend doesn't
                budgets, self._budgets = Charge(self._budgets), {}
                await self._local.reset(budgets)  # which never waits

    async def _sync_first(self) -> bool:
        with self.lock:
            counter, unsynced = next(iter(self._windows), None), next(iter(self._reservations.values()), None)
        if counter is not None:
            return await self._sync_window(counter)
        return unsynced is None or await self._sync_reservation(unsynced)

    async def _sync_window(self, counter: Counter) -> bool:
        """Charge what was admitted here and has not left the window, however full it is by now."""
        with self.lock:
            waiting = self._windows.get(counter)
            charge = None if waiting is None else waiting.to_tell(self._clock())
        if waiting is not None and charge is not None:
            try:
                outcome = await self._shared.restore(charge, waiting.lease_id, 0)
            except BackendError:
                with self.lock:
                    if self._windows.pop(counter, None) is not None:
                        self._windows[counter] = waiting  # now the last in turn
                return False
            # Its record goes with the window, so that it is known until then.
            self._shared.settle_units(outcome.reservation, charge.units)
            self._on_told(Charge([counter]), outcome)
        with self.lock:
            if waiting is not None:
                waiting.told(charge)
                if waiting.is_over and self._windows.get(counter) is waiting:
                    del self._windows[counter]
            if counter not in self._windows:
                await self._local.reset(Charge([counter]))  # which never waits
        return True

    async def _sync_reservation(self, unsynced: UnsyncedReservation) -> bool:
        """Open the reservation in the shared backend, in the state that it has here."""
        lease_id = unsynced.reservation.id
        with self.lock:
            if self._reservations.get(lease_id) is not unsynced:
                return True
            counters, seconds = unsynced.counters(self._clock()), unsynced.reservation.lease_seconds
            charge = Charge(counters, lease_seconds=seconds, estimates=unsynced.charge.units)
            price = unsynced.price
            unsynced.is_synced = unsynced.is_synced or bool(charge.counters)
        if charge.counters:
            try:
                outcome = await self._shared.restore(charge, lease_id, price)
            except BackendError:
                with self.lock:
                    if self._reservations.pop(lease_id, None) is not None:
                        self._reservations[lease_id] = unsynced  # now the last in turn
                return False
            self._on_told(charge, outcome)
            await self._catch_up(unsynced, outcome.reservation)
        with self.lock:
            self._reservations.pop(lease_id, None)
        await self._local.finish(unsynced.reservation, EstimateAction.GIVE_BACK)
        return True

    async def _catch_up(self, unsynced: UnsyncedReservation, reservation: Reservation) -> None:
        """Do in the shared backend what was done here, before or while the reservation was opened there.

        Repeats that until nothing was done here during the last pass. Only then what is done to the lease
        goes to the shared backend directly, so that no end gets there before a settle.
        """
        done = UNTOUCHED
        while True:
            with self.lock:
                fate = unsynced.fate
                if fate == done:
                    self._reservations.pop(reservation.id, None)
                    return
                sent = unsynced.repeat_on(self._shared, reservation)
            done = fate
            try:
                for each in sent:
                    await each
            except BackendError as error:
                self.lost += 1
                text = "the spending of lease %s in an outage could not be written to the backend: %s"
                logger.error(text, reservation.id.hex(), error)  # noqa: TRY400 - the reason says it all
                return

    def _forget(self, unsynced: UnsyncedReservation) -> None:
        """Have the backend forget a reservation that was perhaps told to it, and won't be told again."""
        if unsynced.is_synced:
            self._shared.finish(unsynced.reservation, EstimateAction.GIVE_BACK)

    def _note_lost(self) -> None:
        self.lost += 1
        if self.lost % 1000 == 1:
            logger.error(
                "%d counts of this process will never reach the backend: too many of them wait", self.lost
            )
