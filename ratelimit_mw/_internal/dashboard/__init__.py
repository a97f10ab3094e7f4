"""The dashboard: one page that shows, live and for the whole fleet, who is limited and why.

Served by the middleware under `operations.dashboard_path`, to whoever has `operations.dashboard_token`.
"""

from ratelimit_mw._internal.dashboard.app import Dashboard, is_below

__all__ = ["Dashboard", "is_below"]
