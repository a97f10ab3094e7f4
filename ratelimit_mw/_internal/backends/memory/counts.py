"""States that the memory backend counts in: a window's log, a slot set, a budget of one period.

The rules are those of the script (`backends/redis/lua/batch.lua`), which says what is guaranteed.
"""

from collections.abc import Callable
from typing import Any

from ratelimit_mw._internal.backends.memory.bounded_store import Store, StoredState
from ratelimit_mw._internal.model.limits import EXACT_QUOTA, SECOND, Limit, Slots, Window
from ratelimit_mw._internal.model.reservation import ReservationKey
from ratelimit_mw._internal.runtime.leaf import Entries, Numbers

MOST_COST = 2**62
"""More than any limit grants; larger costs are compared as this."""
_NEVER = 1 << 62
"""Later than any time; the same before zero is earlier than any."""

Name = tuple[str, str]
"""Partition and scope."""


class CounterRef:
    """One limit of a charge: its figures, and the state that it is counted in."""

    __slots__ = ("cost", "granule", "length", "make", "name", "need", "quota", "state", "store")

    def __init__(
        self,
        store: Store[Any, Any],
        name: Name | ReservationKey,
        limit: Limit,
        make: Callable[[], Any],
        cost: int = 1,
    ) -> None:
        """`cost` is what the charge uses of a window."""
        self.store = store
        self.cost = min(MOST_COST, cost)
        self.need = max(self.cost, 1)
        """Units that a window must have left to admit the charge: `cost`, but at least 1.

        A charge that uses nothing yet is refused, too, if the window is used up.
        """
        self.name = name
        self.make = make
        """Makes a new state, for a limit of which nothing is counted yet."""
        self.state: CountedState = _NOT_FOUND
        """State as it was found last; no store may keep it any more."""
        self.granule = self.length = 0
        if isinstance(limit, Window):
            self.quota, self.length, self.granule = limit.quota, limit.length, limit.granule
        elif isinstance(limit, Slots):
            self.quota, self.length = limit.limit, int(limit.lease_seconds * SECOND)
        else:
            self.quota = limit.amount

    def find(self) -> "CountedState":
        """Find the state in its store, or make one that no store has yet."""
        state: CountedState | None = self.store.get(self.name)
        if state is None:
            state = self.make()
        self.state = state
        return state


class CountedState(StoredState):
    """State of one limit. Each kind is handed references to its own kind of limit."""

    __slots__ = ()

    def admits(self, ref: CounterRef, now: int, cost: int, price: int) -> bool:
        """Whether the limit admits a charge, once what has expired is left out."""
        raise NotImplementedError

    def charge(self, row: Numbers, ref: CounterRef, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Count a charge that the limit admits, and append its status to the `row` of an `Outcome`."""
        raise NotImplementedError

    def append_status(self, row: Numbers, ref: CounterRef, now: int, cost: int, price: int) -> None:
        """Append its status to the `row` of an `Outcome`, for a charge that waits; of cost 0 if none does."""
        raise NotImplementedError


_NOT_FOUND = CountedState()
MANY_ENTRIES = EXACT_QUOTA + 2
"""More entries than a window has, where what was used is what was estimated at most."""


class WindowLog(CountedState):
    """An exact sliding window: the time and cost of every live charge, oldest first."""

    __slots__ = ("_ahead", "_empty", "_entries", "_newest", "_oldest", "length", "used")

    def __init__(self, length: int) -> None:
        self.is_stored = self.is_used = False
        self.length = length
        self.used = 0
        self._entries = Entries()
        self._oldest, self._newest = _NEVER, -_NEVER
        self._ahead = 0  # how much later than the clock shows an entry may lie
        self._empty = 0  # at most so many entries of which all was given back

    def is_dead(self, now: int) -> bool:
        """Whether everything counted has left the window."""
        return self._newest + self.length <= now

    def dropped(self) -> None:
        """Note that no store has it any more; a policy may still hold on to it."""
        self.is_stored = False
        self._entries.clear()
        self.used = self._ahead = self._empty = 0
        self._oldest, self._newest = _NEVER, -_NEVER

    def admits(self, ref: CounterRef, now: int, cost: int, price: int) -> bool:
        """Whether `cost` more units fit, once what has left the window is stepped over."""
        if self._oldest <= now - self.length or self._newest > now:
            self._expire(now)
        return self.used + cost <= ref.quota

    def charge(self, row: Numbers, ref: CounterRef, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Count `cost` units at `now`; charges of one granule of time share an entry, at the later time."""
        newest, granule = self._newest, ref.granule
        # Units that another request has taken ahead lie later.
        at = now if now > newest else newest  # noqa: FURB136 - a call costs three times as much
        if newest == at or (granule > 0 and newest >= 0 and newest // granule == at // granule):
            self._entries.extend_last(at, cost)
            if self._oldest == newest:  # it is the only entry
                self._oldest = at
        else:
            self._entries.append(at, cost)
            if newest < 0:
                self._oldest = at
        self._newest = at
        self.used += cost
        row.append(self.used)
        row.append(self._oldest + self.length - now)
        row.append(0)

    def take_ahead(self, ref: CounterRef, now: int, cost: int, ahead: int) -> None:
        """Count `cost` units as used so much later."""
        self._ahead = max(self._ahead, ahead)
        self.charge(Numbers(), ref, now + ahead, b"", cost, 0)

    def add(self, ref: CounterRef, now: int, cost: int) -> None:
        """Count `cost` units at `now`, also beyond the limit: they were used.

        Beyond `MANY_ENTRIES` they share an entry with others of their thousandth of the window.
        """
        self.admits(ref, now, cost, 0)  # which steps over what has left the window
        granule = ref.granule
        if len(self._entries) > MANY_ENTRIES:
            ref.granule = max(granule, self.length // EXACT_QUOTA)
        self.charge(Numbers(), ref, now, b"", cost, 0)
        ref.granule = granule

    def give_back(self, ref: CounterRef, now: int, at: int, cost: int) -> None:
        """Take `cost` off the entry that a charge at `at` went into, if it is still there.

        What has left the window takes nothing off an entry that it may have shared: whether it did is not
        known here.
        """
        self.admits(ref, now, cost, 0)  # which steps over what has left the window
        if at <= now - self.length:
            return
        granule = ref.granule
        last = at if granule == 0 else at - at % granule + granule - 1
        taken = self._entries.take(at, last, cost)
        if taken:
            self.used -= taken
            self._empty += 1
            if self._empty > MANY_ENTRIES:
                self._entries.drop_empty()
                self._empty = 0
            self._expire(now)

    def append_status(self, row: Numbers, ref: CounterRef, now: int, cost: int, price: int) -> None:
        """Append units used, and the waits, in microseconds, until one leaves and until `cost` fits."""
        row.append(self.used)
        row.append(self._oldest + self.length - now if self.used else 0)
        needed = self.used + cost - ref.quota
        row.append(self._wait(needed, now) if needed > 0 else 0)

    def _wait(self, needed: int, now: int) -> int:
        time = self._entries.time_of_sum(needed)
        return self.length if time < 0 else time + self.length - now

    def _expire(self, now: int) -> None:
        """Step over the charges that have left the window at `now`."""
        entries = self._entries
        if self._newest <= now:
            self._ahead = 0
        elif self._newest > now + self._ahead:
            # The clock went back: what was stored as later happened now at the latest, and what was taken
            # ahead is used as much later as it could be when it was taken.
            entries.cap_times(now + self._ahead)
        self.used -= entries.drop_until(now - self.length)
        if len(entries):
            self._oldest, self._newest = entries.first_time(), entries.last_time()
        else:
            self._oldest, self._newest = _NEVER, -_NEVER


class SlotSet(CountedState):
    """Leases by id, each with the time it expires."""

    __slots__ = ("leases", "soonest")

    def __init__(self) -> None:
        self.is_stored = self.is_used = False
        self.leases: dict[bytes, int] = {}
        self.soonest = _NEVER
        """No lease expires before."""

    def is_dead(self, now: int) -> bool:
        """Whether no lease is live."""
        return not self.leases or max(self.leases.values()) <= now

    def admits(self, ref: CounterRef, now: int, cost: int, price: int) -> bool:
        """Whether a slot is free, once the leases that have expired are forgotten."""
        if self.soonest <= now:
            self._expire(now)
        return len(self.leases) < ref.quota

    def charge(self, row: Numbers, ref: CounterRef, now: int, lease_id: bytes, cost: int, price: int) -> None:
        """Take a slot until its lease ends."""
        expires = now + ref.length
        self.leases[lease_id] = expires
        if expires < self.soonest:  # noqa: PLR1730 - a call costs three times as much
            self.soonest = expires
        row.append(len(self.leases))
        row.append(0)
        row.append(0)

    def append_status(self, row: Numbers, ref: CounterRef, now: int, cost: int, price: int) -> None:
        """Append the number of slots in use, 0, and whether a charge waits for one."""
        row.append(len(self.leases))
        row.append(0)
        row.append(1 if len(self.leases) >= ref.quota else 0)

    def renew(self, lease_id: bytes, now: int, seconds: float) -> bool:
        """Let a live lease last `seconds` from now; an expired one is never revived."""
        live = self.leases.pop(lease_id, 0) > now
        if live:
            self.leases[lease_id] = expires = now + int(seconds * SECOND)
            self.soonest = min(self.soonest, expires)
        return live

    def _expire(self, now: int) -> None:
        self.leases = {each: expires for each, expires in self.leases.items() if expires > now}
        self.soonest = min(self.leases.values(), default=_NEVER)
