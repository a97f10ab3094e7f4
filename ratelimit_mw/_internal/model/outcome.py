"""The outcome of a charge: a backend's answer in numbers, and the status of each limit."""

from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from ratelimit_mw._internal.model.header_window import HeaderWindow
from ratelimit_mw._internal.model.limits import Limit, Slots, Window
from ratelimit_mw._internal.model.reservation import NO_RESERVATION, Reservation
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.runtime.leaf import Numbers

# The row of an `Outcome` has three numbers of each limit. First: units used, active slots or the amount
# spent. Second: of a window the time until its oldest unit leaves, of slots 0, of a budget the amount held.
# Third: 0 where the limit admits; else of a window the time until the charge fits, of slots and budgets 1.
# Whoever decides appends them in this order; only this module counts places in a row.
_WIDTH = 3
_RESET_AFTER = 1
_HELD = 1
_REFUSES = 2
NUMBERS_OF_A_STATUS = _WIDTH
"""Number of values in a row that belong to one limit."""


def row_before(row: Numbers, steps: Sequence[int], others: int) -> Numbers:
    """Make the row of a charge as it was before so many others like it were admitted."""
    before = Numbers()
    for place, step in enumerate(steps):
        at = _WIDTH * place
        before.append(row.at(at) - others * step)
        before.append(row.at(at + 1))
        before.append(0)
    return before


class Drawn(Protocol):
    """Units of a request that were taken ahead, and that it was admitted by."""

    @property
    def charge(self) -> object:
        """The part of the charge that the backend admitted besides; None if it was not asked."""

    def put_back(self) -> None:
        """Have the units in hand again: the request was not admitted after all. To be called once."""


class Outcome:
    """A backend's answer to a charge: whether it was admitted, and how each limit stands afterwards."""

    __slots__ = ("_row", "admitted", "drawn", "now", "reservation", "times")

    def __init__(self, admitted: bool, now: int, row: Numbers, reservation: Reservation) -> None:
        """`row` has the status of each counter of the charge, in their order, as `_WIDTH` numbers: it is made
        for every request, and mostly little of it is looked at.
        """
        self.admitted: bool = admitted
        self.now: int = now
        """Time of the decision by the backend's clock, in microseconds since 1970."""
        self._row = row
        self.reservation: Reservation = reservation
        self.times: tuple[int, ...] = ()
        """Times of the charge on a cluster, one for each of its partitions; empty where `now` is the only."""
        self.drawn: Drawn | None = None
        """Units taken ahead that it was admitted by; None if the backend admitted all of it."""

    @classmethod
    def from_statuses(
        cls, admitted: bool, now: int, statuses: Iterable[Status], reservation: Reservation
    ) -> Self:
        """Make an outcome of the status of each counter."""
        row: list[int] = []
        for status in statuses:
            if isinstance(status, WindowStatus):
                row += (status.used, status.reset_after_us, status.retry_after_us)
            elif isinstance(status, SlotStatus):
                row += (status.active, 0, int(status.is_full))
            else:
                row += (status.spent, status.held, int(status.is_short))
        return cls(admitted, now, Numbers(row), reservation)

    def status(self, place: int, limit: Limit) -> Status:
        """Status of the limit at this place of the charge."""
        row, at = self._row, _WIDTH * place
        if isinstance(limit, Window):
            return WindowStatus(row.at(at), row.at(at + _RESET_AFTER), row.at(at + _REFUSES))
        if isinstance(limit, Slots):
            return SlotStatus(row.at(at), row.at(at + _REFUSES) > 0)
        return BudgetStatus(row.at(at), row.at(at + _HELD), row.at(at + _REFUSES) > 0)

    def append_status(self, row: Numbers, place: int) -> None:
        """Append the status of the limit at this place to the row of another outcome."""
        at = _WIDTH * place
        row.append(self._row.at(at))
        row.append(self._row.at(at + 1))
        row.append(self._row.at(at + 2))

    def part(self, places: Sequence[int]) -> "Outcome":
        """Make the outcome of a charge of the limits at these places alone, which hold nothing."""
        row = Numbers()
        for place in places:
            self.append_status(row, place)
        return Outcome(self.admitted, self.now, row, NO_RESERVATION)

    def used(self, place: int) -> int:
        """Units used of the limit at this place: of slots those active, of an allowance the amount spent."""
        return self._row.at(_WIDTH * place)

    def nearest_of(self, windows: list[HeaderWindow]) -> HeaderWindow | None:
        """Find the window under which the fewest more charges fit; of equals the longer."""
        best, fewest, row = None, 0, self._row
        for window in windows:
            left = (window.quota - row.at(_WIDTH * window.place)) // window.cost
            if best is None or left < fewest or (left == fewest and window.length > best.length):
                best, fewest = window, left
        return best

    def reset_after(self, place: int) -> int:
        """Microseconds until the oldest unit leaves the window at this place."""
        return self._row.at(_WIDTH * place + _RESET_AFTER)

    def held(self, place: int) -> int:
        """Amount that the allowance at this place holds for charges that are not settled yet."""
        return self._row.at(_WIDTH * place + _HELD)

    def __repr__(self) -> str:
        return f"Outcome{self._values()}"

    def _values(self) -> tuple[object, ...]:
        return (self.admitted, self.now, tuple(self._row), self.reservation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())
