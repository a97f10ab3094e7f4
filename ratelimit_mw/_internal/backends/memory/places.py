"""Decides about a charge in this process: all of its limits are charged, or none is."""

from collections.abc import Sequence

from ratelimit_mw._internal.backends.memory.counts import CountedState, CounterRef, WindowLog
from ratelimit_mw._internal.model.charge import NO_RESERVATION, Charge, Outcome, Reservation, ReservationKey

MOST_COST = 2**62
"""More than any limit grants; larger costs are compared as this."""


class Places:
    """The places where all limits of one charge are counted, found once for all of its requests."""

    __slots__ = ("_periods", "_refs", "_states", "owner", "since", "until")

    def __init__(
        self,
        owner: object,
        refs: Sequence[CounterRef],
        periods: tuple[ReservationKey, ...],
        since: int,
        until: int,
    ) -> None:
        """`since` and `until` are the times, in microseconds, between which the places hold."""
        self.owner = owner
        """The backend that found them."""
        self._refs = list(refs)
        self._periods = periods
        self._states: list[CountedState] = [CountedState()] * len(self._refs)
        """States as they were found last; at first one that no store keeps."""
        self.since = since
        self.until = until

    def decide(self, charge: Charge, now: int, lease_id: bytes | None, price: int) -> Outcome:
        """Decide about the charge, and charge all limits if they all admit it and there is a lease id."""
        cost = min(MOST_COST, charge.cost)
        amount = min(MOST_COST, price)
        admitted, has_new = True, False
        for at, ref in enumerate(self._refs):
            state = self._states[at]
            if not state.is_kept:
                state = self._find(at)
                has_new = has_new or not state.is_kept
            state.is_used = True
            if not state.admits(ref, now, cost, amount):
                admitted = False
        if lease_id is None or not admitted:
            return Outcome(admitted, now, self._row(now, cost, amount), NO_RESERVATION)
        row: list[int] = []
        for at, ref in enumerate(self._refs):
            state = self._states[at]
            state.charge(row, ref, now, lease_id, cost, amount)
        if has_new:
            self._keep_new(now)
        return Outcome(True, now, row, self._hold(charge, lease_id, price))

    def take_ahead(self, charge: Charge, now: int) -> Outcome:
        """Charge windows with units that will be used `charge.ahead` microseconds later at most."""
        outcome = self.decide(charge, now, None, 0)
        if not outcome.admitted:
            return outcome
        for at, ref in enumerate(self._refs):
            log = self._states[at]
            if not isinstance(log, WindowLog):
                raise TypeError(f"only units of windows are taken ahead, not of {log!r}")
            log.take_ahead(ref, now, charge.cost, charge.ahead)
        self._keep_new(now)
        return Outcome(True, now, self._row(now, 0, 0), NO_RESERVATION)

    def _find(self, at: int) -> CountedState:
        """Find the state of a limit in its store, or make one that no store has yet."""
        ref = self._refs[at]
        state: CountedState | None = ref.store.get(ref.name)
        if state is None:
            state = ref.make()
        self._states[at] = state
        return state

    def _row(self, now: int, cost: int, price: int) -> list[int]:
        """Figures of all limits, for a charge of `cost` and `price` that waits; 0 where none does."""
        row: list[int] = []
        for at, ref in enumerate(self._refs):
            state = self._states[at]
            state.append_status(row, ref, now, cost, price)
        return row

    def _keep_new(self, now: int) -> None:
        """Put new states into their stores. A refused charge leaves nothing behind."""
        for at, ref in enumerate(self._refs):
            state = self._states[at]
            if not state.is_kept:
                ref.store.add(ref.name, state, now)

    def _hold(self, charge: Charge, lease_id: bytes, price: int) -> Reservation:
        if not charge.is_held:
            return NO_RESERVATION
        periods = self._periods
        return Reservation(
            lease_id, charge.slots, periods, charge.lease, price if periods else 0, charge.currency
        )
