"""What a limiter has done and what it waits for, in one process."""

from collections.abc import Mapping
from dataclasses import dataclass

from ratelimit_mw.charge import Load


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one moment, since the limiter was made."""

    backend_up: bool
    load: Load
    decisions: Mapping[tuple[str, str], int]
    """By plan and outcome: `admitted`, `shadow` (would have been refused), or the reason of a refusal."""
    decisions_without_backend: Mapping[str, int]
    """By what the settings say: `local`, `allow`, `deny`."""
    leases: int
    """Leases that are being renewed."""
    slots_lost: int
    settles_ignored: int
    untold: int
    """Holds and counters of an outage that the backend has still to be told."""
    untold_lost: int
    version: str
    """Short name of the settings in force."""
