"""Holds and counts that this process admitted alone while the backend was away, told to it afterwards.

Until then a hold lives in this process's own books; from then on in the shared ones, under the same lease id.
A crash before that loses it.

The event loops of several threads admit here, and a task in one of them tells the backend: their shared state
is changed under `lock`, in which nothing is ever waited for.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import Backend, BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Clock, Counter, place_of
from ratelimit_mw._internal.model.limits import Allowance, Slots, Window
from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_LEASE_ID, Reservation
from ratelimit_mw._internal.outage.unsynced import ANY_COST, UnsyncedReservation, boundless, of_requests
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

logger = logging.getLogger("ratelimit_mw")

LOOK_EVERY = 0.02
"""Seconds between two looks whether the backend is back; while it is away a look costs no round trip."""
MAX_OWED = 10_000
"""Holds, and counters of windows, that may wait for the backend; beyond it the oldest is given up."""
AT_ONCE = 64
"""Number of holds and counters that the backend is told of at once."""
PAUSE = 1.0
"""Seconds before it is tried again where telling met what it was not made for."""
CLOSE_TIMEOUT = 1.0
"""Seconds that closing waits for the backend to be told."""


class OutageReconciler:
    """Keeps the holds of charges that this process admitted alone, and tells the backend when it is back."""

    def __init__(
        self,
        shared: Backend,
        books: MemoryBackend,
        clock: Clock,
        on_synced: Callable[[Charge, Outcome], None],
    ) -> None:
        """`on_synced` learns how a caller stands in the shared books before the local ones are cleared."""
        self._shared = shared
        self._books = books
        self._clock = clock
        self._on_told = on_synced
        self._windows: dict[Counter, int] = {}
        self._syncing: dict[Counter, int] = {}
        self._owed: dict[bytes, UnsyncedReservation] = {}
        self._budgets: dict[Counter, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._loops: set[asyncio.AbstractEventLoop] = set()
        """Event loops that have admitted something, any of which may tell of all."""
        self._is_closing = False
        self.lock = threading.RLock()
        self.lost = 0
        """Number of holds and counters that were given up before the backend was told all of them."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave what the backend has to be told to the parent process, which tells it."""
        self.lock = threading.RLock()
        leave_to_parent(self._task)
        self._task, self._is_closing, self.lost = None, False, 0
        self._windows.clear()
        self._syncing.clear()
        self._owed.clear()
        self._budgets.clear()

    def __len__(self) -> int:
        """Return the number of holds and counters that the backend has to be told of."""
        return len(self._windows) + len(self._owed)

    def unsynced(self, counter: Counter) -> int:
        """Units that were admitted here under a window, and that the backend doesn't know of."""
        units = self._windows.get(counter, 0) + self._syncing.get(counter, 0)
        if isinstance(counter.limit, Window) and counter.limit.is_metered:
            for unsynced in self._owed.values():
                units += sum([used for window, used in unsynced.metered() if window == counter])
        return units

    def add(self, charge: Charge, hold: Reservation, price: int) -> None:
        """Remember a charge that was admitted here. Waits for nothing; to be called under `lock`."""
        for counter in charge.counters:
            if isinstance(counter.limit, Window) and not counter.limit.is_metered:
                self._windows[counter] = self._windows.get(counter, 0) + charge.cost
        if hold.id:
            self._owed[hold.id] = UnsyncedReservation(charge, hold, price)
            if len(self._budgets) < MAX_OWED:
                self._budgets.update(dict.fromkeys(charge.allowances))
        for waiting in (self._windows, self._owed):
            if len(waiting) > MAX_OWED:
                self._give_up(waiting)
        self._loops.add(asyncio.get_running_loop())
        self._start()

    # a hold's life, by whichever books it is in ---------------------------------------------------

    async def renew(self, hold: Reservation, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        return await (self._books if hold.id in self._owed else self._shared).renew(hold, lease)

    async def renew_all(self, renewals: Sequence[tuple[Reservation, float]]) -> Sequence[bool | BackendError]:
        """Renew many holds, each for its own time; the answer to each, or why there is none."""
        here = [hold.id in self._owed for hold, _ in renewals]
        local = await self._books.renew_all(
            [each for each, is_here in zip(renewals, here, strict=True) if is_here]
        )
        shared = [each for each, is_here in zip(renewals, here, strict=True) if not is_here]
        answers = iter(local), iter(await self._shared.renew_all(shared) if shared else ())
        return [next(answers[0] if is_here else answers[1]) for is_here in here]

    def finish(self, hold: Reservation, money: EstimateAction) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        with self.lock:
            owed = self._owed.get(hold.id)
            if owed is None:
                return self._shared.finish(hold, money)
            owed.is_slotless = owed.is_slotless or bool(hold.slots)
            if money is not EstimateAction.UNTOUCHED and not owed.is_ended:
                owed.is_ended, owed.is_failed = True, money is EstimateAction.GIVE_BACK
                if money is EstimateAction.GIVE_BACK and not owed.is_settled:
                    owed.price = 0
                if not owed.is_synced:
                    self._count_units(owed)
            if owed.is_over:
                del self._owed[hold.id]
                self._forget(owed)
            return self._books.finish(hold, money)

    async def settle(self, hold: Reservation, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        owed = self._owed.get(hold.id)
        if owed is None:
            return await self._shared.settle(hold, amount, replace=replace)
        met = await self._books.settle(hold, amount, replace=replace)
        if met is Settlement.SETTLED:
            with self.lock:
                owed.price, owed.is_settled = amount, True
                is_synced = self._owed.get(hold.id) is not owed
            if is_synced:  # by another thread meanwhile, which may not have seen this
                return await self._shared.settle(hold, amount, replace=replace)
        return met

    async def settle_units(self, hold: Reservation, units: Units, *, replace: bool = False) -> Settlement:
        """Put what was used of metered units in place of their estimates. Idempotent."""
        owed = self._owed.get(hold.id)
        if owed is None:
            return await self._shared.settle_units(hold, units, replace=replace)
        met = await self._books.settle_units(hold, units, replace=replace)
        with self.lock:
            for unit, used in units.items():
                if replace or unit not in owed.units:
                    owed.units[unit] = used
            is_synced = self._owed.get(hold.id) is not owed
        if is_synced:  # by another thread meanwhile, which may not have seen this
            return await self._shared.settle_units(hold, units, replace=replace)
        return met

    def _count_units(self, owed: UnsyncedReservation) -> None:
        """Count what an ended request has used like units that were admitted: nothing changes it any more."""
        for counter, used in owed.metered():
            if used:
                self._windows[counter] = self._windows.get(counter, 0) + used
        owed.is_metered_out = True

    def keep(self, hold: Reservation) -> Awaitable[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
        with self.lock:
            owed = self._owed.get(hold.id)
            if owed is None:
                return self._shared.keep(hold)
            owed.is_kept = True
            return self._books.keep(hold)

    # telling --------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Tell what can be told now, for a bounded time, and report what is lost."""
        task = None if self._task is None or self._task.done() else self._task
        if task is not None and task.get_loop() is not asyncio.get_running_loop():
            return  # it goes on in a loop that serves requests
        self._is_closing = True
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                # Not cancelled: the backend would take back what it is being told, under the same lease id.
                if task is not None:
                    await asyncio.wait([task])
                if len(self):
                    await self.sync()
        except TimeoutError:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])  # what was under way is owed again: what is left says it
        finally:
            self._is_closing = False
        with self.lock:
            if len(self):
                self.lost += len(self)
                text = "the backend was never told of %d counts of this process: it is closed"
                logger.error(text, len(self))
                for owed in self._owed.values():
                    self._forget(owed)
                self._windows.clear()
                self._owed.clear()

    def resume(self) -> None:
        """Go on in the running event loop where the one that told the backend has ended."""
        if len(self):
            self._start()

    async def leave(self) -> None:
        """Tell no more in the running event loop, which ends; another one goes on with it."""
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            return
        self._is_closing = True
        try:
            # Not cancelled: the backend would take back what it is being told, under the same lease id.
            await asyncio.wait([task], timeout=CLOSE_TIMEOUT)
        finally:
            self._is_closing = False

    async def sync(self) -> None:
        """Tell the backend what it doesn't know yet, as far as it can be told now."""
        if not await self._sync_first():
            return  # the backend is away, as all the others would find
        with self.lock:
            jobs = [partial(self._sync_window, counter) for counter in self._windows]
            jobs += [partial(self._sync_reservation, owed) for owed in self._owed.values()]
        for start in range(0, len(jobs), AT_ONCE):
            if not any(await asyncio.gather(*[job() for job in jobs[start : start + AT_ONCE]])):
                return
        with self.lock:
            if not self._owed:  # so that the local books hold nothing which the shared ones don't
                budgets, self._budgets = Charge(self._budgets), {}
                await self._books.reset(budgets)  # which never waits

    def _start(self) -> None:
        with self.lock:
            if self._task is None or self._task.done() or self._task.get_loop().is_closed():
                loop = asyncio.get_running_loop()
                self._task = loop.create_task(self._keep_syncing(), name="ratelimit_mw hand-back")
                self._task.add_done_callback(self._leave_to_another)

    def _leave_to_another(self, task: "asyncio.Task[None]") -> None:
        """Telling ended with its event loop: where something is left, another loop goes on."""
        self._loops = {loop for loop in list(self._loops) if not loop.is_closed()}
        for loop in list(self._loops) if len(self) and not self._is_closing else ():
            if loop is not task.get_loop() and loop.is_running():
                with contextlib.suppress(RuntimeError):  # it has been closed since
                    loop.call_soon_threadsafe(self._start)
                    return

    async def _keep_syncing(self) -> None:
        while len(self):
            await asyncio.sleep(LOOK_EVERY)
            if self._is_closing:
                return  # which tells the rest itself
            try:
                await self.sync()
            except Exception:
                logger.exception("the backend could not be told what was admitted without it; tried again")
                await asyncio.sleep(PAUSE)

    async def _sync_first(self) -> bool:
        with self.lock:
            counter, owed = next(iter(self._windows), None), next(iter(self._owed.values()), None)
        if counter is not None:
            return await self._sync_window(counter)
        return owed is None or await self._sync_reservation(owed)

    async def _sync_window(self, counter: Counter) -> bool:
        """Charge what was admitted here and has not left the window, however full it is by now."""
        with self.lock:
            cost = self._windows.pop(counter, 0)
            live = self._books.decide(Charge([counter]), None, 0).used(0)
            counted = min(cost, live, ANY_COST)
            if counted:
                self._syncing[counter] = counted
        if counted:
            try:
                charge = Charge([of_requests(boundless(counter))], counted)
                outcome = await self._shared.acquire(charge, NO_LEASE_ID)
            except (BackendError, asyncio.CancelledError) as failure:
                with self.lock:
                    self._windows[counter] = self._windows.get(counter, 0) + counted  # now the last in turn
                if isinstance(failure, BackendError):
                    return False
                raise
            finally:
                self._syncing.pop(counter, None)
            self._on_told(Charge([counter]), outcome)
        with self.lock:
            if counter not in self._windows:
                await self._books.reset(Charge([counter]))  # which never waits
        return True

    async def _sync_reservation(self, owed: UnsyncedReservation) -> bool:
        """Open the hold in the shared books, in the state that it has here."""
        lease_id = owed.hold.id
        if self._owed.get(lease_id) is not owed:
            return True
        charge = Charge(self._counters_of(owed), lease=owed.hold.lease, estimates=owed.charge.units)
        if charge.counters:
            price, slotless = owed.price, owed.is_slotless
            owed.is_synced = True
            try:
                outcome = await self._shared.restore(charge, lease_id, price)
            except BackendError:
                with self.lock:
                    if self._owed.pop(lease_id, None) is not None:
                        self._owed[lease_id] = owed  # now the last in turn
                return False
            self._on_told(charge, outcome)
            with self.lock:  # from here on whoever has the lease talks to the shared books
                self._owed.pop(lease_id, None)
            await self._catch_up(owed, outcome.hold, slots_are_over=owed.is_slotless and not slotless)
        with self.lock:
            self._owed.pop(lease_id, None)
        await self._books.finish(owed.hold, EstimateAction.GIVE_BACK)
        return True

    async def _catch_up(self, owed: UnsyncedReservation, hold: Reservation, *, slots_are_over: bool) -> None:
        """Do in the shared books what was done here, before or while the hold was opened there."""
        try:
            if owed.is_settled:
                await self._shared.settle(hold, owed.price)
            if owed.units and hold.meters:
                await self._shared.settle_units(hold, owed.units)
            if owed.is_kept:
                await self._shared.keep(hold)
            if owed.is_ended:
                await self._shared.finish(
                    hold, EstimateAction.GIVE_BACK if owed.is_failed else EstimateAction.KEEP
                )
            elif slots_are_over:
                await self._shared.finish(hold, EstimateAction.UNTOUCHED)
        except BackendError as error:
            self.lost += 1
            logger.error(  # noqa: TRY400 - the reason says it all
                "what lease %s spent without the backend could not be written: %s", hold.id.hex(), error
            )

    def _counters_of(self, owed: UnsyncedReservation) -> list[Counter]:
        """Return the counters that the hold still takes: slots that run, periods that are not over."""
        now = self._clock()
        running = {held.ends for held in owed.hold.periods if held.ends > now}
        return [
            boundless(counter)
            for counter in owed.charge.counters
            if (isinstance(counter.limit, Slots) and not owed.is_slotless)
            or (isinstance(counter.limit, Allowance) and place_of(counter, now).ends in running)
            or (isinstance(counter.limit, Window) and counter.limit.is_metered and not owed.is_metered_out)
        ]

    def _forget(self, owed: UnsyncedReservation) -> None:
        """Have the backend forget a hold that it won't be told of, if it was and its answer was lost."""
        if owed.is_synced:
            self._shared.finish(owed.hold, EstimateAction.GIVE_BACK)

    def _give_up(self, waiting: "dict[Counter, int] | dict[bytes, UnsyncedReservation]") -> None:
        oldest = waiting.pop(next(iter(waiting)))  # type: ignore[call-overload]
        if isinstance(oldest, UnsyncedReservation):
            self._forget(oldest)
        self.lost += 1
        if self.lost % 1000 == 1:
            logger.error("the backend will not be told of %d counts of this process: too many", self.lost)
