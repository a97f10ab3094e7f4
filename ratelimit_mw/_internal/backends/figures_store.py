"""Store of the whole fleet's figures, kept beside the counts: for display, never for decisions.

Time is cut into buckets of `BUCKET` seconds of the store's own clock. The size of a bucket is bounded
whatever callers send, and everything expires.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ratelimit_mw._internal.backends.connecting.clients import Clients
from ratelimit_mw._internal.backends.connecting.errors import ReplyError

if TYPE_CHECKING:
    from ratelimit_mw._internal.backends.connecting.client import Client, Command

BUCKET = 5
"""Seconds of a bucket."""
DAY_BUCKET = 300
"""Seconds of a bucket of the last day."""
DAY_LIFE = 87_000
"""Seconds that the counts of plans last in steps of five minutes: a little over a day."""
DAY_KEPT = 100
"""Names with the highest counts that a bucket of the last day keeps: 288 buckets take a few MB at most."""
SIGHTINGS_BUCKET = 60
"""Seconds of a bucket of addresses and routes of watched callers."""
MOST_WATCHED = 20
"""Callers who are watched at a time."""
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
_NOTHING: Counts = MappingProxyType({})


class Report(NamedTuple):
    """Counts of one worker since its last report, and the worker's description of itself."""

    worker: str
    about: str
    totals: Counts = _NOTHING
    callers: Counts = _NOTHING
    identities: Sequence[str] = ()
    """Identities of the callers that were counted."""
    routes: Counts = _NOTHING
    """Requests by outcome and rule."""
    sightings: Counts = _NOTHING
    """Requests of watched callers, by caller and by address or route."""


class FiguresQuery(NamedTuple):
    """Query for the buckets with these numbers, and for callers seen at `since` (a Unix time) or later."""

    totals: Sequence[int]
    callers: Sequence[int]
    """Buckets of the counts of callers and of rules."""
    since: float


class Reading(NamedTuple):
    """The answer to a question; the counts of each bucket in its order."""

    totals: Sequence[Counts]
    callers: Sequence[Counts]
    identities: list[str]
    """The latest first."""
    workers: dict[str, tuple[str, float]]
    """Description that each worker gives of itself, and the Unix time of its last report."""
    routes: Sequence[Counts] = ()


class FiguresStore(Protocol):
    """Figures of the fleet. Every method that fails raises `BackendError` and nothing else."""

    is_shared: bool
    """Whether other processes write and read it, too."""

    async def now(self) -> float:
        """The store's clock, in seconds since 1970."""

    async def write(self, report: Report) -> Sequence[str]:
        """Add a report to the bucket of this moment; returns the callers that are watched."""

    async def leave(self, worker: str) -> None:
        """A worker ends."""

    async def read(self, query: FiguresQuery) -> Reading:
        """Look figures up."""

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""

    async def day(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of plans in each of these buckets of five minutes."""

    async def watch(self, caller: str, seconds: float) -> None:
        """Have workers report where a caller comes from, for so long."""

    async def sightings(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """Reports about watched callers in each of these minutes."""

    async def close(self) -> None:
        """Close what the running event loop has opened; it may be used again."""


class RedisFiguresStore:
    """Figures in sorted sets of a Redis or Valkey, all of them on one node of a cluster.

    A name is a member and its count the score, so that the server can keep the highest alone.
    """

    is_shared = True

    def __init__(self, new_client: "Callable[[], Client]", namespace: str) -> None:
        self._prefix = fleet_prefix(namespace)
        from ratelimit_mw._internal.backends.redis.script import get_script  # noqa: PLC0415 - not in memory

        self._script = get_script
        self._clients = Clients(new_client)
        self._ahead: float | None = None

    async def now(self) -> float:
        """The server's clock, as far as this process knows it, in seconds since 1970."""
        if self._ahead is None:
            client = self._clients.get()
            async with client.reading():
                self._set_clock(await client.execute("TIME", is_short=True))
        return time.time() + (self._ahead or 0.0)

    async def write(self, report: Report) -> Sequence[str]:
        """Add a report to the bucket of this moment; returns the callers that are watched.

        All that it takes is sent together. A report about no request needs no script, which would cost the
        server several times as much.
        """
        now, client = await self.now(), self._clients.get()
        presence = self._presence(report, now)
        async with client.reading():
            if report.routes or report.callers or report.sightings or report.identities:
                arguments = self._counting(report, now)
                answers = await client.run(*self._script("figures"), arguments, presence)
            else:
                answers = await client.ask([*self._totals(report, now), *presence], is_short=True)
            if None in answers:
                raise ReplyError("WRONGTYPE a key of the figures holds a value of another type")
            *_, watched, clock = answers
            self._set_clock(clock)
        return _texts(watched)

    def _counting(self, report: Report, now: float) -> list[str | int]:
        """Arguments of the script that adds counts, its keys first."""
        bucket = int(now // BUCKET)
        minute = f"s:{int(now // SIGHTINGS_BUCKET)}"
        keys = (f"t:{bucket}", _day(now), f"r:{bucket}", f"c:{bucket}", minute, "i")
        lives = [1_000 * life for life in (TOTALS_LIFE, DAY_LIFE, CALLERS_LIFE)]
        parts = (report.totals, report.routes, report.callers, report.sightings)
        flat: list[str | int] = [each for part in parts for pair in part.items() for each in pair]
        head: tuple[str | int, ...] = (f"{now:.3f}", KEPT, DAY_KEPT, *lives, *map(len, parts))
        return [len(keys), *[self._prefix + key for key in keys], *head, *flat, *report.identities]

    def _totals(self, report: Report, now: float) -> "list[Command]":
        """Commands that add counts of plans alone, as the script does."""
        commands: list[Command] = []
        short, day = f"t:{int(now // BUCKET)}", _day(now)
        for name_of_key, kept, life in ((short, KEPT, TOTALS_LIFE), (day, DAY_KEPT, DAY_LIFE)):
            key = self._prefix + name_of_key
            commands += [("ZADD", key, "INCR", number, name) for name, number in report.totals.items()]
            commands += [("ZREMRANGEBYRANK", key, 0, -kept - 1), ("PEXPIRE", key, 1_000 * life)]
        return commands

    def _presence(self, report: Report, now: float) -> "list[Command]":
        """Commands that say that the worker is there, and ask whom somebody watches and for the time."""
        workers, life = f"{self._prefix}workers", 1_000 * WORKER_LIFE
        return [
            ("ZADD", workers, f"{now:.3f}", report.worker),
            ("ZREMRANGEBYSCORE", workers, "-inf", f"{now - WORKER_LIFE:.3f}"),
            ("PEXPIRE", workers, life),
            ("SET", f"{self._prefix}h:{report.worker}", report.about, "PX", life),
            ("ZRANGE", f"{self._prefix}watched", f"{now:.3f}", "+inf", "BYSCORE", "LIMIT", 0, MOST_WATCHED),
            ("TIME",),
        ]

    async def leave(self, worker: str) -> None:
        """A worker ends."""
        await self._clients.get().ask(
            [("ZREM", f"{self._prefix}workers", worker), ("DEL", f"{self._prefix}h:{worker}")], is_short=True
        )

    async def read(self, query: FiguresQuery) -> Reading:
        """Look figures up."""
        prefix, since = self._prefix, f"{query.since:.3f}"
        keys = [f"{prefix}t:{bucket}" for bucket in query.totals]
        keys += [f"{prefix}{kind}:{bucket}" for kind in "cr" for bucket in query.callers]
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
        number, half = len(query.totals), len(query.callers)
        callers, routes = counts[number : number + half], counts[number + half :]
        return Reading(counts[:number], callers, _texts(identities), told, routes)

    async def history(self, names: Sequence[str], buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of these names of callers in each bucket."""
        answers = await self._ask([("ZMSCORE", f"{self._prefix}c:{bucket}", *names) for bucket in buckets])
        return [
            {name: int(count) for name, count in _finite(zip(names, _list(answer), strict=False))}
            for answer in answers
        ]

    async def day(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """The counts of plans in each of these buckets of five minutes."""
        return await self._counts(f"d:{bucket}" for bucket in buckets)

    async def watch(self, caller: str, seconds: float) -> None:
        """Have workers report where a caller comes from, for so long."""
        key, now = f"{self._prefix}watched", await self.now()
        await self._clients.get().ask(
            [
                ("ZADD", key, f"{now + seconds:.3f}", caller),
                ("ZREMRANGEBYSCORE", key, "-inf", f"{now:.3f}"),
                ("ZREMRANGEBYRANK", key, 0, -MOST_WATCHED - 1),
                ("PEXPIRE", key, 1_000 * CALLERS_LIFE),  # of all who are watched; each has its own end
            ]
        )

    async def sightings(self, buckets: Sequence[int]) -> Sequence[Counts]:
        """Reports about watched callers in each of these minutes."""
        return await self._counts(f"s:{bucket}" for bucket in buckets)

    async def _counts(self, keys: Iterable[str]) -> list[Counts]:
        answers = await self._ask([("ZRANGE", self._prefix + key, 0, -1, "WITHSCORES") for key in keys])
        return [{name: int(count) for name, count in _scores(answer)} for answer in answers]

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


def _day(now: float) -> str:
    """Return the key of the five minutes of a time, without its prefix."""
    return f"d:{int(now // DAY_BUCKET)}"


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
