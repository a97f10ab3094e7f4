"""Limits in code as a request meets them: counted by which key, at which rates and cost."""

import logging
from collections.abc import Callable
from typing import Literal

from starlette.types import Scope

from ratelimit_mw._internal.asgi.hook_errors import ask
from ratelimit_mw._internal.live.rules import Rules
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.policy.by import HeaderValue, PathPart, Whose
from ratelimit_mw._internal.policy.code_limits import Limit, rates_of, text_of
from ratelimit_mw._internal.policy.extended import AskedLimit, CodeLimits, everyones_partition
from ratelimit_mw._internal.policy.identity import Identity, address_partition

logger = logging.getLogger("ratelimit_mw")


def differs(limit: Limit) -> bool:
    """Whether requests of one caller may differ in what a limit is for them."""
    if limit.by is not Whose.CALLER and limit.by is not Whose.EVERYONE:
        return True
    return callable(limit.cost) or limit.rates_for is not None or limit.when is not None


def asked_as(limit: Limit, code_limits: CodeLimits) -> AskedLimit | None:
    """Return a limit that is the same for all requests of a caller; None if it is switched off."""
    cost = 1 if callable(limit.cost) else limit.cost
    chosen = code_limits.choose(limit, None, cost)
    if chosen is None:
        return None
    if limit.by is Whose.EVERYONE:
        return AskedLimit(chosen, "everyone", everyones_partition(limit.name))
    return AskedLimit(chosen, "caller", "")


async def asked_by(
    limit: Limit,
    scope: Scope,
    identity: Identity,
    rules: Rules,
    read_path: Callable[[str], str | None],
) -> AskedLimit | None:
    """Return a limit as this request meets it; None where it doesn't apply to the request.

    Raises `HookError` for what a function of the app raises. One that returns what can't be a key, rates or
    a cost is told in the log, and the request is counted all the same: by its caller, at the limit's own
    rates, at a cost of 1.
    """
    if rules.code_limits.choose(limit) is None:
        return None
    if limit.when is not None and not await ask(limit.when, scope, identity):
        return None
    by: object = limit.by
    if isinstance(by, PathPart):
        key: object = read_path(by.name)
    elif isinstance(by, HeaderValue):
        key = _header(scope, by.name)
    else:
        key = await ask(by, scope, identity) if callable(by) else by
    if key is None:
        return None
    rates = None if limit.rates_for is None else _rates(limit, await ask(limit.rates_for, identity))
    cost = _cost(limit, await ask(limit.cost, scope, identity)) if callable(limit.cost) else limit.cost
    chosen = rules.code_limits.choose(limit, rates, cost)
    return None if chosen is None else AskedLimit(chosen, *_owner(limit, key, scope, rules))


def _owner(
    limit: Limit, key: object, scope: Scope, rules: Rules
) -> tuple[Literal["caller", "address", "key", "everyone"], str]:
    """Return the owner of the count that a key means, and its partition."""
    if key is Whose.ADDRESS:
        return "address", address_partition(rules.identify.address_of(scope))
    if key is Whose.EVERYONE:
        return "everyone", everyones_partition(limit.name)
    if key is not Whose.CALLER:
        try:
            return "key", rules.code_limits.partition_of(text_of(key))
        except TypeError as error:
            logger.warning(
                "%s: by= returned something that is not a key (%s); the request is counted for its caller",
                limit.name,
                error,
            )
    return "caller", ""


def _cost(limit: Limit, cost: object) -> int:
    """Return the cost that a function returned; 1 in place of anything else."""
    try:
        return limit.check_cost(cost)
    except ValueError as error:
        logger.warning("%s; the request costs 1", error)
        return 1


def _rates(limit: Limit, rates: object) -> tuple[Window, ...] | None:
    """Return the rates that a function returned; None for the limit's own."""
    try:
        return None if rates is None else rates_of(rates, limit.unit, limit.name)
    except ValueError as error:
        logger.warning(
            "rates_for= returned something that is not rates (%s); the limit's own rates apply", error
        )
        return None


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.encode("latin-1", "replace")
    return next((value.decode("latin-1") for header, value in scope["headers"] if header == wanted), None)
