"""Memory between two looks at the fleet: usual refusals of callers, and workers that were present."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from ratelimit_mw._internal.backends.figures_store import BUCKET
from ratelimit_mw._internal.fleet.headline import MANY, worst_callers
from ratelimit_mw._internal.fleet.snapshot import Outcomes, Snapshot, WorkerFigures
from ratelimit_mw._internal.model.backend import BackendError

ASKED = 3
"""Callers whose habit is looked up: those that are refused most."""
FRESH_SECONDS = 20.0
"""Seconds for which a habit is good."""
_MINUTE = 60 // BUCKET
USUAL_MINUTES = 9
"""Minutes before the last one that a habit is taken from."""
MISSED_SECONDS = 600.0
"""Seconds for which a worker is missed that went without a word."""

History = Callable[[str, Sequence[int]], Awaitable[list[Outcomes]]]


class Habits:
    """Usual refusals a minute of the callers that are refused most."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        """Time of the lookup, in seconds since 1970, and refusals a minute, by caller."""

    async def usual_refusals(self, snapshot: Snapshot, history: History) -> Mapping[str, float]:
        """Refusals a minute before the last minute, of the callers that are refused most now."""
        worst = [
            each.caller
            for each in worst_callers(snapshot.callers, ASKED)
            if each.outcomes.all_refused >= MANY
        ]
        self._known = {caller: known for caller, known in self._known.items() if caller in worst}
        newest = int(snapshot.now // BUCKET)
        buckets = range(newest - (USUAL_MINUTES + 1) * _MINUTE + 1, newest - _MINUTE + 1)
        for caller in worst:
            known = self._known.get(caller)
            if known is None or not 0 <= snapshot.now - known[0] < FRESH_SECONDS:
                try:
                    past = await history(caller, buckets)
                except BackendError:
                    break  # which the next look finds out by itself
                usual = sum(each.all_refused for each in past) / USUAL_MINUTES
                self._known[caller] = (snapshot.now, usual)
        return {caller: usual for caller, (_, usual) in self._known.items()}


class Workers:
    """The workers that were there, and since when they go by different settings."""

    def __init__(self) -> None:
        self._present: dict[str, tuple[WorkerFigures, float]] = {}
        """Each worker at the last look, and the time of its last report."""
        self._missed: dict[str, tuple[WorkerFigures, float]] = {}
        """Each worker that went without a word, and the time of its last report."""
        self.disagree_since: float | None = None

    def seen(self, workers: Sequence[WorkerFigures], now: float) -> tuple[WorkerFigures, ...]:
        """Return the workers that are present and the workers that are missed.

        A worker that ends takes leave, and is not missed.
        """
        present = {worker.worker: (worker, now - worker.seen) for worker in workers}
        for name, (worker, last) in self._present.items():
            if worker.is_silent and name not in present:
                self._missed[name] = (worker, last)
        new = [worker for name, (worker, _) in present.items() if name not in self._present]
        self._missed = {
            name: (worker, last)
            for name, (worker, last) in self._missed.items()
            if now - last < MISSED_SECONDS and name not in present and not _is_replaced(worker, new)
        }
        self._present = present
        disagree = len({worker.version for worker in workers if not worker.is_silent}) > 1
        self.disagree_since = (self.disagree_since or now) if disagree else None
        missed = [
            worker._replace(seen=round(now - last, 1), requests=0.0) for worker, last in self._missed.values()
        ]
        return (*workers, *missed)


def _is_replaced(worker: WorkerFigures, new: Sequence[WorkerFigures]) -> bool:
    """Whether a process has come up in the place of one that is gone."""
    return any(each.host == worker.host for each in new)
