"""What this process admitted on its own while the backend was away, and how the backend is told of it.

Until then a hold lives in this process's own books; from then on in the shared ones, under the same lease
id. A crash before that loses it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ratelimit_mw.backends.memory import MemoryBackend
from ratelimit_mw.charge import (
    NO_LEASE_ID,
    Backend,
    BackendError,
    Charge,
    Clock,
    Counter,
    Hold,
    Money,
    Outcome,
    Settlement,
    place_of,
)
from ratelimit_mw.limits import Allowance, Slots, Window

logger = logging.getLogger("ratelimit_mw")

LOOK_EVERY = 0.02
"""Seconds between two looks whether the backend is back; while it is away a look costs no round trip."""
MAX_OWED = 10_000
"""Holds, and counters of windows, that may wait for the backend; beyond it the oldest is given up."""
AT_ONCE = 64
"""How many of them are told at once."""
CLOSE_TIMEOUT = 1.0
"""Seconds that closing waits for the backend to be told."""

_ANY_COST = 2**32 - 1
_ANY_AMOUNT = 2**53


@dataclass(slots=True)
class _Owed:
    """A hold of this process alone, and what has become of it."""

    charge: Charge
    hold: Hold
    price: int
    """What it holds, or has spent once it is settled."""
    is_settled: bool = False
    is_ended: bool = False
    is_slotless: bool = False
    """Whether its slots were freed."""
    is_kept: bool = False
    """Whether it was detached, so that its estimate lasts."""
    is_told: bool = False
    """Whether the backend was told of it, as far as one can know."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it that the backend should know."""
        slots_gone = self.is_slotless or not self.hold.slots
        return slots_gone and (not self.hold.periods or (self.is_ended and not self.price))


class HandBack:
    """Keeps the holds of charges that this process admitted alone, and tells the backend when it is back."""

    def __init__(
        self,
        shared: Backend,
        books: MemoryBackend,
        clock: Clock,
        on_told: Callable[[Charge, Outcome], None],
    ) -> None:
        """`on_told` learns how a caller stands in the shared books before the local ones are cleared."""
        self._shared = shared
        self._books = books
        self._clock = clock
        self._on_told = on_told
        self._windows: dict[Counter, int] = {}
        self._telling: dict[Counter, int] = {}
        self._owed: dict[bytes, _Owed] = {}
        self._budgets: dict[Counter, None] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self.lost = 0
        """How many holds and counters were given up before the backend was back."""

    def __len__(self) -> int:
        """How many holds and counters the backend has to be told of."""
        return len(self._windows) + len(self._owed)

    def untold(self, counter: Counter) -> int:
        """Units that were admitted here under a window, and that the backend doesn't know of."""
        return self._windows.get(counter, 0) + self._telling.get(counter, 0)

    def add(self, charge: Charge, hold: Hold, price: int) -> None:
        """Remember a charge that was admitted here. Waits for nothing."""
        for counter in charge.counters:
            if isinstance(counter.limit, Window):
                self._windows[counter] = self._windows.get(counter, 0) + charge.cost
        if hold.id:
            self._owed[hold.id] = _Owed(charge, hold, price)
            if len(self._budgets) < MAX_OWED:
                self._budgets.update(dict.fromkeys(charge.allowances))
        for waiting in (self._windows, self._owed):
            if len(waiting) > MAX_OWED:
                self._give_up(waiting)
        self._start()

    # a hold's life, by whichever books it is in ---------------------------------------------------

    async def renew(self, hold: Hold, lease: float) -> bool:
        """Let the slots last `lease` seconds from now; false where one of them was lost before."""
        return await (self._books if hold.id in self._owed else self._shared).renew(hold, lease)

    async def renew_all(self, renewals: Sequence[tuple[Hold, float]]) -> Sequence[bool | BackendError]:
        """Renew many holds, each for its own time; the answer to each, or why there is none."""
        here = [hold.id in self._owed for hold, _ in renewals]
        local = await self._books.renew_all(
            [each for each, is_here in zip(renewals, here, strict=True) if is_here]
        )
        shared = [each for each, is_here in zip(renewals, here, strict=True) if not is_here]
        answers = iter(local), iter(await self._shared.renew_all(shared) if shared else ())
        return [next(answers[0] if is_here else answers[1]) for is_here in here]

    def finish(self, hold: Hold, money: Money) -> Awaitable[object]:
        """Free the slots and, unless it was settled, decide about the estimate. Idempotent."""
        owed = self._owed.get(hold.id)
        if owed is None:
            return self._shared.finish(hold, money)
        owed.is_slotless = owed.is_slotless or bool(hold.slots)
        if money is not Money.UNTOUCHED and not owed.is_ended:
            owed.is_ended = True
            if money is Money.GIVE_BACK and not owed.is_settled:
                owed.price = 0
        if owed.is_over:
            del self._owed[hold.id]
            self._forget(owed)
        return self._books.finish(hold, money)

    async def settle(self, hold: Hold, amount: int, *, replace: bool = False) -> Settlement:
        """Put the actual price in place of the estimate, in the periods of the admission. Idempotent."""
        owed = self._owed.get(hold.id)
        if owed is None:
            return await self._shared.settle(hold, amount, replace=replace)
        met = await self._books.settle(hold, amount, replace=replace)
        if met is Settlement.SETTLED:
            owed.price, owed.is_settled = amount, True
        return met

    def keep(self, hold: Hold) -> Awaitable[object]:
        """Hold the estimate until it is settled, whether its lease is renewed or not. Idempotent."""
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
                    await self.tell()
        except TimeoutError:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])  # what was under way is owed again: what is left says it
        finally:
            self._is_closing = False
        if len(self):
            self.lost += len(self)
            logger.error("the backend was never told of %d counts of this process: it is closed", len(self))
            for owed in self._owed.values():
                self._forget(owed)
            self._windows.clear()
            self._owed.clear()

    async def tell(self) -> None:
        """Tell the backend what it doesn't know yet, as far as it can be told now."""
        if not await self._tell_first():
            return  # the backend is away, as all the others would find
        jobs = [partial(self._tell_window, counter) for counter in self._windows]
        jobs += [partial(self._tell_hold, owed) for owed in self._owed.values()]
        for start in range(0, len(jobs), AT_ONCE):
            if not any(await asyncio.gather(*[job() for job in jobs[start : start + AT_ONCE]])):
                return
        if not self._owed:  # so that the local books hold nothing which the shared ones don't
            budgets, self._budgets = Charge(self._budgets), {}
            await self._books.reset(budgets)

    def _start(self) -> None:
        if self._task is None or self._task.done() or self._task.get_loop().is_closed():
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._keep_telling(), name="ratelimit_mw hand-back")

    async def _keep_telling(self) -> None:
        while len(self):
            await asyncio.sleep(LOOK_EVERY)
            if self._is_closing:
                return  # which tells the rest itself
            await self.tell()

    async def _tell_first(self) -> bool:
        for counter in self._windows:
            return await self._tell_window(counter)
        for owed in self._owed.values():
            return await self._tell_hold(owed)
        return True

    async def _tell_window(self, counter: Counter) -> bool:
        """Charge what was admitted here and has not left the window, however full it is by now."""
        cost = self._windows.pop(counter, 0)
        live = self._books.decide(Charge([counter]), None, 0).figures[0].used
        counted = min(cost, live, _ANY_COST)
        if counted:
            self._telling[counter] = counted
            try:
                outcome = await self._shared.acquire(Charge([_boundless(counter)], counted), NO_LEASE_ID)
            except (BackendError, asyncio.CancelledError) as failure:
                self._windows[counter] = self._windows.get(counter, 0) + counted  # now the last in turn
                if isinstance(failure, BackendError):
                    return False
                raise
            finally:
                del self._telling[counter]
            self._on_told(Charge([counter]), outcome)
        if counter not in self._windows:
            await self._books.reset(Charge([counter]))
        return True

    async def _tell_hold(self, owed: _Owed) -> bool:
        """Open the hold in the shared books, in the state that it has here."""
        lease_id = owed.hold.id
        if self._owed.get(lease_id) is not owed:
            return True
        charge = Charge(self._counters_of(owed), lease=owed.hold.lease)
        if charge.counters:
            price, slotless = owed.price, owed.is_slotless
            owed.is_told = True
            try:
                outcome = await self._shared.restore(charge, lease_id, price)
            except BackendError:
                if self._owed.pop(lease_id, None) is not None:
                    self._owed[lease_id] = owed  # now the last in turn
                return False
            self._on_told(charge, outcome)
            # Nothing is awaited from here to the end: whoever has the lease talks to the shared books next.
            self._owed.pop(lease_id, None)
            await self._catch_up(owed, outcome.hold, slots_are_over=owed.is_slotless and not slotless)
        self._owed.pop(lease_id, None)
        await self._books.finish(owed.hold, Money.GIVE_BACK)
        return True

    async def _catch_up(self, owed: _Owed, hold: Hold, *, slots_are_over: bool) -> None:
        """Do in the shared books what was done here, before or while the hold was opened there."""
        try:
            if owed.is_settled:
                await self._shared.settle(hold, owed.price)
            elif owed.is_kept:
                await self._shared.keep(hold)
            if owed.is_ended:
                await self._shared.finish(hold, Money.KEEP if owed.price else Money.GIVE_BACK)
            elif slots_are_over:
                await self._shared.finish(hold, Money.UNTOUCHED)
        except BackendError as error:
            self.lost += 1
            logger.error(  # noqa: TRY400 - the reason says it all
                "what lease %s spent without the backend could not be written: %s", hold.id.hex(), error
            )

    def _counters_of(self, owed: _Owed) -> list[Counter]:
        """What the hold still takes: slots that run, periods that are not over."""
        now = self._clock()
        running = {held.ends for held in owed.hold.periods if held.ends > now}
        return [
            _boundless(counter)
            for counter in owed.charge.counters
            if (isinstance(counter.limit, Slots) and not owed.is_slotless)
            or (isinstance(counter.limit, Allowance) and place_of(counter, now).ends in running)
        ]

    def _forget(self, owed: _Owed) -> None:
        """Have the backend forget a hold that it won't be told of, if it was and its answer was lost."""
        if owed.is_told:
            self._shared.finish(owed.hold, Money.GIVE_BACK)

    def _give_up(self, waiting: "dict[Counter, int] | dict[bytes, _Owed]") -> None:
        oldest = waiting.pop(next(iter(waiting)))  # type: ignore[call-overload]
        if isinstance(oldest, _Owed):
            self._forget(oldest)
        self.lost += 1
        if self.lost % 1000 == 1:
            logger.error("the backend will not be told of %d counts of this process: too many", self.lost)


def _boundless(counter: Counter) -> Counter:
    """The same place, without a limit: what was done is done."""
    limit = counter.limit
    if isinstance(limit, Window):
        boundless = replace(limit, quota=_ANY_COST)
        object.__setattr__(boundless, "granule", limit.granule)  # new, and as exact as what it stands for
        return replace(counter, limit=boundless)
    if isinstance(limit, Slots):
        return replace(counter, limit=replace(limit, limit=_ANY_COST))
    return replace(counter, limit=replace(limit, amount=_ANY_AMOUNT))
