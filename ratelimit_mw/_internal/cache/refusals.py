"""Refusals that this process remembers, so that refused callers cost the backend nothing.

When a window refuses a cost, nothing can change that before its `retry_after`, but for a reset, a raised
limit or a give-back, which may so be seen a second late. A larger cost has a later promise, which only the
backend knows: it is asked. What is admitted of the same caller makes promise and figures untrue: then all
that was refused of that caller is forgotten. So is what others were refused under a limit that they share and
that is full since. What other processes admit meanwhile is seen a second late.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.model.status import Status, WindowStatus
from ratelimit_mw._internal.runtime.forks import renew_after_fork

LONGEST = 1.0
"""Seconds that a refusal is remembered at most."""
MOST = 10_000
"""Charges of which a refusal is remembered; beyond it the one remembered first is forgotten."""

_WindowKey = tuple[str, str, int]
"""Partition, scope and length of a window."""

SteadyClock = Callable[[], float]
"""Seconds that never go back."""


class CachedRefusal:
    """A refusal that holds on."""

    __slots__ = ("answer", "charge", "kind", "outcome", "received", "until")

    def __init__(
        self, charge: Charge, outcome: Outcome, received: float, until: float, kind: tuple[str, str]
    ) -> None:
        self.charge: Charge = charge
        self.outcome: Outcome = outcome
        self.received: float = received
        """Time of the answer's arrival: the backend decided before, so no promise told from here is early."""
        self.until: float = until
        """Counted from when the charge was sent: the backend decided later, so that none is used too long."""
        self.kind: tuple[str, str] = kind
        """Outcome and limit that it is counted under."""
        self.answer: object = None
        """The latest response to it, as `RefusalWriter` remembers it to send it again."""

    def age(self, now: float) -> int:
        """Microseconds since the answer came."""
        return int((now - self.received) * SECOND + 0.5)

    def outcome_at(self, now: float) -> Outcome:
        """The outcome as of `now`: the same moments, so much nearer."""
        outcome, statuses = self.outcome, self.charge.statuses(self.outcome)
        # Whoever was paused since it found the refusal tells of the last moment at which that held.
        last = min(_changes(statuses)) - 1
        passed = min(self.age(now), last)
        aged = [each.after(passed) if isinstance(each, WindowStatus) else each for each in statuses]
        return Outcome.from_statuses(False, outcome.now + passed, aged, NO_RESERVATION)


class RefusalCache:
    """Cache of recent refusals by charge: one caller, one set of limits, one cost."""

    def __init__(self, clock: SteadyClock = time.monotonic) -> None:
        self.now = clock
        self.by_charge: dict[Charge, CachedRefusal] = {}
        """Cached refusals that `find` looks in; empty if nobody was refused lately."""
        self._by_caller: dict[str, list[Charge]] = {}
        self._by_shared: dict[_WindowKey, dict[int, dict[Charge, None]]] = {}
        """Charges of cached refusals, by the windows that others draw on as well, and by the most that may be
        used there for the charge to fit."""
        self._lock = threading.Lock()  # one limiter serves the event loops of several threads
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Have a lock that no thread of the parent process holds, and nothing that it left half done."""
        self._lock = threading.Lock()
        self.clear()

    def __len__(self) -> int:
        return len(self.by_charge)

    def find(self, charge: Charge) -> CachedRefusal | None:
        """The refusal that a charge would meet now; None where that is unknown."""
        refused = self.by_charge.get(charge)
        if refused is not None and self.now() >= refused.until:
            with self._lock:
                self._forget(charge)
            return None
        return refused

    def add(self, charge: Charge, outcome: Outcome, sent: float, kind: tuple[str, str]) -> None:
        """Remember a refusal by windows, until one of its figures has to change; it was asked at `sent`."""
        if outcome.admitted or charge.is_recorded:
            return  # what a request costs may differ each time, and a settle make room at any moment
        statuses = charge.statuses(outcome)
        if any(status.refuses for status in statuses if not isinstance(status, WindowStatus)):
            return  # a slot may be free at any moment
        wait = min(LONGEST * SECOND, min(_changes(statuses), default=0))
        refused = CachedRefusal(charge, outcome, self.now(), sent + wait / SECOND, kind)
        with self._lock:
            self._forget(charge)
            if len(self.by_charge) >= MOST:
                self._forget(next(iter(self.by_charge)))
            self.by_charge[charge] = refused
            self._by_caller.setdefault(charge.own_partition, []).append(charge)
            for _, key, room in _shared_windows(charge):
                self._by_shared.setdefault(key, {}).setdefault(room, {})[charge] = None

    def admitted(self, charge: Charge, outcome: Outcome) -> None:
        """A charge was admitted: what was refused of its caller before has other figures now.

        And so has what was refused under a window that is shared and has no room for it any more.
        """
        with self._lock:
            for refused in list(self._by_caller.get(charge.own_partition, ())):
                self._forget(refused)
            for index, key, _ in _shared_windows(charge) if self._by_shared else ():
                used = outcome.used(index)
                by_room = self._by_shared.get(key, {})
                for room in [room for room in by_room if used > room]:
                    for refused in list(by_room[room]):
                        self._forget(refused)

    def clear(self) -> None:
        """Forget every refusal."""
        with self._lock:
            self.by_charge.clear()
            self._by_caller.clear()
            self._by_shared.clear()

    def _forget(self, charge: Charge) -> None:
        if self.by_charge.pop(charge, None) is not None:
            caller = charge.own_partition
            others = [each for each in self._by_caller.pop(caller, ()) if each is not charge]
            if others:
                self._by_caller[caller] = others
            for _, key, room in _shared_windows(charge):
                by_room = self._by_shared.get(key, {})
                alike = by_room.get(room, {})
                alike.pop(charge, None)
                if not alike:
                    by_room.pop(room, None)
                if not by_room:
                    self._by_shared.pop(key, None)


def _changes(statuses: Iterable[Status]) -> Iterator[int]:
    """Microseconds until each of the windows changes by itself."""
    for status in statuses:
        if isinstance(status, WindowStatus) and status.next_change is not None:
            yield status.next_change


def _shared_windows(charge: Charge) -> Iterator[tuple[int, _WindowKey, int]]:
    """The windows that others than the caller draw on: index, key, and the most used there if it is to fit.

    A quota may be a plan's share; the key is the same for all.
    """
    caller = charge.own_partition
    for index, counter in enumerate(charge.counters):
        if counter.partition != caller and isinstance(counter.limit, Window):
            key = (counter.partition, counter.scope, counter.limit.length)
            yield index, key, counter.limit.quota - charge.cost_at(index)
