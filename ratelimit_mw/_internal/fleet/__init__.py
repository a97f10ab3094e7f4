"""The figures of the whole fleet, as its workers report them: for the dashboard and `ratelimit-mw top`."""

from ratelimit_mw._internal.fleet.snapshot import CallerDetail, Snapshot
from ratelimit_mw._internal.fleet.view import FleetView

__all__ = ["CallerDetail", "FleetView", "Snapshot"]
