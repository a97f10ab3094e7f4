"""The short way of plain requests through a limiter: which of its parts the compiled module works with."""

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol

from ratelimit_mw.backends.counts import SlotSet
from ratelimit_mw.backends.memory import MemoryBackend, Places
from ratelimit_mw.backends.redis import Packed, RedisBackend
from ratelimit_mw.charge import NO_LEASE_ID, NOTHING_HELD, BackendError, Hold, Outcome, new_lease_id
from ratelimit_mw.compiled import core
from ratelimit_mw.decision import Admission
from ratelimit_mw.lease import Lease
from ratelimit_mw.policy import Policy

if TYPE_CHECKING:
    from ratelimit_mw.limiter import Limiter


class Desk(Protocol):
    """Decides about requests without a price, and ends them, in fewer steps than the limiter behind it."""

    is_observed: bool
    """Whether somebody wants to be shown every decision."""

    def admit(self, policy: Policy, loop: asyncio.AbstractEventLoop) -> Lease | None:
        """The lease of a request that can be admitted at once; None, and nothing done, for any other."""

    def charge(self, policy: Policy, loop: asyncio.AbstractEventLoop) -> Awaitable[Lease]:
        """As `Limiter.charge`."""

    def end(self, lease: Lease, failed: bool, loop: asyncio.AbstractEventLoop) -> bool:
        """End a lease as `Limiter.end` does; false, and nothing done, where that has to."""


def desk_of(limiter: "Limiter") -> Desk | None:
    """A desk in front of a limiter; None where nothing is compiled."""
    if core is None:
        return None
    desk: Desk = core.Desk(
        limiter,
        {
            "lease": Lease,
            "admission": Admission,
            "outcome": Outcome,
            "hold": Hold,
            "nothing": NOTHING_HELD,
            "no_id": NO_LEASE_ID,
            "new_id": new_lease_id,
            "error": BackendError,
            "cancelled": asyncio.CancelledError,
            # Of exactly these backends it knows the insides.
            "counts_here": type(limiter.backend) is MemoryBackend,
            "places": Places,
            "slot_set": SlotSet,
            "asks": type(limiter.backend) is RedisBackend,
            "packed": Packed,
        },
    )
    return desk
