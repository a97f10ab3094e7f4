"""The app's hooks that estimate what a request will cost, and what it will use of metered units."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Scope

from ratelimit_mw._internal.asgi.hook_errors import HookError, awaited, may_be_awaitable
from ratelimit_mw._internal.asgi.hooks import Estimate, Price
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.model.metered import Units, check_amounts
from ratelimit_mw._internal.model.money import parse_estimate
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policy

logger = logging.getLogger("ratelimit_mw")

Estimates = tuple[int | None, Units | None]
"""A price in units of the caller's currency, and amounts of metered units; None: the route's counts."""


class EstimateHooks:
    """The `price=` and the `estimate=` hook of an app; None for a hook that it does not have.

    Both are told the caller's identity, since several callers may share a policy: the keys of one account,
    and the unknown keys of one address.
    """

    def __init__(
        self, price: Price | None, estimate: Estimate | None, limiter: Callable[[], Limiter]
    ) -> None:
        """The `limiter` in use warns of units that no limit of a request counts."""
        self._price = price
        self._estimate = estimate
        self._limiter = limiter

    def ask(
        self, scope: Scope, policy: Policy, identity: Identity
    ) -> Estimates | Coroutine[Any, Any, Estimates]:
        """Ask for the estimates of a request: the answer, or what to await where a hook is a coroutine.

        An answer that is not an estimate is logged, and the route's counts. Raises `HookError` for what a
        hook raises.
        """
        price = self._ask_price(scope, policy, identity)
        if may_be_awaitable(price):
            return self._await_price(price, scope, policy, identity)
        units = self._ask_units(scope, policy, identity)
        if may_be_awaitable(units):
            return self._await_units(price, units, policy)
        return _price_of(price, policy), self._units_of(units, policy)

    def _ask_price(self, scope: Scope, policy: Policy, identity: Identity) -> Any:
        """Call the `price=` hook where the request has a budget to charge; else None."""
        if self._price is None or policy.currency is None or policy.is_decided:
            return None
        try:
            return self._price(scope, identity)
        except Exception as error:
            raise HookError(error) from error

    def _ask_units(self, scope: Scope, policy: Policy, identity: Identity) -> Any:
        """Call the `estimate=` hook where the request has metered limits; else None."""
        if self._estimate is None or policy.is_decided or not policy.charge.meters:
            return None
        try:
            return self._estimate(scope, identity)
        except Exception as error:
            raise HookError(error) from error

    async def _await_price(self, price: Any, scope: Scope, policy: Policy, identity: Identity) -> Estimates:
        answer = await awaited(price)
        units = await awaited(self._ask_units(scope, policy, identity))
        return _price_of(answer, policy), self._units_of(units, policy)

    async def _await_units(self, price: Any, units: Any, policy: Policy) -> Estimates:
        return _price_of(price, policy), self._units_of(await awaited(units), policy)

    def _units_of(self, answer: Any, policy: Policy) -> Units | None:
        """The amounts of metered units that a hook answered."""
        if answer is None:
            return None
        try:
            units = check_amounts(answer)
        except ValueError as error:
            logger.warning(
                "estimate= returned something that is not an estimate (%s); the route's estimate is charged",
                error,
            )
            return None
        for unit in units:
            if not policy.charge.counts(unit):
                self._limiter().engine.leases.settling.on_uncounted(unit, "estimate")
        return units


def _price_of(answer: Any, policy: Policy) -> int | None:
    """The price that a hook answered, in units of the caller's currency."""
    if answer is None or policy.currency is None:
        return None
    try:
        return parse_estimate(answer, policy.currency)
    except ValueError as error:
        logger.warning(
            "price= returned something that is not an amount (%s); the route's price is charged", error
        )
        return None
