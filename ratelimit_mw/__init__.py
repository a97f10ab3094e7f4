"""Server-side rate limiting for ASGI apps: exact request windows, concurrency slots and budgets."""

from ratelimit_mw._internal.runtime.compiled import obey_environment

obey_environment()  # before any other module is imported

from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware
from ratelimit_mw._internal.lease.lease import Lease, LeaseError
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.live.key_entries import KeyEntry
from ratelimit_mw._internal.model.charge import BackendError
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.settings import Settings, SettingsError

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
