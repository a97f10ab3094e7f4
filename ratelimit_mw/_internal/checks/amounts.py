"""Checks of costs and prices that never fit into a limit: as many steps as there are limits and routes."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from ratelimit_mw._internal.checks.routes import rule_name
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.model.money import TOKEN, format_amount, parse_amount
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.errors import nearest_name
from ratelimit_mw._internal.settings.findings import Finding

NAMED = 5
"""Limits that are named for one route; of the others only their number is told."""
_REFUSED = "callers with this limit are always refused."


@dataclass(slots=True)
class _Limits:
    """Limits of one kind, the smallest first."""

    sizes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def below(self, need: int) -> Iterator[str]:
        """Name the limits that are smaller than what a request needs."""
        number = bisect_left(self.sizes, need)
        yield from self.texts[: min(number, NAMED)]
        if number > NAMED:
            yield f"{number - NAMED} other limits of plans and keys"


def cost_above_limit(settings: Settings) -> Iterator[Finding]:
    """Find routes whose cost is larger than a rate."""
    shared = [("application.requests", settings.application.requests)]
    shared += [("identity.per_address", settings.identity.per_address)]
    shared += [(f"plans.{name}", plan.requests) for name, plan in settings.plans.items()]
    shared += [(f"keys[{index}]", key.requests or ()) for index, key in enumerate(settings.keys)]
    shares = _shares(settings)
    shared += [
        (
            f"application.requests {text}",
            tuple([each.at_share(share) for each in settings.application.requests]),
        )
        for share, text in shares
    ]
    limits = _sorted((window.quota, _rate(window, owner)) for owner, rates in shared for window in rates)
    for index, route in enumerate(settings.routes):
        if route.exempt:
            continue
        own = [_rate(each, "its own requests") for each in route.requests if route.cost > each.quota]
        own += [_rate(each, "its total") for each in route.total if route.cost > each.quota]
        own += [
            _rate(each.at_share(share), f"its total {text}")
            for each in route.total
            for share, text in shares
            if each.at_share(share).quota < route.cost <= each.quota
        ]
        rule = rule_name(settings.routes, index)
        for text in (*own, *limits.below(route.cost)):
            said = f"{rule}: its cost of {route.cost} never fits into {text}: {_REFUSED}"
            yield Finding("cost-above-limit", said)


def estimate_above_limit(settings: Settings) -> Iterator[Finding]:
    """Find routes whose estimate of a unit is larger than a limit, or of a unit that nothing limits."""
    owners = [("application", settings.application.units)]
    owners += [
        (
            f"application {text}",
            {
                unit: tuple([each.at_share(share) for each in rates])
                for unit, rates in settings.application.units.items()
            },
        )
        for share, text in _shares(settings)
    ]
    owners += [(f"plans.{name}", plan.units) for name, plan in settings.plans.items()]
    owners += [(f"keys[{index}]", key.units or {}) for index, key in enumerate(settings.keys)]
    rates: dict[str, list[tuple[int, str]]] = {}
    for owner, units in owners:
        for unit, windows in units.items():
            rates.setdefault(unit, []).extend(
                [(window.quota, f"{window.name} of {owner}") for window in windows]
            )
    limits = {unit: _sorted(found) for unit, found in rates.items()}
    for index, route in enumerate(settings.routes):
        rule = rule_name(settings.routes, index)
        for unit, amount in route.units.items():
            if unit not in limits:
                nearest = nearest_name(unit, limits)
                hint = f" Did you mean {nearest}?" if nearest else ""
                text = (
                    f"its estimate of {unit} has no effect, since nothing in this file limits {unit}.{hint}"
                )
                yield Finding("estimate-without-limit", f"{rule}: {text}")
                continue
            for text in limits[unit].below(amount):
                said = f"{rule}: its estimate of {amount} {unit} never fits into {text}: {_REFUSED}"
                yield Finding("cost-above-limit", said)


def price_above_budget(settings: Settings) -> Iterator[Finding]:
    """Find routes whose price is larger than a budget."""
    spenders = [(f"plans.{name}", plan.spending) for name, plan in settings.plans.items()]
    spenders += [(f"keys[{index}]", key.spending) for index, key in enumerate(settings.keys)]
    found: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
    for owner, spending in spenders:
        for allowance in spending.budget.allowances if spending is not None else ():
            amount = f"{format_amount(allowance.amount, allowance.currency)} {allowance.currency}"
            text = f"the {allowance.period} {amount} of {owner}"
            found[allowance.currency == TOKEN].append((allowance.amount, text))
    money, tokens = _sorted(found[False]), _sorted(found[True])
    for index, route in enumerate(settings.routes):
        if route.price is None:
            continue
        texts = [*money.below(parse_amount(route.price, ""))] if money.sizes else []
        texts += tokens.below(parse_amount(route.price, TOKEN)) if tokens.sizes else []
        rule = rule_name(settings.routes, index)
        for text in texts:
            said = f"{rule}: its price of {route.price} never fits into {text}: {_REFUSED}"
            yield Finding("price-above-budget", said)


def _shares(settings: Settings) -> list[tuple[float, str]]:
    """Shares of shared limits that plans leave to others, each with the words that name it."""
    return [
        (plan.application_share, f"at plans.{name}.application_share")
        for name, plan in settings.plans.items()
        if plan.application_share < 1 and not plan.blocked
    ]


def _sorted(limits: "Iterator[tuple[int, str]] | list[tuple[int, str]]") -> _Limits:
    ordered = sorted(limits, key=lambda each: each[0])
    return _Limits([size for size, _ in ordered], [text for _, text in ordered])


def _rate(window: Window, owner: str) -> str:
    return f"{window.text} of {owner}"
