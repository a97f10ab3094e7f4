"""Charges of which some limits are drawn from units taken ahead, while the backend is asked for the others.

The limits of a request are still charged all together or not at all: where the backend refuses the others, or
can't be asked, the units that were drawn are put back. That is exact, because they count from when they were
taken, whether they are spent or not (`prefetch.py`).
"""

from collections.abc import Generator, Iterable
from typing import Any

from ratelimit_mw._internal.cache.prefetch import Prefetch
from ratelimit_mw._internal.cache.prefetch_state import SHARED_START, PrefetchedUnit, PrefetchState
from ratelimit_mw._internal.model.backend import Backend, PendingCharge
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.runtime.leaf import Numbers

MAX_STATES = 1_024
"""Shared limits, shares and costs that units are taken ahead for; beyond it the oldest is made anew."""
REST = -1
"""In place of the number of a state: the limit belongs to what the backend is asked for."""


class Part:
    """Limits of a charge that are left where units of the others are in hand."""

    __slots__ = ("charge", "others", "rest", "sources")

    def __init__(
        self,
        charge: Charge | None,
        sources: list[tuple[int, int]],
        others: list[tuple[int, list[int]]],
        rest: list[int],
    ) -> None:
        self.charge: Charge | None = charge
        """None where nothing was drawn, and all of the charge is left."""
        self.sources: list[tuple[int, int]] = sources
        """Number of the state that each limit's units were drawn of, and the limit's place there.

        The number is `REST` for limits of the part."""
        self.others: list[tuple[int, list[int]]] = others
        """Numbers of the states that no units were drawn of, with the places of their limits in the whole."""
        self.rest: list[int] = rest
        """Places in the whole of the limits that no state is for."""


class UnitsAhead:
    """Units that a process has taken ahead for the requests of one policy.

    Those of limits that all callers share serve every policy with these limits; the caller's own are
    drawn where nothing else is left to be asked for.
    """

    __slots__ = ("_all", "own", "shared")

    def __init__(self, shared: list[PrefetchState], own: PrefetchState | None = None) -> None:
        self.shared: list[PrefetchState] = shared
        self.own: PrefetchState | None = own
        self._all: int = (1 << len(shared)) - 1

    def for_caller(self, charge: Charge) -> "UnitsAhead":
        """Return the same for another caller, whose charge this is."""
        return self if self.own is None else UnitsAhead(self.shared, PrefetchState(self.rest(charge)))

    def without_own(self) -> "UnitsAhead":
        """Return the units of shared limits alone."""
        return self if self.own is None else UnitsAhead(self.shared)

    @property
    def charges(self) -> list[Charge]:
        """The charges that units are taken ahead for: `last` of each says how its limits stand."""
        return [state.charge for state in (*self.shared, self.own) if state is not None]

    def rest(self, charge: Charge) -> Charge:
        """Return what is left of a charge without the shared limits that units are taken ahead of."""
        return self.part(charge, self._all).charge or charge

    def part(self, charge: Charge, drawn: int) -> Part:
        """Return what is left of a charge; each bit of `drawn` says whether units of a state were drawn."""
        parts = charge.parts
        if parts is None:
            parts = charge.parts = {}
        part: Part | None = parts.get(drawn)
        if part is None:
            part = parts[drawn] = self._part(charge, drawn)
        return part

    def _part(self, charge: Charge, drawn: int) -> Part:
        alike = charge.model if charge.base is None else charge.base
        if alike is None:
            return self._divided(charge, drawn)
        part = self.part(alike, drawn)
        if part.charge is None:
            return part
        if charge.base is None:
            rest = part.charge.for_caller(charge.caller, charge.address, charge.keys)
        else:
            rest = part.charge.with_estimates(charge.units)
        return Part(rest, part.sources, part.others, part.rest)

    def _divided(self, charge: Charge, drawn: int) -> Part:
        counters = charge.counters
        states = {
            counter: (number, place)
            for number, state in enumerate(self.shared)
            for place, counter in enumerate(state.charge.counters)
        }
        sources, left, rest = list[tuple[int, int]](), list[Counter](), list[int]()
        of_states: list[list[int]] = [[] for _ in self.shared]
        for place, counter in enumerate(counters):
            state = states.get(counter)
            (rest if state is None else of_states[state[0]]).append(place)
            if state is not None and drawn >> state[0] & 1:
                sources.append(state)
            else:
                sources.append((REST, len(left)))
                left.append(counter)
        others = [(number, places) for number, places in enumerate(of_states) if not drawn >> number & 1]
        if not drawn:
            return Part(None, sources, others, rest)
        part = Charge(left, charge.cost, lease_seconds=charge.lease_seconds, estimates=charge.units)
        part.caller, part.address, part.keys = charge.caller, charge.address, charge.keys
        return Part(part, sources, others, rest)


class SharedUnits:
    """Blocks of the limits that all callers share, under one state of the settings."""

    def __init__(self) -> None:
        self._states: dict[tuple[tuple[Counter, ...], int], PrefetchState] = {}

    def states_for(self, charge: Charge, scopes: Iterable[str]) -> list[PrefetchState]:
        """Return the prefetch states for shared windows of a charge in these scopes, one for each partition.

        Plans that may use another share of a limit have blocks of their own, and so have other costs: what
        was taken for them was granted by their share.
        """
        found: dict[str, list[Counter]] = {}
        for counter in charge.counters:
            limit = counter.limit
            if counter.owner == "everyone" and counter.scope in scopes and isinstance(limit, Window):
                found.setdefault(counter.partition, []).append(counter)
        return [self._state(tuple(counters), charge.cost) for counters in found.values()]

    def _state(self, counters: tuple[Counter, ...], cost: int) -> PrefetchState:
        state = self._states.get((counters, cost))
        if state is None:
            evict_oldest(self._states, MAX_STATES)
            made = PrefetchState(Charge(counters, cost), SHARED_START)
            state = self._states.setdefault((counters, cost), made)  # another thread may have made one
        return state


class PartialCharge:
    """A charge on its way: units of some limits were drawn, and the backend is asked for the others.

    Afterwards it is what the request was admitted by, for whoever has to undo it.
    """

    __slots__ = ("_ahead", "_part", "_pending", "_prefetch", "_units", "_whole", "charge")

    def __init__(self, prefetch: Prefetch, ahead: UnitsAhead, whole: Charge) -> None:
        """Draw units of the shared limits, as far as there are any in hand."""
        self._prefetch = prefetch
        self._ahead = ahead
        self._whole = whole
        self._pending: PendingCharge | None = None
        self._units: list[PrefetchedUnit | None] = []
        """The units that were drawn of each shared limit, then perhaps the caller's own."""
        drawn = 0
        for number, state in enumerate(ahead.shared):
            unit = prefetch.draw(state)
            self._units.append(unit)
            if unit is not None:
                drawn |= 1 << number
        self._part: Part = ahead.part(whole, drawn)
        self.charge: Charge | None = self._part.charge or whole
        """The part of the charge that the backend is asked for; None if it is not asked."""

    def ask(self, backend: Backend, lease_id: bytes, price: int) -> "Outcome | PartialCharge":
        """Have it decided: at once by what is in hand, else by the backend. Raises `BackendError`."""
        part, own = self._part.charge or self._whole, self._ahead.own
        in_hand = None if part.counters else self._units[0]
        if own is not None and own.charge is part:  # it is all that is left
            in_hand = self._prefetch.draw(own)
            self._units.append(in_hand)
        if in_hand is not None:
            self.charge = None
            return self._answered(in_hand.admission())
        try:
            answer = backend.ask(part, lease_id, price)
        except BaseException:
            self.put_back()
            raise
        if isinstance(answer, Outcome):
            return self._answered(answer)
        self._pending = answer
        return self

    def __await__(self) -> Generator[Any, None, Outcome]:
        if self._pending is None:
            raise RuntimeError("a charge is asked before it is awaited")
        try:
            outcome = yield from self._pending.__await__()
        except BaseException:  # failed, cancelled, or ended by hand
            self.put_back()
            raise
        return self._answered(outcome)

    def give_up(self) -> None:
        """Undo what the backend was asked for; everything else is in hand again."""
        if self._pending is not None:
            self._pending.give_up()

    def put_back(self) -> None:
        """Have all that was drawn in hand again."""
        units, self._units = self._units, []
        for unit in units:
            if unit is not None:
                unit.put_back()

    def _answered(self, decided: Outcome) -> Outcome:
        """Return the outcome of the whole charge, where this is that of the part or of units in hand."""
        outcome = decided
        if self._part.charge is not None:
            row = self._row(decided)
            outcome = Outcome(decided.admitted, decided.now, row, decided.reservation)
            outcome.times = decided.times
        if not decided.admitted:
            self.put_back()
            return outcome
        if outcome is not decided:
            outcome.drawn = self
        if self.charge is not None:
            self._take_more(outcome)
        return outcome

    def _row(self, decided: Outcome) -> Numbers:
        """Put the status of each limit together, in the order of the whole charge."""
        row = Numbers()
        for number, place in self._part.sources:
            unit = self._units[number] if number >= 0 else None
            if unit is None:
                decided.append_status(row, place)
            else:
                unit.append_status(row, place, decided.admitted)
        return row

    def _take_more(self, outcome: Outcome) -> None:
        """Take units for those that follow of what the backend had to be asked for."""
        ahead, part = self._ahead, self._part
        for number, places in part.others:
            state = ahead.shared[number]
            state.charge.last = outcome.part(places)
            self._prefetch.refill(state)
        own = ahead.own
        if own is not None and own.charge is ahead.rest(self._whole):
            own.charge.last = outcome.part(part.rest)
            self._prefetch.refill(own)
