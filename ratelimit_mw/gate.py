"""The short way of plain requests through the middleware, where it is compiled.

A request is plain that comes over HTTP, without a price, under limits that are counted in this process or one
Redis. Any other goes the long way, through Python alone.
"""

import logging
from typing import TYPE_CHECKING, Protocol

from starlette.types import Message, Scope, Send

from ratelimit_mw.backends.counts import SlotSet
from ratelimit_mw.backends.memory import MemoryBackend, wall_clock
from ratelimit_mw.backends.redis import RedisBackend
from ratelimit_mw.charge import NO_LEASE_ID, NOTHING_HELD, BackendError, Hold, Outcome
from ratelimit_mw.compiled import core
from ratelimit_mw.decision import Admission
from ratelimit_mw.lease import Lease
from ratelimit_mw.wire.refusals import Kept

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ratelimit_mw.middleware import RateLimitMiddleware


class Passage(Protocol):
    """A request that was let in, as the `send` of its app. `leave` has to follow, whatever becomes of it."""

    scope: Scope
    """Once it was let in: the scope for the app, with a state of its own that has the lease."""
    asked: "Awaitable[object] | None"
    """The answer of the backend, where its charge is on its way there; None where it was let in at once."""

    def answered(self, answer: object) -> "Lease | None":
        """What follows from the answer: the refused lease; None where the request was let in."""

    def unanswered(self, error: BackendError) -> "Lease | None":
        """The same where the backend didn't decide, for this reason."""

    def give_up(self) -> None:
        """The request was cancelled before its answer was read."""

    def __call__(self, message: Message) -> "Awaitable[None]":
        """As `send`, with the headers of the decision."""

    def leave(self) -> None:
        """The request is over: free its slots. Waits for nothing."""


class Gate(Protocol):
    """Lets plain requests in."""

    active: int
    """Requests that are inside the app."""

    def enter(self, scope: Scope, send: Send) -> Passage | tuple[Message, Message] | None:
        """A passage, or the two messages of a refusal that is repeated; None, and nothing done, where a
        request has to go the long way.
        """


def gate_of(middleware: "RateLimitMiddleware") -> Gate | None:
    """The gate of a middleware; None where nothing is compiled."""
    if core is None:
        return None
    backend = middleware.limiter.backend
    gate: Gate = core.Gate(
        middleware,
        {
            "lease": Lease,
            "admission": Admission,
            "outcome": Outcome,
            "hold": Hold,
            "nothing": NOTHING_HELD,
            "no_id": NO_LEASE_ID,
            # Of exactly these backends it knows the insides.
            "counts_here": type(backend) is MemoryBackend,
            "slot_set": SlotSet,
            "wall_clock": wall_clock,
            "kept": Kept,
            "is_logged": logging.getLogger("ratelimit_mw").isEnabledFor,
            "asks": type(backend) is RedisBackend,
        },
    )
    return gate
