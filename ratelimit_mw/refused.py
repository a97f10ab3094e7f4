"""Refusals that this process remembers, so that refused callers cost the backend nothing.

When a window refuses a cost, nothing can change that before its `retry_after`, but for a reset, a raised
limit or a give-back, which may so be seen a second late. A larger cost has a later promise, which only the
backend knows: it is asked.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ratelimit_mw.charge import NOTHING_HELD, Charge, Figures, Outcome
from ratelimit_mw.limits import SECOND, Window

LONGEST = 1.0
"""Seconds that a refusal is remembered at most."""
MOST = 10_000
"""Charges of which a refusal is remembered; beyond it the one remembered first is forgotten."""

SteadyClock = Callable[[], float]
"""Seconds that never go back."""


@dataclass(frozen=True, slots=True)
class _Refused:
    outcome: Outcome
    received: float
    """When the answer came: the backend decided before, so that no promise told from here comes too early."""
    until: float
    """Counted from when the charge was sent: the backend decided later, so that none is kept too long."""


class Refusals:
    """What was refused lately, by charge: one caller, one set of limits, one cost."""

    def __init__(self, clock: SteadyClock = time.monotonic) -> None:
        self.now = clock
        self._refused: dict[Charge, _Refused] = {}

    def __len__(self) -> int:
        return len(self._refused)

    def find(self, charge: Charge) -> Outcome | None:
        """The refusal that a charge would meet now, its figures as of now; None where that is unknown."""
        refused = self._refused.get(charge)
        if refused is None:
            return None
        now = self.now()
        if now >= refused.until:
            self._refused.pop(charge, None)
            return None
        return _later(refused.outcome, round((now - refused.received) * SECOND))

    def add(self, charge: Charge, outcome: Outcome, sent: float) -> None:
        """Remember a refusal by windows, until one of its figures has to change; it was asked at `sent`."""
        if outcome.admitted or charge.allowances:
            return  # what a request costs may differ each time
        wait = LONGEST * SECOND
        for counter, figures in zip(charge.counters, outcome.figures, strict=True):
            if isinstance(counter.limit, Window):
                # 0 means never: of an empty window nothing leaves, and one that admits makes no promise.
                wait = min(wait, figures.reset_after or wait, figures.retry_after or wait)
            elif figures.retry_after:
                return  # a slot may be free at any moment
        self._refused.pop(charge, None)
        if len(self._refused) >= MOST:
            self._refused.pop(next(iter(self._refused)), None)
        self._refused[charge] = _Refused(outcome, self.now(), sent + wait / SECOND)

    def clear(self) -> None:
        """Forget every refusal."""
        self._refused.clear()


def _later(outcome: Outcome, passed: int) -> Outcome:
    """A refusal `passed` microseconds later: the same moments, so much nearer."""
    figures = [
        Figures(used, reset_after - passed if reset_after else 0, retry_after - passed if retry_after else 0)
        for used, reset_after, retry_after in outcome.figures
    ]
    return Outcome(False, outcome.now + passed, figures, NOTHING_HELD)
