"""Store of the whole fleet's figures, kept beside the counts: for display, never for decisions.

Time is cut into buckets of `BUCKET` seconds of the store's own clock. The size of a bucket is bounded
whatever callers send, and everything expires.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ratelimit_mw._internal.backends.connecting.clients import Clients
from ratelimit_mw._internal.backends.redis.script import get_script

if TYPE_CHECKING:
    from ratelimit_mw._internal.backends.connecting.client import Client

BUCKET = 5
"""Seconds of a bucket."""
TOTALS_LIFE = 3_660
"""Seconds that the counts of plans last: a little over an hour."""
CALLERS_LIFE = 660
"""Seconds that the counts of callers last: a little over ten minutes."""
WORKER_LIFE = 15
"""Seconds after which a worker that reports no more is gone."""
KEPT = 500
"""Names with the highest counts that a bucket keeps, and workers that are read."""
PAGE = 240
"""Commands of a look that go to the server together, so that none waits long behind them."""

Counts = Mapping[str, int]
"""Numbers by name. What the names mean is the business of who writes and reads them."""


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one worker since its last report, and the worker's description of itself."""

    worker: str
    about: str
    totals: Counts = field(default_factory=dict)
    callers: Counts = field(default_factory=dict)
    identities: Sequence[str] = ()
    """Identities of the callers that were counted."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.totals and not self.callers


class Question(NamedTuple):
    """Query for the buckets with these numbers, and for callers seen at `since` (a Unix time) or later."""

    totals: Sequence[int]
    callers: Sequence[int]
    since: float


class Reading(NamedTuple):
    """The answer to a question; the counts of each bucket in its order."""

    totals: Sequence[Counts]
    callers: Sequence[Counts]
    identities: list[str]
    """The latest first."""
    workers: dict[str, tuple[str, float]]
    """Description that each worker gives of itself, and the Unix time of its last report."""


class FiguresStore(Protocol):
    """Figures of the fleet. Every method that fails raises `BackendError` and nothing else."""

    is_shared: bool
    """Whether other processes write and read it, too."""

    async def now(self) -> float:
        """The store's clock, in seconds since 1970."""

    async def write(self, report: Report) -> None:
        """Add a report to the bucket of this moment."""

    async def leave(self, worker: str) -> None:
        """A worker ends."""

    async def read(self, question: Question) -> Reading:
        """Look figures up."""

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""

    async def close(self) -> None:
        """Close what the running event loop has opened; it may be used again."""


class MemoryFiguresStore:
    """Figures of one process."""

    is_shared = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._totals: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._callers: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._identities: OrderedDict[str, float] = OrderedDict()
        self._workers: dict[str, tuple[str, float]] = {}

    async def now(self) -> float:
        """The clock of this process, in seconds since 1970."""
        return self._clock()

    async def write(self, report: Report) -> None:
        """Add a report to the bucket of this moment."""
        now = self._clock()
        bucket = int(now // BUCKET)
        _add(self._totals, bucket, report.totals, TOTALS_LIFE)
        _add(self._callers, bucket, report.callers, CALLERS_LIFE)
        for each in report.identities:
            self._identities[each] = now
            self._identities.move_to_end(each)
        while len(self._identities) > KEPT:
            self._identities.popitem(last=False)
        self._workers[report.worker] = (report.about, now)

    async def leave(self, worker: str) -> None:
        """A worker ends."""
        self._workers.pop(worker, None)

    async def read(self, question: Question) -> Reading:
        """Look figures up."""
        seen = [each for each, at in self._identities.items() if at >= question.since]
        return Reading(
            [dict(self._totals.get(bucket, {})) for bucket in question.totals],
            [dict(self._callers.get(bucket, {})) for bucket in question.callers],
            seen[::-1],
            dict(self._workers),
        )

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""
        found = [self._callers.get(bucket, {}) for bucket in buckets]
        return [{name: counts[name] for name in names if name in counts} for counts in found]

    async def close(self) -> None:
        """There is nothing to close."""


class RedisFiguresStore:
    """Figures in sorted sets of a Redis or Valkey, all of them on one node of a cluster.

    A name is a member and its count the score, so that the server can keep the highest alone.
    """

    is_shared = True

    def __init__(self, new_client: "Callable[[], Client]", namespace: str) -> None:
        self._prefix = fleet_prefix(namespace)
        self._clients = Clients(new_client)
        self._ahead: float | None = None

    async def now(self) -> float:
        """The server's clock, as far as this process knows it, in seconds since 1970."""
        if self._ahead is None:
            client = self._clients.get()
            async with client.reading():
                self._set_clock(await client.execute("TIME"))
        return time.time() + (self._ahead or 0.0)

    async def write(self, report: Report) -> None:
        """Add a report to the bucket of this moment."""
        now = await self.now()
        bucket = int(now // BUCKET)
        keys = (f"t:{bucket}", f"c:{bucket}", "i", "workers", f"h:{report.worker}")
        lives = [1_000 * life for life in (TOTALS_LIFE, CALLERS_LIFE, WORKER_LIFE)]
        head: tuple[str | int, ...] = (report.worker, report.about, f"{now:.3f}", KEPT, *lives)
        pairs = [*report.totals.items(), *report.callers.items()]
        counts: list[str | int] = [each for pair in pairs for each in pair]
        sizes = (len(report.totals), len(report.callers))
        names = [self._prefix + key for key in keys]
        client = self._clients.get()
        async with client.reading():
            arguments = (len(names), *names, *head, *sizes, *counts, *report.identities)
            self._set_clock(await client.run(*get_script("figures"), arguments))

    async def leave(self, worker: str) -> None:
        """A worker ends."""
        await self._clients.get().ask(
            [("ZREM", f"{self._prefix}workers", worker), ("DEL", f"{self._prefix}h:{worker}")]
        )

    async def read(self, question: Question) -> Reading:
        """Look figures up."""
        prefix, since = self._prefix, f"{question.since:.3f}"
        keys = [f"{prefix}t:{bucket}" for bucket in question.totals]
        keys += [f"{prefix}c:{bucket}" for bucket in question.callers]
        look = [("ZRANGE", key, 0, -1, "WITHSCORES") for key in keys]
        seen = ("ZRANGE", f"{prefix}i", "+inf", since, "BYSCORE", "REV", "LIMIT", 0, KEPT)
        workers = ("ZRANGE", f"{prefix}workers", 0, KEPT - 1, "WITHSCORES")
        *answers, identities, present = await self._ask([*look, seen, workers])
        counts = [{name: int(count) for name, count in _scores(answer)} for answer in answers]
        when = dict(_scores(present))
        said = await self._ask([("GET", f"{prefix}h:{worker}") for worker in when])
        told = {
            worker: (text.decode(errors="replace"), at)
            for (worker, at), text in zip(when.items(), said, strict=True)
            if isinstance(text, bytes)
        }
        number = len(question.totals)
        return Reading(counts[:number], counts[number:], _texts(identities), told)

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""
        answers = await self._ask([("ZMSCORE", f"{self._prefix}c:{bucket}", *names) for bucket in buckets])
        return [
            {name: int(count) for name, count in _finite(zip(names, _list(answer), strict=False))}
            for answer in answers
        ]

    async def close(self) -> None:
        """Close the connection of the running event loop."""
        await self._clients.close()

    async def _ask(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Any]:
        answers = []
        for start in range(0, len(commands), PAGE):
            answers += await self._clients.get().ask(commands[start : start + PAGE])
        return answers

    def _set_clock(self, answer: Any) -> None:
        seconds, micros = answer
        self._ahead = int(seconds) + int(micros) / 1_000_000 - time.time()


def fleet_prefix(namespace: str) -> str:
    """Return the prefix of the keys of all figures."""
    return f"{namespace}:{{fleet}}:"


def _add(buckets: OrderedDict[int, dict[str, int]], bucket: int, counts: Counts, life: float) -> None:
    """Add to a bucket, keep its highest counts, and forget the buckets whose time is over."""
    kept = buckets.setdefault(bucket, {})
    for name, count in counts.items():
        kept[name] = kept.get(name, 0) + count
    if len(kept) > KEPT:
        buckets[bucket] = dict(nlargest(KEPT, kept.items(), key=lambda each: each[1]))
    while (first := next(iter(buckets))) < bucket - life // BUCKET:
        del buckets[first]


def _scores(answer: Any) -> Iterator[tuple[str, float]]:
    """Members and scores, as `WITHSCORES` has them one after the other; what is none is left out."""
    flat = _list(answer)
    return _finite(zip(_texts(flat[::2]), flat[1::2], strict=False))


def _finite(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, float]]:
    for name, score in pairs:
        try:
            number = float(score)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            yield name, number


def _texts(answer: Any) -> list[str]:
    """Members as text; a byte that is none is shown as such."""
    return [each.decode(errors="replace") for each in _list(answer) if isinstance(each, bytes)]


def _list(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else []
