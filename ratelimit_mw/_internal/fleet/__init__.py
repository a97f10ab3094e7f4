"""The figures of the whole fleet, as its workers report them: for the dashboard and `ratelimit-mw top`.

- `view.py`: `FleetView`, which reads what the workers have stored (`observe/reporting.py` stores it).
- `snapshot.py`: the figures as plain values. `reading.py`: reports, read with care. `day.py`: the last day.
- `series.py`: points of the charts, and gaps. `route_figures.py`: figures by rule and by the app's route.
- `limit_figures.py`: how limits of callers stand. `caller_lookup.py`: who a caller is.
- `headline.py`: the one sentence for the person on call. `habits.py`: what was usual before.
"""

from ratelimit_mw._internal.fleet.snapshot import CallerDetail, Snapshot
from ratelimit_mw._internal.fleet.view import FleetView

__all__ = ["CallerDetail", "FleetView", "Snapshot"]
