"""The dashboard: one page that shows, live and for the whole fleet, who is limited and why.

Served by the middleware under `operations.dashboard_path`, to whoever has `operations.dashboard_token`.

- `app.py`: `Dashboard`, which answers each path. `access.py`: who may look, and who may change.
- `stream.py`: the live figures. `callers.py`: one caller. `exports.py`: CSV and JSON.
- `answers.py`, `compression.py`: parts of responses. `static/`: the page.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratelimit_mw._internal.dashboard.app import Dashboard
    from ratelimit_mw._internal.limiter.limiter import Limiter


def is_below(path: str, dashboard_path: str) -> bool:
    """Whether a path is the dashboard's or lies under it."""
    return path.startswith(dashboard_path) and path[len(dashboard_path) :][:1] in ("", "/")


def open_dashboard(limiter: "Limiter") -> "Dashboard":
    """Make the dashboard of an app. It is imported for those that have one."""
    from ratelimit_mw._internal.dashboard.app import Dashboard  # noqa: PLC0415

    return Dashboard(limiter)
