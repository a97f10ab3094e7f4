"""Money as whole micro-units: decimal text in, integers inside, decimal text out; never a float.

A budget counts micro-units of its currency, so 1 USD is 1,000,000. The currency `token` (what LLM
APIs meter) counts whole tokens.
"""

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation, Rounded
from functools import lru_cache

TOKEN = "token"
"""The currency whose amounts are whole numbers of tokens."""

MAX_UNITS = 10**15
"""The largest amount: a billion of a currency. Sums of two stay below 2^53, where Lua's numbers are exact."""

_PLAIN_TEXT = re.compile(r"[0-9]+(\.[0-9]+)?")
_MAX_TEXT = 100
_MAX_DIGITS = len(str(MAX_UNITS))
_EXACTLY = Context(prec=_MAX_TEXT, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[Rounded])
"""Arithmetic that loses no digit, or raises `Rounded`."""
_NO_AMOUNT = 'an amount is a decimal number of 0 or more, such as "25.00"'


class AmountTooLargeError(ValueError):
    """An amount above `MAX_UNITS`."""


def parse_estimate(amount: str | int | Decimal, currency: str) -> int:
    """Return an estimate in units of `currency`, rounded up; one above `MAX_UNITS` as more than any budget.

    Raises `ValueError` for what is not an amount.
    """
    try:
        return parse_amount(amount, currency, round_up=True)
    except AmountTooLargeError:
        return MAX_UNITS + 1


def parse_amount(amount: str | int | Decimal, currency: str, *, round_up: bool = False) -> int:
    """Return `amount` in micro-units of `currency`, or in whole tokens where that is `token`.

    A text may have any form that `Decimal` reads, such as "25.00" or "1E-7", so that `str(amount)` means
    what `amount` does. An amount finer than one unit is an error, or with `round_up` (for settled amounts,
    which exist whatever their digits) the next whole unit. Raises `ValueError` with a sentence for everything
    that is not such an amount: NaN, negative, malformed, larger than `MAX_UNITS`, a float.
    """
    if type(amount) is str:
        return _of_text(amount, currency, round_up)
    return _units(_exact(amount), currency, round_up)


@lru_cache(maxsize=1024)
def _of_text(text: str, currency: str, round_up: bool) -> int:
    """Return the units that a text names. It is kept, since the prices of a service are few."""
    return _units(_exact(text), currency, round_up)


def _units(exact: Decimal, currency: str, round_up: bool) -> int:
    if not exact:
        return 0  # whatever its power of ten
    decimals = _decimals(currency)
    if exact.adjusted() + decimals >= _MAX_DIGITS:  # before its power of ten is worked out
        raise AmountTooLargeError(_too_large(currency))
    try:
        scaled = exact.scaleb(decimals, _EXACTLY)
    except Rounded:
        raise ValueError(f"an amount has at most {_MAX_TEXT} digits") from None
    units = int(scaled)
    if units != scaled:
        if not round_up:
            raise ValueError(_too_fine(currency))
        units += 1
    if units > MAX_UNITS:
        raise AmountTooLargeError(_too_large(currency))
    return units


def format_amount(units: int, currency: str) -> str:
    """Return `units` as decimal text: `25.00`, `0.031`, `0.000001`; tokens as `1500`.

    At least two decimals, more only as needed; a currency's name is not part of the text.
    """
    if currency == TOKEN:
        return str(units)
    sign, whole, micros = "-" if units < 0 else "", *divmod(abs(units), 10**6)
    return f"{sign}{whole}.{f'{micros:06d}'.rstrip('0'):0<2}"


def plain_text(amount: str | int | Decimal, currency: str) -> str:
    """Return `amount` as it was written if that is plain digits such as "25" or "25.00", else as
    `format_amount` writes it. Raises `ValueError` as `parse_amount`.
    """
    units = parse_amount(amount, currency)
    if isinstance(amount, str) and _PLAIN_TEXT.fullmatch(amount):
        return amount
    return format_amount(units, currency)


def _exact(amount: object) -> Decimal:
    """Return an amount as the finite number of 0 or more that it is; one above `MAX_UNITS` may be another."""
    if isinstance(amount, str):
        return _decimal(amount)
    if isinstance(amount, bool) or not isinstance(amount, int | Decimal):
        raise ValueError(f"an amount is a decimal string, an int or a Decimal, not {type(amount).__name__}")
    if isinstance(amount, Decimal) and not amount.is_finite():
        raise ValueError("an amount is a finite number")
    if amount < 0:
        raise ValueError("an amount is not negative")
    return Decimal(min(amount, MAX_UNITS + 1)) if isinstance(amount, int) else amount


def _decimal(text: str) -> Decimal:
    if len(text) > _MAX_TEXT:
        raise ValueError(f"an amount has at most {_MAX_TEXT} characters")
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise ValueError(_NO_AMOUNT) from None
    if not amount.is_finite() or amount < 0:
        raise ValueError(_NO_AMOUNT)
    return amount


def _decimals(currency: str) -> int:
    return 0 if currency == TOKEN else 6


def _too_fine(currency: str) -> str:
    if currency == TOKEN:
        return "an amount of tokens is a whole number"
    return "an amount has at most six decimals"


def _too_large(currency: str) -> str:
    return f"an amount is at most {format_amount(MAX_UNITS, currency)}"
