"""Figures by route: by the rules of the settings, and by the app's own routes while somebody looks."""

import time
from collections.abc import Iterable

from ratelimit_mw._internal.backends.figures_store import BUCKET, Counts, FiguresStore
from ratelimit_mw._internal.fleet.reading import outcomes_of, sums
from ratelimit_mw._internal.fleet.snapshot import AppRouteFigures, Outcomes, RouteFigures
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.observe.sightings import ROUTES, route_of

MOST = 20
"""Rules, and routes of the app, in a snapshot."""
WATCHED_SECONDS = 60.0
"""Seconds for which workers count by the app's routes after somebody has looked."""
AGAIN_SECONDS = 10.0
"""Seconds after which a look asks them to go on."""
MINUTE_SECONDS = 60


class RouteReader:
    """Has workers count by the app's routes while somebody looks, and reads what they counted."""

    def __init__(self, store: FiguresStore) -> None:
        self._store = store
        self._asked = float("-inf")
        self._since = 0.0
        """Time of the first look of those that go on, in seconds since 1970."""

    async def look(self, now: float) -> None:
        """Have workers count for a while from now on; asked again where the store is away or refuses."""
        asked = time.monotonic()
        if asked < self._asked + AGAIN_SECONDS:
            return
        if asked > self._asked + WATCHED_SECONDS:
            self._since = now
        self._asked = asked
        try:
            await self._store.watch(ROUTES, WATCHED_SECONDS)
        except BackendError:
            self._asked = float("-inf")

    def since(self, now: float) -> float | None:
        """Return the time from which on routes are counted; None where the last minute is whole."""
        is_whole = self._since <= now - MINUTE_SECONDS - BUCKET
        return None if is_whole else round(self._since, 3)


def by_rule(buckets: Iterable[Counts]) -> tuple[RouteFigures, ...]:
    """Return the figures of rules."""
    counted = sums(buckets).items()
    found = [RouteFigures(name, outcomes_of(counts)) for name, counts in counted if route_of(name) is None]
    return tuple(sorted(found, key=lambda each: (*_refused_most(each.outcomes), each.route))[:MOST])


def by_app_route(buckets: Iterable[Counts]) -> tuple[AppRouteFigures, ...]:
    """Return the figures of the app's routes."""
    found = [
        AppRouteFigures(*known, outcomes_of(counts))
        for name, counts in sums(buckets).items()
        if (known := route_of(name)) is not None
    ]
    return tuple(
        sorted(found, key=lambda each: (*_refused_most(each.outcomes), each.route, each.rule))[:MOST]
    )


def _refused_most(outcomes: Outcomes) -> tuple[int, int]:
    return -outcomes.all_refused, -outcomes.all_requests
