"""Money is exact: what `parse_amount` reads is what `format_amount` writes, and nothing else is money."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_mw.money import MAX_UNITS, format_amount, parse_amount


@pytest.mark.parametrize(
    ("amount", "currency", "units"),
    [
        ("25.00", "USD", 25_000_000),
        ("0.031", "USD", 31_000),
        ("0.000001", "EUR", 1),
        ("0", "USD", 0),
        ("007.50", "USD", 7_500_000),
        ("1.0000000000", "USD", 1_000_000),
        ("1000000000", "USD", MAX_UNITS),
        (3, "USD", 3_000_000),
        (Decimal("0.10"), "USD", 100_000),
        (Decimal("1E+3"), "USD", 1_000_000_000),
        ("1500", "token", 1500),
        ("1500.000", "token", 1500),
        (1500, "token", 1500),
    ],
)
def test_an_amount_is_counted_in_units(amount: str | int | Decimal, currency: str, units: int) -> None:
    """A currency is counted in micro-units, tokens are counted whole."""
    assert parse_amount(amount, currency) == units


@pytest.mark.parametrize(
    ("amount", "currency", "message"),
    [
        ("NaN", "USD", "decimal number of 0 or more"),
        ("inf", "USD", "decimal number of 0 or more"),
        ("-5", "USD", "decimal number of 0 or more"),
        ("+5", "USD", "decimal number of 0 or more"),
        ("1e3", "USD", "decimal number of 0 or more"),
        ("1_000", "USD", "decimal number of 0 or more"),
        (" 5", "USD", "decimal number of 0 or more"),
        ("5\n", "USD", "decimal number of 0 or more"),
        (".5", "USD", "decimal number of 0 or more"),
        ("5,00", "USD", "decimal number of 0 or more"),
        ("\u0665", "USD", "decimal number of 0 or more"),
        ("", "USD", "decimal number of 0 or more"),
        ("123456789012345678901234567890", "USD", "at most 1000000000.00"),
        ("1000000000.000001", "USD", "at most 1000000000.00"),
        (10**16, "token", "at most 1000000000000000"),
        pytest.param(10**5000, "USD", "at most 1000000000.00", id="5000 digits"),
        ("9" * 101, "USD", "at most 100 characters"),
        (Decimal("1E+999999"), "USD", "at most 1000000000.00"),
        (Decimal("1E-999999"), "USD", "at most six decimals"),
        (Decimal(10) ** 27 + Decimal(1) / 7, "USD", "at most 1000000000.00"),
        (Decimal(f"0.{'1' * 101}"), "USD", "at most 100 digits"),
        (Decimal("NaN"), "USD", "finite"),
        (Decimal("sNaN"), "USD", "finite"),
        (Decimal("-Infinity"), "USD", "finite"),
        (Decimal(-1), "USD", "not negative"),
        (-1, "USD", "not negative"),
        ("0.0000001", "USD", "at most six decimals"),
        ("0.5", "token", "whole number"),
    ],
)
def test_what_is_no_amount_is_refused(amount: str | int | Decimal, currency: str, message: str) -> None:
    """A negative, malformed, endless, too large or too fine amount is an error with a clear sentence."""
    with pytest.raises(ValueError, match=message):
        parse_amount(amount, currency)


@pytest.mark.parametrize("amount", [0.1, True, None, b"5"])
def test_only_exact_types_are_amounts(amount: object) -> None:
    """A float is never money, and neither is a boolean, nothing or bytes."""
    with pytest.raises(ValueError, match="decimal string, an int or a Decimal"):
        parse_amount(amount, "USD")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "currency", "units"),
    [
        ("0.00000045", "USD", 1),
        ("0.0000011", "USD", 2),
        ("0.000001", "USD", 1),
        ("0.0", "USD", 0),
        (Decimal("1E-999999"), "USD", 1),
        (Decimal("0E-999999"), "USD", 0),
        ("1.2", "token", 2),
    ],
)
def test_settled_amounts_are_rounded_up(amount: str | Decimal, currency: str, units: int) -> None:
    """A price finer than a unit is charged as the next whole unit, so that no work is free."""
    assert parse_amount(amount, currency, round_up=True) == units


@pytest.mark.parametrize(
    ("units", "currency", "text"),
    [
        (25_000_000, "USD", "25.00"),
        (31_000, "USD", "0.031"),
        (1, "USD", "0.000001"),
        (0, "USD", "0.00"),
        (1_500_000, "USD", "1.50"),
        (-250_000, "USD", "-0.25"),
        (1500, "token", "1500"),
        (0, "token", "0"),
    ],
)
def test_an_amount_is_written_with_two_decimals_or_more(units: int, currency: str, text: str) -> None:
    """Money has at least two decimals and no needless ones; tokens have none."""
    assert format_amount(units, currency) == text


@given(units=st.integers(0, MAX_UNITS), currency=st.sampled_from(["USD", "token"]))
def test_what_is_written_reads_back(units: int, currency: str) -> None:
    """Writing and reading an amount changes nothing, to the last unit."""
    assert parse_amount(format_amount(units, currency), currency) == units


@given(st.decimals(min_value=0, max_value=10**9, allow_nan=False, allow_infinity=False))
def test_rounding_up_adds_less_than_a_unit(amount: Decimal) -> None:
    """A rounded amount is never below the given one, and less than one micro-unit above it."""
    rounded = Fraction(parse_amount(amount, "USD", round_up=True), 10**6)  # Decimal has but 28 digits
    assert 0 <= rounded - Fraction(amount) < Fraction(1, 10**6)
