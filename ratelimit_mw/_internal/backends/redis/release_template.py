"""Operations on what charges hold, prepared once for all reservations on the same slots and periods."""

import struct
from functools import lru_cache

from ratelimit_mw._internal.backends.redis.keys import KeyNames
from ratelimit_mw._internal.backends.redis.letters import BUDGET, FINISH
from ratelimit_mw._internal.backends.redis.operations import Template, bulk
from ratelimit_mw._internal.backends.redis.packing import (
    FINISH_HEAD,
    LIMIT,
    SETTLE_HEAD,
    SLOT,
    read_settlement,
)
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.reservation import LEASE_ID_SIZE, Reservation

_UNTOUCHED = EstimateAction.UNTOUCHED
_REMOVE = bulk(b"ZREM")
"""The command that frees slots of one set."""


class ReleaseTemplate(Template):
    """The release of slots, and the other operations on reservations that differ in their lease alone."""

    __slots__ = ("_ends", "_period_ends", "_period_keys", "_records")

    def __init__(self, names: KeyNames, reservation: Reservation) -> None:
        """Any of the reservations will do."""
        n_slots = len(reservation.slots)
        body, head = _end_of(n_slots, _UNTOUCHED, ())
        slot_keys = b"".join(map(bulk, names.of_slots(reservation)))
        Template.__init__(self, slot_keys, n_slots, body, LEASE_ID_SIZE, head=head)
        self.charges = ""
        if n_slots == 1:
            self.command = _REMOVE + slot_keys
        self._period_keys = self._records = b""
        self._period_ends: tuple[int, ...] = ()
        self._ends: dict[int, Template] | None = None
        if reservation.periods:
            self._period_keys = b"".join(map(bulk, names.of_periods(reservation)))
            self._records = names.record_argument(reservation.periods[0].partition)
            self._period_ends = tuple([held.ends for held in reservation.periods])
            self._ends = {}

    def end(self, action: EstimateAction) -> Template:
        """Free the slots and, unless it was settled, decide about the estimate."""
        if self._ends is None or action is _UNTOUCHED:
            return self
        template = self._ends.get(action)
        if template is None:
            body, head = _end_of(self.n_keys, action, self._period_ends)
            keys, n_keys = self.keys + self._period_keys, self.n_keys + len(self._period_ends) + 1
            template = Template(keys, n_keys, body, LEASE_ID_SIZE, head=head, record=self._records)
            self._ends[action] = template
        return template

    def settle(self, kind: bytes, amount: int, *, replace: bool) -> Template:
        """Settle at an amount, or hold the estimate, as `kind` says."""
        n_periods = len(self._period_ends)
        body = SETTLE_HEAD.pack(kind, amount, replace, n_periods)
        body += struct.pack(f"<{n_periods}d", *self._period_ends)
        template = Template(
            self._period_keys, n_periods + 1, body, LEASE_ID_SIZE, read_settlement, record=self._records
        )
        template.overwrites = replace
        return template


@lru_cache(maxsize=64)
def _end_of(n_slots: int, action: EstimateAction, period_ends: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The body of an end, up to the id; the same as an argument."""
    limits = SLOT * n_slots + b"".join([LIMIT.pack(BUDGET, 0, 0, ends) for ends in period_ends])
    body = FINISH_HEAD.pack(FINISH, n_slots + len(period_ends), action, 0, 0) + limits
    return body, Template(b"", 0, body, LEASE_ID_SIZE).head
