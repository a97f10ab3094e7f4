"""Types of the hooks by which an app says who calls, what a request costs, and what it will use."""

from collections.abc import Awaitable, Callable
from decimal import Decimal

from starlette.types import Scope

from ratelimit_mw._internal.model.metered import Units
from ratelimit_mw._internal.policy.identity import Identity

Identify = Callable[[Scope], Identity | Awaitable[Identity | None] | None]
"""A hook that says who is calling; None: whoever the request's headers say, as without the hook."""
Price = Callable[[Scope, Identity], "Amount | Awaitable[Amount | None] | None"]
"""A hook that estimates what a request will cost, in the caller's currency; None: what the route says."""
Estimate = Callable[[Scope, Identity], Units | Awaitable[Units | None] | None]
"""A hook that estimates what a request will use of metered units; None: what the route says."""
Amount = str | int | Decimal
