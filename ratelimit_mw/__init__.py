"""Server-side rate limiting for ASGI apps: exact request windows, concurrency slots and budgets."""

from ratelimit_mw.compiled import obey_environment

obey_environment()  # before any other module is imported

from ratelimit_mw.charge import BackendError
from ratelimit_mw.decision import Decision
from ratelimit_mw.identity import Identity
from ratelimit_mw.lease import Lease, LeaseError
from ratelimit_mw.limiter import Limiter
from ratelimit_mw.live.key_entries import KeyEntry
from ratelimit_mw.middleware import RateLimitMiddleware
from ratelimit_mw.settings import Settings, SettingsError

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Decision",
    "Identity",
    "KeyEntry",
    "Lease",
    "LeaseError",
    "Limiter",
    "RateLimitMiddleware",
    "Settings",
    "SettingsError",
]
