"""The fleet as it is now: read from the backend at most once a second, however many look."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import nlargest
from typing import Any

from ratelimit_mw._internal.backends.figures_store import (
    BUCKET,
    SIGHTINGS_BUCKET,
    Counts,
    FiguresQuery,
    Reading,
)
from ratelimit_mw._internal.fleet.caller_lookup import CallerLookup
from ratelimit_mw._internal.fleet.day import Day, DayReader
from ratelimit_mw._internal.fleet.habits import Habits, Workers
from ratelimit_mw._internal.fleet.headline import Circumstances, Outage, headline_of
from ratelimit_mw._internal.fleet.limit_figures import LimitFiguresReader
from ratelimit_mw._internal.fleet.reading import NOTHING, by_plan, outcomes_of, seen_callers, sums, worker_of
from ratelimit_mw._internal.fleet.route_figures import RouteReader, by_app_route, by_rule
from ratelimit_mw._internal.fleet.series import continued, point_of, with_gaps
from ratelimit_mw._internal.fleet.snapshot import (
    REASONS,
    CallerDetail,
    CallerFigures,
    LimitFigures,
    Outcomes,
    PlanFigures,
    Point,
    Snapshot,
    WorkerFigures,
)
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.observe.reporting import name_of
from ratelimit_mw._internal.observe.sightings import sightings_of
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime import threads

Sightings = tuple[tuple[str, int], ...]

MOST_SIGHTINGS = 20
"""Addresses and routes of a caller that are shown."""
FOUND = 20
"""Callers that a search finds at most."""
KEPT_SECONDS = 0.9
"""Seconds for which a snapshot serves everyone who asks."""
POINTS = 720
"""Buckets of the chart: an hour."""
MINUTE = 12
"""Buckets that plans and callers are summed over."""
HISTORY = 120
"""Buckets of one caller's own chart: ten minutes."""
OPEN = 4
"""The last buckets, which may still grow: reports are on their way. Older ones are read once."""
CALLERS = 50
PEEKED = 20
"""Callers in a snapshot, and those of them whose limits are asked for."""
LISTED = 1_000
"""Callers in a list of all of them."""
WATCHED_SECONDS = 30.0
"""Seconds for which workers tell where a caller comes from after somebody has looked at it."""
TOGETHER = 50
"""Callers of a list that are looked up in one turn of the event loop."""
MOST_LIMITS = 50
"""Limits of a caller in a snapshot: those that are used up most. A caller's own page has all."""


class FleetView:
    """Reads the figures of the fleet through a limiter's backend. Decides and charges nothing."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._store = limiter.engine.reporter.store
        self._lookup = CallerLookup(limiter)
        self._limit_figures = LimitFiguresReader(limiter)
        self._points: dict[int, Point] = {}
        self._totals: dict[int, Counts] = {}
        self._callers: dict[int, Counts] = {}
        self._routes: dict[int, Counts] = {}
        self._route_reader = RouteReader(self._store)
        self._settled = 0
        """The last bucket that had stopped growing when it was read."""
        self._snapshot: Snapshot | None = None
        self._seen_at = 0.0
        """Time at which the snapshot was taken, by the clock of this process."""
        self._workers = Workers()
        self._habits = Habits()
        self._day = DayReader(self._store)
        self._outage: Outage | None = None
        self._decided = self._decided_alone()
        """Requests that were decided without the backend before it went away last."""
        self._read: tuple[float, asyncio.Task[Snapshot]] | None = None

    async def read(self) -> Snapshot:
        """The fleet as it is now. While the backend is away: as it was, and `partial` says so."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if self._read is None or self._read[1].get_loop() is not loop or self._read[0] < now - KEPT_SECONDS:
            self._read = (now, loop.create_task(self._look(), name="ratelimit_mw fleet"))
        # Whoever goes away leaves the reading to the others.
        return await asyncio.shield(self._read[1])

    async def caller(self, partition: str) -> CallerDetail:
        """One caller, whether it is among the busiest or not; what is known of it while the backend is away.

        Raises `BackendError` where nothing is.
        """
        snapshot = await self.read()
        figures = next((each for each in snapshot.callers if each.caller == partition), None)
        plans = tuple(self._limiter.settings.plans)
        try:
            now = await self._store.now()
            newest = int(now // BUCKET)
            buckets = range(newest - HISTORY + 1, newest + 1)
            history = await self._history(partition, buckets)
            addresses, routes = await self._sightings(partition, now)
            if figures is None or len(figures.limits) in (0, MOST_LIMITS):
                (figures,) = await self._with_limits(
                    [self._figures(partition, _added(history[-MINUTE:]), snapshot.now)]
                )
        except BackendError as error:
            if figures is None:
                raise
            why = f"the backend is away: {error}; the page shows this caller as last seen"
            return CallerDetail(figures, snapshot.now, (), self._lookup.hashes(partition), plans, why)
        gaps = {point.at for point in snapshot.series if not point.known}
        series = tuple(
            Point(bucket * BUCKET, each, known=bucket * BUCKET not in gaps)
            for bucket, each in zip(buckets, history, strict=True)
        )
        hashes = self._lookup.hashes(partition)
        return CallerDetail(figures, now, series, hashes, plans, addresses=addresses, routes=routes)

    async def _sightings(self, partition: str, now: float) -> tuple[Sightings, Sightings]:
        """Addresses and routes of a caller. Workers tell of them from the first look on."""
        await self._store.watch(partition, WATCHED_SECONDS)
        newest = int(now // SIGHTINGS_BUCKET)
        minutes = range(newest - HISTORY * BUCKET // SIGHTINGS_BUCKET + 1, newest + 1)
        addresses, routes = sightings_of(partition, await self._store.sightings(minutes))
        return tuple(addresses.most_common(MOST_SIGHTINGS)), tuple(routes.most_common(MOST_SIGHTINGS))

    async def day(self) -> Day:
        """The last day in steps of five minutes. Raises `BackendError`."""
        return await self._day.read()

    async def every_caller(self) -> list[CallerFigures]:
        """Callers of the last minute that are counted one by one, the busiest first, without their limits."""
        snapshot = await self.read()
        found = self._found()
        names = nlargest(LISTED, found, key=lambda each: (found[each].all_refused, found[each].all_requests))
        listed: list[CallerFigures] = []
        for start in range(0, len(names), TOGETHER):
            listed += [self._figures(each, found[each], snapshot.now) for each in names[start:][:TOGETHER]]
            await asyncio.sleep(0)
        return sorted(listed, key=lambda each: each.outcomes.all_requests, reverse=True)

    async def these_callers(self, names: Sequence[str]) -> list[CallerFigures]:
        """Callers by their names, in this order, as they are now. Raises `BackendError`."""
        snapshot = await self.read()
        found = self._found()
        callers = [self._figures(each, found.get(each, NOTHING), snapshot.now) for each in names]
        return await self._with_limits(callers, MOST_LIMITS)

    def _found(self) -> dict[str, Outcomes]:
        """The callers that were counted one by one in the minute that was read last."""
        counts = sums(self._callers.values())
        return {partition: outcomes_of(each) for partition, each in counts.items()}

    async def _history(self, partition: str, buckets: Sequence[int]) -> list[Outcomes]:
        """One caller's requests in each of these buckets. Raises `BackendError`."""
        names = {name_of(outcome, partition): outcome for outcome in ("admitted", "shadow", *REASONS)}
        return [
            outcomes_of({names[name]: number for name, number in counts.items() if name in names})
            for counts in await self._store.history(list(names), buckets)
        ]

    async def search(self, text: str) -> list[dict[str, str | None]]:
        """Callers who are known or were seen lately, by a part of their name, label, account or hash."""
        await self.read()
        names = await threads.call(partial(self._lookup.search, text, FOUND))
        callers = dict.fromkeys(each for name in names for each in self._lookup.counted_as(name))
        return [
            {"caller": each, "label": self._lookup.label(each), "account": self._lookup.account(each)}
            for each in [*callers][:FOUND]
        ]

    async def identity(self, partition: str) -> Identity | None:
        """Return the identity that a partition counts; None if nobody can tell it."""
        await self.read()
        return self._lookup.identity(partition)

    # reading ------------------------------------------------------------------------------------

    async def _look(self) -> Snapshot:
        await self._lookup.follow()
        try:
            now = await self._store.now()
            newest = int(now // BUCKET)
            minute = _minute(now)
            query = FiguresQuery(
                self._unread(range(newest - POINTS + 1, newest + 1), self._points),
                self._unread(minute, self._callers),
                (newest - MINUTE) * BUCKET,
            )
            reading = await self._store.read(query)
            await self._route_reader.look(now)  # after that: where a backend hangs, once is enough
        except BackendError as error:
            return self._without_backend(str(error))
        self._outage = None
        self._decided = self._decided_alone()
        self._remember(query, reading, newest)
        self._lookup.learn(seen_callers(reading.identities))
        callers, number = self._busiest(now)
        missing = None
        try:
            callers = await self._with_limits(callers, MOST_LIMITS)
        except BackendError as error:
            missing = f"the state of the callers' limits could not be read: {error}"
        workers = self._workers.seen(_workers(reading, now), now)
        snapshot = Snapshot(
            now=round(now, 3),
            bucket=BUCKET,
            series=with_gaps([self._points[each] for each in range(newest - POINTS + 1, newest + 1)]),
            plans=_plans(self._totals[each] for each in minute),
            callers=tuple(callers),
            callers_seen=number,
            routes=by_rule(self._routes.values()),
            app_routes=by_app_route(self._routes.values()),
            app_routes_since=self._route_reader.since(now),
            workers=workers,
            backend_up=not self._limiter.engine.backend.is_away,
            is_shared=self._store.is_shared,
            partial=missing,
        )
        habits = await self._habits.usual_refusals(snapshot, self._history)
        known = Circumstances(
            self._limiter.settings, disagree_since=self._workers.disagree_since, habits=habits
        )
        self._snapshot = replace(snapshot, headline=headline_of(snapshot, known))
        self._seen_at = time.monotonic()
        return self._snapshot

    def _without_backend(self, reason: str) -> Snapshot:
        decided = self._decided_alone() - self._decided
        since = time.time() if self._outage is None else self._outage.since
        self._outage = Outage(since, reason, decided)
        why = f"the backend is away: {reason}"
        if self._snapshot is None:
            now = round(time.time(), 3)
            known = Snapshot(now, BUCKET, (), (), (), (), False, self._store.is_shared, why)
        else:
            passed = time.monotonic() - self._seen_at
            known = continued(self._snapshot.without_backend(why), passed)
        headline = headline_of(known, Circumstances(self._limiter.settings, self._outage))
        return replace(known, headline=headline)

    def _decided_alone(self) -> int:
        """Requests that this process has decided without the backend so far."""
        return sum(self._limiter.stats().decisions_without_backend.values())

    def _unread(self, buckets: range, known: Mapping[int, object]) -> list[int]:
        return [bucket for bucket in buckets if bucket not in known or bucket > self._settled]

    def _remember(self, query: FiguresQuery, reading: Reading, newest: int) -> None:
        for bucket, counts in zip(query.totals, reading.totals, strict=True):
            self._points[bucket] = point_of(bucket * BUCKET, counts)
            self._totals[bucket] = counts
        self._callers.update(zip(query.callers, reading.callers, strict=True))
        self._routes.update(zip(query.callers, reading.routes, strict=True))
        self._settled = newest - OPEN
        of_minute = [(each, MINUTE) for each in (self._totals, self._callers, self._routes)]
        known: list[tuple[dict[int, Any], int]] = [(self._points, POINTS), *of_minute]
        for kept, number in known:
            for bucket in [each for each in kept if each <= newest - number]:
                del kept[bucket]

    # callers ------------------------------------------------------------------------------------

    def _busiest(self, now: float) -> tuple[list[CallerFigures], int]:
        """The callers of a snapshot, and how many there were."""
        found = self._found()
        busiest = nlargest(CALLERS, found, key=lambda each: found[each].all_requests)
        refused = nlargest(CALLERS // 2, found, key=lambda each: found[each].all_refused)
        half = CALLERS - len(refused)
        chosen = list(dict.fromkeys([*busiest[:half], *refused, *busiest]))[:CALLERS]
        callers = [self._figures(each, found[each], now) for each in chosen]
        return sorted(callers, key=lambda each: each.outcomes.all_requests, reverse=True), len(found)

    def _figures(self, partition: str, outcomes: Outcomes, now: float) -> CallerFigures:
        identity = self._lookup.identity(partition)
        seconds = (MINUTE - 1) * BUCKET + now % BUCKET
        return CallerFigures(
            caller=partition,
            plan=None if identity is None else identity.plan,
            account=None if identity is None else identity.account,
            label=self._lookup.label(partition),
            api_key_hash=None if identity is None or partition[:2] != "k:" else identity.api_key_hash,
            outcomes=outcomes,
            rate=round(outcomes.all_requests / seconds, 2),
        )

    async def _with_limits(
        self, callers: Sequence[CallerFigures], most: int | None = None
    ) -> list[CallerFigures]:
        """Return the callers, with limits for the busiest and the most refused of them: all, or so many."""
        refused = nlargest(PEEKED // 2, callers, key=lambda each: each.outcomes.all_refused)
        chosen = list(dict.fromkeys(each.caller for each in (*refused, *callers)))[:PEEKED]
        identities = [found for each in chosen if (found := self._lookup.identity(each)) is not None]
        limits = await self._limit_figures.read(identities, most)
        known: Mapping[str, tuple[LimitFigures, ...]] = {
            identity.partition: each for identity, each in zip(identities, limits, strict=True)
        }
        return [each._replace(limits=known.get(each.caller, ())) for each in callers]


def _minute(now: float) -> range:
    newest = int(now // BUCKET)
    return range(newest - MINUTE + 1, newest + 1)


def _plans(buckets: Iterable[Counts]) -> tuple[PlanFigures, ...]:
    found = [PlanFigures(plan, outcomes) for plan, outcomes in by_plan(buckets).items()]
    return tuple(sorted(found, key=lambda each: (-each.outcomes.all_requests, each.plan)))


def _workers(reading: Reading, now: float) -> tuple[WorkerFigures, ...]:
    told = [worker_of(name, text, now - at) for name, (text, at) in sorted(reading.workers.items())]
    return tuple(each for each in told if each is not None)


def _added(outcomes: Sequence[Outcomes]) -> Outcomes:
    result = NOTHING
    for each in outcomes:
        refused = {reason: result.refused[reason] + each.refused[reason] for reason in REASONS}
        result = Outcomes(result.admitted + each.admitted, result.shadow + each.shadow, refused)
    return result
