"""Decides about a charge in this process: all of its limits are charged, or none is."""

from collections.abc import Sequence

from ratelimit_mw._internal.backends.memory.counts import MOST_COST, CounterRef, WindowLog
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, ReservationKey
from ratelimit_mw._internal.runtime.leaf import Numbers


class PreparedCharge:
    """A charge whose counters are found, once for all of its requests."""

    __slots__ = ("_periods", "_refs", "owner", "since", "until")

    def __init__(
        self,
        owner: object,
        refs: Sequence[CounterRef],
        periods: tuple[ReservationKey, ...],
        since: int,
        until: int,
    ) -> None:
        """`since` and `until` are the times, in microseconds, between which it holds."""
        self.owner = owner
        """The backend whose counters they are."""
        self._refs = list(refs)
        self._periods = periods
        self.since = since
        self.until = until

    def decide(self, charge: Charge, now: int, lease_id: bytes | None, price: int) -> Outcome:
        """Decide about the charge, and charge all limits if they all admit it and there is a lease id."""
        amount = price if price < MOST_COST else MOST_COST  # noqa: FURB136 - a call costs as much
        admitted, has_new = True, False
        for ref in self._refs:
            state = ref.state
            if not state.is_stored:
                state = ref.find()
                has_new = has_new or not state.is_stored
            state.is_used = True
            if not state.admits(ref, now, ref.need, amount):
                admitted = False
        if lease_id is None or not admitted:
            return Outcome(admitted, now, self._row(now, True, amount), NO_RESERVATION)
        row = Numbers()
        for ref in self._refs:
            if ref.cost:
                ref.state.charge(row, ref, now, lease_id, ref.cost, amount)
            else:
                ref.state.append_status(row, ref, now, 0, 0)
        if has_new:
            self._keep_new(now)
        if not charge.is_held:
            return Outcome(True, now, row, NO_RESERVATION)
        return Outcome(True, now, row, charge.recorded_reservation(lease_id, self._periods, price))

    def take_ahead(self, charge: Charge, now: int) -> Outcome:
        """Charge windows with units that will be used `charge.ahead` microseconds later at most."""
        outcome = self.decide(charge, now, None, 0)
        if not outcome.admitted:
            return outcome
        for ref in self._refs:
            log = ref.state
            if not isinstance(log, WindowLog):
                raise TypeError(f"only units of windows are taken ahead, not of {log!r}")
            log.take_ahead(ref, now, charge.cost, charge.ahead)
        self._keep_new(now)
        return Outcome(True, now, self._row(now, False, 0), NO_RESERVATION)

    def _row(self, now: int, waits: bool, price: int) -> Numbers:
        """Figures of all limits, for a charge of `price` that waits, or for none."""
        row = Numbers()
        for ref in self._refs:
            ref.state.append_status(row, ref, now, ref.need if waits else 0, price)
        return row

    def _keep_new(self, now: int) -> None:
        """Put new states into their stores. A refused charge leaves nothing behind."""
        for ref in self._refs:
            if not ref.state.is_stored:
                ref.store.add(ref.name, ref.state, now)
