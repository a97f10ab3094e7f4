"""Server-side rate limiting for ASGI apps: exact request windows, concurrency slots and budgets.

Users import from here, and from `ratelimit_mw.openapi`, `otel`, `prometheus` and `testing` beside it. The
modules below `ratelimit_mw._internal` are private and change without notice.
"""

from ratelimit_mw._internal.runtime.compiled import obey_environment

obey_environment()  # before any other module is imported

from ratelimit_mw._internal.asgi.hooks import Estimate, Identify, Price
from ratelimit_mw._internal.asgi.marks import limited
from ratelimit_mw._internal.asgi.middleware import RateLimitMiddleware
from ratelimit_mw._internal.asgi.raised_refusals import RefusalHook
from ratelimit_mw._internal.asgi.request_lease import get_lease
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.token import LeaseError
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.limiter.observers import DecisionMade, OnDecision
from ratelimit_mw._internal.live.resolve import Resolve
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.observe.events import BudgetWarning, Event, OnEvent, SettleIgnored, SlotLost
from ratelimit_mw._internal.policy import by
from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit
from ratelimit_mw._internal.policy.decision import Decision, LimitStatus, Refusal
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.policy.rate_limited import RateLimited
from ratelimit_mw._internal.runtime.version import __version__
from ratelimit_mw._internal.settings import Settings, SettingsError

__all__ = [
    "BackendError",
    "BudgetWarning",
    "Decision",
    "DecisionMade",
    "Estimate",
    "Event",
    "Identify",
    "Identity",
    "KeyEntry",
    "KeyedLimit",
    "Lease",
    "LeaseError",
    "Limit",
    "LimitStatus",
    "Limiter",
    "OnDecision",
    "OnEvent",
    "Price",
    "RateLimitMiddleware",
    "RateLimited",
    "Refusal",
    "RefusalHook",
    "Resolve",
    "Settings",
    "SettingsError",
    "SettleIgnored",
    "SlotLost",
    "__version__",
    "by",
    "get_lease",
    "hash_api_key",
    "limited",
]
