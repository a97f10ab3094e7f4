"""Outcomes with the status of each limit, as tests look at them."""

from typing import Protocol

from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.policy.decision import LimitStatus


class Peeks(Protocol):
    """A backend that can be asked how a charge would fare."""

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer and charge nothing."""


class Answer(Outcome):
    """An outcome that knows the limits it is about."""

    statuses: list[Status]

    @property
    def counted(self) -> list[int]:
        """Units used, active slots or the amount spent, of each limit."""
        return [self.used(place) for place in range(len(self.statuses))]

    def window(self, place: int = 0) -> WindowStatus:
        """Status of a limit that has to be a window."""
        return window_status(self.statuses[place])


def answer_of(charge: Charge, outcome: Outcome) -> Answer:
    """Add the status of each limit to the outcome of a charge."""
    statuses = charge.statuses(outcome)
    answer = Answer.from_statuses(outcome.admitted, outcome.now, statuses, outcome.reservation)
    answer.statuses = statuses
    return answer


class Decides(Peeks, Protocol):
    """A backend that decides about charges."""

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge all counters, or none."""


async def acquired(backend: Decides, charge: Charge, lease_id: bytes, price: int = 0) -> Answer:
    """The answer to a charge."""
    return answer_of(charge, await backend.acquire(charge, lease_id, price))


async def peeked(backend: Peeks, charge: Charge, price: int = 0) -> Answer:
    """Return the answer that a charge would get now."""
    return answer_of(charge, await backend.peek(charge, price))


def window_status(status: Status) -> WindowStatus:
    """A status that has to be a window's."""
    assert isinstance(status, WindowStatus)
    return status


def slot_status(status: Status) -> SlotStatus:
    """A status that has to be of slots."""
    assert isinstance(status, SlotStatus)
    return status


def budget_status(status: Status) -> BudgetStatus:
    """A status that has to be a budget's."""
    assert isinstance(status, BudgetStatus)
    return status


def counted(status: Status | LimitStatus) -> int:
    """Units used, active slots or the amount spent."""
    if isinstance(status, LimitStatus):
        status = status.status
    return status[0]
