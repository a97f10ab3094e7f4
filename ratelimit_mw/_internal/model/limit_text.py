"""Limits and amounts in words, the same wherever a person reads them."""

from ratelimit_mw._internal.model.limits import Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.money import TOKEN, format_amount


def amount_text(units: int, currency: str) -> str:
    """An amount with its currency, such as `25.00 USD` or `1500 tokens`."""
    return f"{format_amount(units, currency)} {'tokens' if currency == TOKEN else currency}"


def limit_text(limit: Limit) -> str:
    """A limit in a few words: `60/minute`, `1000 tokens/minute`, `5 requests at once`, `25.00 USD a day`."""
    if isinstance(limit, Window):
        return limit.name
    if isinstance(limit, Slots):
        return f"{limit.limit} {limit.unit}{'' if limit.limit == 1 else 's'} at once"
    return f"{amount_text(limit.amount, limit.currency)} a {_period(limit)}"


def _period(limit: Allowance) -> str:
    return "day" if limit.period == "daily" else "month"
