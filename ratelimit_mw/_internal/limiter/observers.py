"""Observers of decisions: the app's `on_decision`, tracing, and whoever else is shown each one."""

import asyncio
import logging
import time
from collections.abc import Callable

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime.plain_hooks import check_nothing_to_await, check_plain

logger = logging.getLogger("ratelimit_mw")

COMPLAIN_SECONDS = 60.0
"""Seconds between two log lines that decisions cannot be handed over: decisions are many."""


class DecisionMade:
    """A request was decided about: admitted, refused, or let through by shadow mode. Exempt ones are not."""

    __slots__ = ("_lease", "identity", "route")

    def __init__(self, identity: Identity, route: str | None, lease: Lease) -> None:
        self.identity: Identity = identity
        """The caller of this request."""
        self.route: str | None = route
        """Pattern of the rule that the request falls under, None where there is none."""
        self._lease = lease

    @property
    def decision(self) -> Decision:
        """The decision, and how the limits stood when it was made."""
        return self._lease.decision

    def __repr__(self) -> str:
        return f"DecisionMade({self.identity!r}, {self.route!r}, {self.decision!r})"


OnDecision = Callable[[DecisionMade], object]
Observer = Callable[[Lease], object]
"""Is shown each decision as it is made, in the request's own context. Must be quick, and wait for nothing."""


class DecisionNotifier:
    """An observer that hands decisions to the app, which can neither delay nor break a request by that."""

    def __init__(self, on_decision: OnDecision) -> None:
        check_plain(on_decision, "on_decision")
        self._on_decision = on_decision
        self._complained = -COMPLAIN_SECONDS

    def __call__(self, lease: Lease) -> None:
        """Hand a decision over at the end of this turn of the event loop, in the request's own context."""
        rule = lease.policy.route
        made = DecisionMade(lease.identity, None if rule is None else rule.path, lease)
        asyncio.get_running_loop().call_soon(self._hand_over, made)

    def _hand_over(self, made: DecisionMade) -> None:
        try:
            check_nothing_to_await(self._on_decision(made), "on_decision")
        except Exception:
            now = time.monotonic()
            if now - self._complained >= COMPLAIN_SECONDS:
                self._complained = now
                logger.exception("on_decision failed for %s", made.identity.partition)


class Observers:
    """Everyone who is shown decisions."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Show it every decision from now on. Raises TypeError for an async one."""
        check_plain(observer, "an observer")
        self._observers.append(observer)

    def __call__(self, lease: Lease) -> None:
        """Show a decision to all of them; whoever fails harms neither the others nor the request."""
        for observer in self._observers:
            try:
                observer(lease)
            except Exception:
                logger.exception("%r failed to observe a decision", observer)
