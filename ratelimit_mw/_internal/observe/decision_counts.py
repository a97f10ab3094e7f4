"""Decisions of one process, counted at next to no cost and read now and then."""

from heapq import nlargest

from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.policy.counters import PLAN_SCOPE
from ratelimit_mw._internal.policy.decision import Decision, Refusal
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.leaf import Lock

MAX_CALLERS = 1_000
"""Callers counted apart between two readings. Beyond it those with the fewest requests are left out."""
MAX_TOUCHED = 1_000
"""Policies counted on before somebody has to add some up."""
PIECE = 250
"""Policies added up at once, so that no turn of an event loop takes long, however many callers there are."""

ADMITTED = "admitted"
"""Outcome of a request that no limit refused."""

Totals = dict[tuple[str, str, str, str], int]
"""By plan, pattern of the route's rule ("" where none matched), outcome and limit. The outcome is `admitted`,
`shadow` (let through, would have been refused) or the reason of a refusal; the limit, by its name, is the one
that refused, else ""."""
OutcomeAndLimit = tuple[str, str]
"""Outcome and limit."""
RouteCounts = dict[tuple[frozenset[str] | None, str, str], int]
"""By methods and path of the route's rule (None and "" where none matched), and outcome."""
CallerCounts = list[tuple[Identity, dict[str, int]]]
"""Callers that were decided about, each with the number of decisions by outcome."""


class DecisionCounts:
    """Counts decisions. A policy is one caller's on one route, so a request adds 1 to a number of its own.

    Event loops count, and any thread may read.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._touched: list[Policy] = []
        self._totals: Totals = {}
        self._callers: dict[tuple[str, str], tuple[Identity, dict[str, int]]] = {}
        self._routes: RouteCounts = {}
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Count anew: what was counted until then is the parent process's to tell."""
        self._lock = Lock()
        for policy in self._touched:
            policy.admitted, policy.refused = 0, None
        self._touched, self._totals, self._callers, self._routes = [], {}, {}, {}

    def admit(self, policy: Policy) -> None:
        """Count an admitted request."""
        # First the number, then the list: a thread that reads in between leaves no policy uncounted.
        policy.admitted += 1
        if policy.admitted == 1:
            self.touch(policy)

    def refuse(self, policy: Policy, kind: OutcomeAndLimit) -> None:
        """Count a request that was refused, or would have been."""
        self._lock.acquire()
        try:
            refused = policy.refused
            if refused is not None:
                refused[kind] = refused.get(kind, 0) + 1
            else:
                # First the number, as above: this very policy may be added up to make room.
                policy.refused = {kind: 1}
                self.touch(policy)
        finally:
            self._lock.release()

    @property
    def waiting(self) -> int:
        """Policies that were counted on and are not added up yet."""
        return len(self._touched)

    def add_up_some(self) -> bool:
        """Add up a piece of what was counted, for a reader to come; whether anything is left."""
        with self._lock:
            self._add_up()
            return bool(self._touched)

    def totals(self) -> Totals:
        """Every number since the limiter was made."""
        with self._lock:
            while self._touched:
                self._add_up()
            return self._totals.copy()

    def take_callers(self) -> CallerCounts:
        """Return the counts of each caller since the last call. Only one reader may call it."""
        with self._lock:
            while self._touched:
                self._add_up()
            callers, self._callers = self._callers, {}
            return list(callers.values())

    def take_routes(self) -> RouteCounts:
        """Return the counts of each rule since the last call. Only one reader may call it."""
        with self._lock:
            while self._touched:
                self._add_up()
            routes, self._routes = self._routes, {}
            return routes

    def touch(self, policy: Policy) -> None:
        """Have what a policy counts added up later: called with its first number."""
        with self._lock:  # or it could get into a list that was added up just now
            if len(self._touched) >= MAX_TOUCHED:
                self._add_up()
            self._touched.append(policy)

    def _add_up(self) -> None:
        touched = self._touched[-PIECE:]
        del self._touched[-PIECE:]
        if len(self._callers) + len(touched) > MAX_CALLERS:
            # Of a crowd most are not worth a place: those who ask most keep theirs.
            self._callers = dict(nlargest(MAX_CALLERS // 2, self._callers.items(), key=_requests_of_caller))
        for policy in touched:
            admitted, policy.admitted = policy.admitted, 0
            refused, policy.refused = policy.refused, None
            if admitted:
                self._add(policy, ADMITTED, "", admitted)
            for (outcome, limit), number in (refused or {}).items():
                self._add(policy, outcome, limit, number)

    def _add(self, policy: Policy, outcome: str, limit: str, number: int) -> None:
        identity, route = policy.identity, policy.route
        what = (identity.plan, "" if route is None else route.path, outcome, limit)
        self._totals[what] = self._totals.get(what, 0) + number
        rule = (None, "", outcome) if route is None else (route.methods, route.path, outcome)
        self._routes[rule] = self._routes.get(rule, 0) + number
        caller = self._callers.get((identity.partition, identity.plan))
        if caller is None:
            caller = self._callers[identity.partition, identity.plan] = (identity, {})
        caller[1][outcome] = caller[1].get(outcome, 0) + number


def _requests_of_caller(caller: tuple[object, tuple[Identity, dict[str, int]]]) -> int:
    """Return the number of requests in one caller's item of the counts that were added up."""
    _, (_, counts) = caller
    return sum(counts.values())


def outcome_and_limit(policy: Policy, decision: Decision) -> OutcomeAndLimit:
    """Outcome and limit of a refusal."""
    limit = "" if decision.refusal is None else limit_name(policy, decision.refusal)
    return outcome_of(decision), limit


def outcome_of(decision: Decision) -> str:
    """Return the outcome of a request: `admitted`, `shadow` or the reason of its refusal."""
    if decision.refusal is None:
        return ADMITTED
    return "shadow" if decision.allowed else decision.refusal.reason


def limit_name(policy: Policy, refusal: Refusal) -> str:
    """Return the name of the refusing limit in figures: `60/minute`, `slots`, `daily`; "" if there is none.

    The name is `own` for a rate or unit that a key has in place of its plan's: there may be as many of those
    limits as callers.
    """
    if refusal.limit is None:
        return ""
    counter = refusal.limit.counter
    if isinstance(counter.limit, Window):
        limits = policy.identity.limits
        if limits is not None and counter.scope.startswith(PLAN_SCOPE):
            own = limits.units if counter.limit.is_metered else limits.requests
            if own is not None:
                return "own"
    return refusal.limit.name
