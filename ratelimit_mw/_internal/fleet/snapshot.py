"""Figures of the fleet at one moment, as plain values; `as_dict` has nothing but JSON types."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from ratelimit_mw._internal.backends.figures_store import BUCKET
from ratelimit_mw._internal.policy.decision import Reason

REASONS: tuple[str, ...] = get_args(Reason)
"""Reasons for refusals, in the order that figures have everywhere."""


class Outcomes(NamedTuple):
    """Number of requests for each outcome."""

    admitted: int
    shadow: int
    """Let through, and would have been refused."""
    refused: Mapping[str, int]
    """By reason, every reason named."""

    @property
    def all_refused(self) -> int:
        """Refused for whatever reason."""
        return sum(self.refused.values())

    @property
    def all_requests(self) -> int:
        """All requests together."""
        return self.admitted + self.shadow + self.all_refused


class Point(NamedTuple):
    """A bucket of the chart."""

    at: int
    """Its start, in seconds since 1970."""
    outcomes: Outcomes
    known: bool = True
    """False where no worker reported, so that nobody knows the numbers."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"at": self.at, **self.outcomes._asdict(), "known": self.known}


class PlanFigures(NamedTuple):
    """Outcomes of one plan's requests in the last minute."""

    plan: str
    outcomes: Outcomes

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"plan": self.plan, **self.outcomes._asdict()}


class RouteFigures(NamedTuple):
    """Outcomes of the requests under one rule in the last minute."""

    route: str
    """Methods and path of the rule; empty for requests without one."""
    outcomes: Outcomes

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"route": self.route, **self.outcomes._asdict()}


class AppRouteFigures(NamedTuple):
    """Outcomes of the requests to one route of the app by one method, in the last minute."""

    route: str
    """Method and pattern of the route, such as `GET /items/{id}`."""
    rule: str
    """The rule of the settings that they fall under, as in `RouteFigures`; empty for none."""
    outcomes: Outcomes

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"route": self.route, "rule": self.rule, **self.outcomes._asdict()}


class LimitFigures(NamedTuple):
    """Status of one limit of a caller. Amounts of money are in the currency, for showing only."""

    name: str
    """The limit in words, such as `60/minute`."""
    kind: str
    """`window`, `slots` or `spending`."""
    scope: str
    """`plan`, `address`, or `route` and the rule's methods and path."""
    used: float
    """Units, active slots, or what was spent."""
    limit: float
    held: float
    """Amount that a budget holds for requests that are not settled yet."""
    share: float
    """Used and held, as a share of the limit; over 1 where a limit was lowered."""
    reset_after: float | None
    """Seconds until the oldest unit leaves its window, or the period ends."""
    currency: str | None
    used_text: str
    limit_text: str
    forecast: float | None
    """Seconds until a budget is burnt at the present pace; None where its period ends before."""


class CallerFigures(NamedTuple):
    """Outcomes of one caller's requests in the last minute, and the status of its limits."""

    caller: str
    """Partition that the caller is counted under, such as `k:` and 32 hex digits for an API key."""
    plan: str | None
    account: str | None
    label: str | None
    """Label of the caller in the settings or from `keys set`."""
    api_key_hash: str | None
    """Hash as `keys hash` prints it; None unless the caller is one key and its hash is known."""
    outcomes: Outcomes
    rate: float
    """Requests a second, refused ones included."""
    limits: tuple[LimitFigures, ...] = ()
    """Empty for those that are neither among the busiest nor the most refused."""

    @property
    def nearest(self) -> float:
        """The largest share that is used of any limit."""
        return max((limit.share for limit in self.limits), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "caller": self.caller,
            "plan": self.plan,
            "account": self.account,
            "label": self.label,
            "api_key_hash": self.api_key_hash,
            **self.outcomes._asdict(),
            "rate": self.rate,
            "limits": [limit._asdict() for limit in self.limits],
            "nearest": self.nearest,
        }


class Latency(NamedTuple):
    """Milliseconds from asking the backend to its answer, as workers find it once a second; None: unknown."""

    p50: float | None = None
    p99: float | None = None


SILENT_SECONDS = 10.0
"""Seconds without a report after which a worker is silent. One that has nothing to do reports every five."""


class WorkerFigures(NamedTuple):
    """One process, as it says of itself."""

    worker: str
    host: str
    pid: int
    version: str
    """Of the settings in force there."""
    compiled: bool
    """Whether the modules of the request path are; taken for so where nothing is said."""
    backend_up: bool
    latency_ms: Latency
    requests: float
    """Decisions a second."""
    leases: int
    """Leases that it renews."""
    owed: int
    """Number of operations, and of counts of an outage, that wait to be written."""
    seen: float
    """Seconds since it said so."""

    @property
    def is_silent(self) -> bool:
        """Whether it should have said something since."""
        return self.seen > SILENT_SECONDS

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "latency_ms": self.latency_ms._asdict(), "silent": self.is_silent}


class Headline(NamedTuple):
    """The one thing that whoever is on call has to know first."""

    level: Literal["calm", "notice", "alarm"]
    kind: str
    """Kind of what is so: `no-workers`, `silent`, `some-silent`, `backend`, `backend-partly`, `settings`,
    `capacity`, `everybody`, `plan`, `caller`, `refusals`, `calm`."""
    title: str
    """A sentence; one about a caller goes on after the caller's name, one with a time goes on with it."""
    more: str
    caller: str | None = None
    plan: str | None = None
    since: float | None = None
    """Time from which on it is so, in seconds since 1970."""


NO_HEADLINE = Headline("calm", "calm", "", "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole fleet at one moment."""

    now: float
    """By the backend's clock, in seconds since 1970."""
    bucket: int
    """Seconds from one point to the next."""
    series: tuple[Point, ...]
    """The last hour, oldest first; the last point is still growing."""
    plans: tuple[PlanFigures, ...]
    callers: tuple[CallerFigures, ...]
    """The busiest first; those that are refused most are among them."""
    workers: tuple[WorkerFigures, ...]
    backend_up: bool
    is_shared: bool
    """Whether figures are of all processes, not of this one alone."""
    partial: str | None = None
    """Reason why figures are missing; None if none are."""
    headline: Headline = NO_HEADLINE
    callers_seen: int = 0
    """Callers of the last minute, as far as they are counted one by one; `callers` has some of them."""
    routes: tuple[RouteFigures, ...] = ()
    """Rules of routes in the last minute, the most refused first, then the busiest: at most so many."""
    app_routes: tuple[AppRouteFigures, ...] = ()
    """Routes of the app in the last minute, ordered as `routes`. They are counted while somebody looks."""
    app_routes_since: float | None = None
    """Time from which on they are counted, in seconds since 1970; None where that is the whole minute."""

    def without_backend(self, why: str) -> "Snapshot":
        """Return the snapshot with a note that the backend is away since; `why` is the reason."""
        return replace(self, backend_up=False, partial=why)

    @property
    def versions(self) -> list[str]:
        """Of the settings: more than one, and the fleet disagrees."""
        return sorted({worker.version for worker in self.workers if not worker.is_silent})

    @property
    def latency(self) -> Latency:
        """The median worker's median, and the worst of the rest."""
        medians = sorted(w.latency_ms.p50 for w in self.workers if w.latency_ms.p50 is not None)
        worst = [w.latency_ms.p99 for w in self.workers if w.latency_ms.p99 is not None]
        return Latency(medians[len(medians) // 2] if medians else None, max(worst, default=None))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "now": self.now,
            "bucket": self.bucket,
            "series": [point.as_dict() for point in self.series],
            "plans": [plan.as_dict() for plan in self.plans],
            "routes": [route.as_dict() for route in self.routes],
            "app_routes": [route.as_dict() for route in self.app_routes],
            "app_routes_since": self.app_routes_since,
            "callers": [caller.as_dict() for caller in self.callers],
            "callers_seen": self.callers_seen,
            "workers": [worker.as_dict() for worker in self.workers],
            "backend": {
                "up": self.backend_up,
                "latency_ms": self.latency._asdict(),
                "kind": "redis" if self.is_shared else "memory",
            },
            "settings": {"versions": self.versions},
            "partial": self.partial,
            "headline": self.headline._asdict(),
        }


class CallerDetail(NamedTuple):
    """One caller with its history."""

    figures: CallerFigures
    now: float
    """The backend's time at which this was read, in seconds since 1970."""
    series: tuple[Point, ...]
    """The last ten minutes of this caller alone."""
    known_as: tuple[str, ...]
    """Hashes of the API keys that are counted so."""
    plans: tuple[str, ...]
    """The plans of the settings."""
    partial: str | None = None
    """Reason why the figures are not current; None if they are."""
    addresses: tuple[tuple[str, int], ...] = ()
    """Addresses of the last ten minutes with their requests, the most first, while somebody looks."""
    routes: tuple[tuple[str, int], ...] = ()
    """Methods and routes with their requests, as `addresses`."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.figures.as_dict(),
            "now": round(self.now, 3),
            "bucket": BUCKET,
            "series": [point.as_dict() for point in self.series],
            "addresses": [{"address": name, "requests": number} for name, number in self.addresses],
            "routes": [{"route": name, "requests": number} for name, number in self.routes],
            "known_as": list(self.known_as),
            "plans": list(self.plans),
            "partial": self.partial,
        }
