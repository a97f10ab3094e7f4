"""Status of a limit after a decision: a window, a set of slots, a budget."""

from typing import NamedTuple


class WindowStatus(NamedTuple):
    """A window after a decision. Times are in microseconds."""

    used: int
    """Units counted, those of the charge included where it was admitted."""
    reset_after_us: int
    """Time until the oldest unit leaves; 0 where nothing is counted."""
    retry_after_us: int
    """Time until the charge fits; 0 where the window doesn't refuse it."""

    @property
    def refuses(self) -> bool:
        """Whether the window has no room for the charge."""
        return self.retry_after_us > 0

    @property
    def next_change(self) -> int | None:
        """Time until a unit leaves or the charge fits; None where nothing is counted and nothing refused."""
        return min([time for time in (self.reset_after_us, self.retry_after_us) if time], default=None)

    def after(self, passed: int) -> "WindowStatus":
        """Status with the same moments, seen `passed` microseconds later, before any of them has come."""
        used, reset_after_us, retry_after_us = self
        return WindowStatus(
            used, reset_after_us and reset_after_us - passed, retry_after_us and retry_after_us - passed
        )


class SlotStatus(NamedTuple):
    """A set of slots after a decision."""

    active: int
    """Slots in use, the charge's own included where it was admitted."""
    is_full: bool
    """Whether no slot is free for the charge; false once it has taken the last one."""

    @property
    def refuses(self) -> bool:
        """Whether no slot is free for the charge."""
        return self.is_full


class BudgetStatus(NamedTuple):
    """A budget after a decision, in the smallest units of its currency."""

    spent: int
    """Amount that is settled in this period."""
    held: int
    """Estimates of charges that are not settled yet, the charge's own included where it was admitted."""
    is_short: bool
    """Whether too little is left for the charge; false once its estimate is held."""

    @property
    def refuses(self) -> bool:
        """Whether too little is left for the charge."""
        return self.is_short

    @property
    def taken(self) -> int:
        """Amount that is spent or held, which nobody else can spend."""
        return self.spent + self.held


Status = WindowStatus | SlotStatus | BudgetStatus
"""Status of a limit of any kind."""
