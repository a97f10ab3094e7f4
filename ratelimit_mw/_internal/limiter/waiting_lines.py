"""Lines of calls that wait for the same limits, each in the order in which its calls came."""

import asyncio
import threading
from bisect import insort
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import NamedTuple

from ratelimit_mw._internal.model.limits import SECOND
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.policy.counters import PLAN_SCOPE
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, known_wait, refusal_of
from ratelimit_mw._internal.runtime.forks import renew_after_fork

MOST_IN_LINE = 1_000
"""Calls that wait for one limit; one more is refused at once."""
MOST = 10_000
"""Calls of a limiter that wait, in all lines together."""

LineKey = tuple[str, str]
"""Partition and scope of limits: of a caller's plan, say, or of a key under a limit in code."""


class Call:
    """A call that may wait: for its turn in each of its lines, and then for its moment."""

    __slots__ = ("costs", "deadline", "is_closed", "is_open", "line_keys", "loop", "number", "polls", "woken")

    def __init__(self, number: int, costs: Mapping[LineKey, int], max_wait: float) -> None:
        """`costs` has the cost of the call in each line that it may stand in. Created in its event loop."""
        self.number: int = number
        """Position in the order in which calls came."""
        self.costs: Mapping[LineKey, int] = costs
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.deadline: float = self.now() + max_wait
        self.woken: asyncio.Event = asyncio.Event()
        self.line_keys: set[LineKey] = set()
        """Keys of the lines in which it stands."""
        self.is_open: bool = False
        """Whether any end or settle of another may let it in before its moment."""
        self.is_closed: bool = False
        """Whether the limiter was closed, so that it waits no more."""
        self.polls: int = 0
        """Tries for what may be free at any moment."""

    def now(self) -> float:
        """Seconds by the clock of its event loop."""
        return self.loop.time()

    def wake(self) -> None:
        """End its sleep, from any thread."""
        with suppress(RuntimeError):  # its event loop has ended, and it with that
            self.loop.call_soon_threadsafe(self.woken.set)

    async def sleep_until(self, moment: float) -> None:
        """Sleep until then, or until it is woken."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(moment):
                await self.woken.wait()


class Refused(NamedTuple):
    """A limit that has refused a call, and what that says of others who wait for it."""

    status: LimitStatus
    now_us: int
    """Time of the decision by the backend's clock, in microseconds since 1970."""
    at: float
    """Time at which it came, by the clock of the event loop."""
    wait: float | None
    """Seconds until the limit admits the call; None where that may be at any moment."""

    @classmethod
    def from_status(cls, status: LimitStatus, decision: Decision, at: float) -> "Refused":
        """Make it of a limit that refuses in a decision."""
        wait = known_wait(status, decision.price_micros, decision.now_us)
        return cls(status, decision.now_us, at, None if wait is None else wait / SECOND)

    @property
    def line_key(self) -> LineKey:
        """Key of the line that waits for the limit."""
        return self.status.counter.partition, self.status.counter.scope

    @property
    def is_open(self) -> bool:
        """Whether the limit may admit before its moment, when others end or settle."""
        window = self.status.window
        return self.wait is None or (window is not None and window[0].is_metered)

    def status_at(self, now: float) -> LimitStatus:
        """The limit as it stands now: the same moments, so much nearer."""
        status, passed = self.status.status, int((now - self.at) * SECOND)
        if not isinstance(status, WindowStatus):
            return self.status
        used, reset_after, retry_after = status
        aged = WindowStatus(used, max(reset_after - passed, 1), max(retry_after - passed, 1))
        return self.status._replace(status=aged)


class _Line:
    """Calls that wait for the same limits, and the latest refusal by one of them."""

    __slots__ = ("calls", "latest")

    def __init__(self, latest: Refused) -> None:
        self.calls: list[Call] = []
        self.latest: Refused = latest

    def earliest(self, key: LineKey, cost: int) -> float:
        """Moment before which a newcomer of this cost can't be let in; 0 where that is not known.

        No window admits more than its quota in any interval of its length, so those that come before fill it.
        """
        latest = self.latest
        if latest.wait is None or latest.is_open:
            return 0.0
        moment = latest.at + latest.wait
        if latest.status.window is not None:
            window, _ = latest.status.window
            ahead = sum([each.costs.get(key, 1) for each in self.calls if len(each.line_keys) == 1])
            moment += (ahead + cost - 1) // window.quota * window.seconds
        return moment


class WaitingLines:
    """The lines of one limiter, in all its event loops.

    Whoever came first is before all others wherever both wait, so one of them can always go on.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a call that the garbage collector ends leaves from anywhere
        self._lines: dict[LineKey, _Line] = {}
        self._calls: set[Call] = set()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the calls to the parent process."""
        self._lock = threading.RLock()
        self._lines, self._calls = {}, set()

    def __len__(self) -> int:
        return len(self._calls)

    def join(self, call: Call) -> Decision | None:
        """Stand in the lines that there are for a new call; its refusal where it would wait in vain."""
        with self._lock:
            met = {key: self._lines[key] for key in call.costs if key in self._lines}
            moments = [line.earliest(key, call.costs[key]) for key, line in met.items()]
            latest = max(moments, default=0.0)
            if latest > call.deadline or any([len(line.calls) >= MOST_IN_LINE for line in met.values()]):
                return self._refusal(call, met.values(), latest)
            self._stand(call, met)
            return None

    def stand(self, call: Call, refused: Mapping[LineKey, Refused]) -> bool:
        """Have a call stand in the lines of the limits that have refused it, and in no others.

        False where there are too many calls already.
        """
        with self._lock:
            others = [self._lines[key].calls for key in refused if key in self._lines]
            is_new = call not in self._calls
            if (is_new and len(self._calls) >= MOST) or any(
                [len(calls) >= MOST_IN_LINE and call not in calls for calls in others]
            ):
                return False
            for key, latest in refused.items():
                self._lines.setdefault(key, _Line(latest)).latest = latest
            self._stand(call, refused)
            return True

    def is_first(self, call: Call) -> bool:
        """Whether nobody is before a call in any of its lines."""
        with self._lock:
            return all([self._lines[key].calls[0] is call for key in call.line_keys])

    def refusal(self, call: Call) -> Decision:
        """The refusal of a call whose turn has not come."""
        with self._lock:
            return self._refusal(call, [self._lines[key] for key in call.line_keys], 0.0)

    def leave(self, call: Call) -> None:
        """Leave all lines."""
        with self._lock:
            self._stand(call, ())

    def freed(self, reservation: Reservation) -> None:
        """Wake the calls whose turn it is in the lines of what was given back."""
        if not self._lines:
            return
        line_keys = [(slot.partition, slot.scope) for slot in reservation.slots]
        line_keys += [(meter.partition, meter.scope) for meter in reservation.meters]
        line_keys += [(period.partition, PLAN_SCOPE) for period in reservation.periods]
        with self._lock:
            for key in line_keys:
                line = self._lines.get(key)
                if line is not None and line.calls[0].is_open:
                    line.calls[0].wake()

    def close(self) -> None:
        """Let no call of the running event loop wait any more."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for call in self._calls:
                if call.loop is loop:
                    call.is_closed = True
                    call.wake()

    def _stand(self, call: Call, line_keys: Iterable[LineKey]) -> None:
        wanted = set(line_keys)
        for key in call.line_keys - wanted:
            calls = self._lines[key].calls
            was_first = calls[0] is call
            calls.remove(call)
            if not calls:
                del self._lines[key]
            elif was_first:
                calls[0].wake()
        for key in wanted - call.line_keys:
            insort(self._lines[key].calls, call, key=attrgetter("number"))
        call.line_keys = wanted
        if wanted:
            self._calls.add(call)
        else:
            self._calls.discard(call)

    def _refusal(self, call: Call, lines: Iterable[_Line], moment: float) -> Decision:
        """Make the refusal of a call that nobody was asked about, as others wait before it."""
        now, met = call.now(), list(lines)
        now_us = max([line.latest.now_us + int((now - line.latest.at) * SECOND) for line in met])
        statuses = tuple([line.latest.status_at(now) for line in met])
        refusal = refusal_of(statuses, 0, now_us)
        wait = max(refusal.retry_after_us or 0, int((moment - now) * SECOND))
        costs = tuple([max(call.costs.get(line.latest.line_key, 1), 1) for line in met])
        refusal = refusal._replace(retry_after_us=wait)
        return Decision(False, now_us, limits=statuses, refusal=refusal, costs=costs)
