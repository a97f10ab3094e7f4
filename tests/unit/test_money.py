"""Money is exact: what `parse_amount` reads is what `format_amount` writes, and nothing else is money."""

import time
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ratelimit_mw._internal.live.key_entries import key_settings, write_entry
from ratelimit_mw._internal.model.money import MAX_UNITS, format_amount, parse_amount, parse_estimate
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings import (
    PlanSettings,
    RouteSettings,
    Settings,
    SettingsError,
    SpendingSettings,
)


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
        ("-0.000001", "USD", "decimal number of 0 or more"),
        ("sNaN", "USD", "decimal number of 0 or more"),
        ("-Infinity", "USD", "decimal number of 0 or more"),
        ("1e", "USD", "decimal number of 0 or more"),
        ("0x5", "USD", "decimal number of 0 or more"),
        ("5 0", "USD", "decimal number of 0 or more"),
        ("5,00", "USD", "decimal number of 0 or more"),
        ("1E+999999999999999999999999", "USD", "decimal number of 0 or more"),
        ("1E+30000000", "USD", "at most 1000000000.00"),
        ("1E-7", "USD", "at most six decimals"),
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


@pytest.mark.parametrize(
    "text", ["5", "+5", "5.", ".5", "1e3", "1E-6", "0E-999999", "1_000", " 5", "5\n", "\u0665", "-0"]
)
def test_a_text_means_what_decimal_makes_of_it(text: str) -> None:
    """A text is the amount that `Decimal` reads in it: `settle(str(cost))` is `settle(cost)`."""
    assert parse_amount(text, "USD") == int(Decimal(text) * 10**6)


@given(st.decimals(min_value=0, max_value=10**9, allow_nan=False, allow_infinity=False))
def test_an_amount_and_its_text_are_the_same(amount: Decimal) -> None:
    """`str` of an amount is settled as the amount itself."""
    assert parse_amount(str(amount), "USD", round_up=True) == parse_amount(amount, "USD", round_up=True)


HUGE_EXPONENTS = ["0E+30000000", "1E+30000000", "1E-30000000", "0E-30000000", "0E+999999999999999999"]


@pytest.mark.parametrize("text", HUGE_EXPONENTS)
@pytest.mark.parametrize("kind", [str, Decimal])
def test_no_exponent_holds_the_interpreter(text: str, kind: type[str] | type[Decimal]) -> None:
    """An amount is read in a bounded time, in every place that takes one."""
    began = time.process_time()
    amount = kind(text)
    with suppress(ValueError):
        parse_amount(amount, "USD", round_up=True)
    with suppress(ValidationError):
        SpendingSettings.model_validate({"daily": amount})
    with suppress(SettingsError):
        Settings(routes=[{"path": "/", "price": amount}])  # type: ignore[arg-type]
    with suppress(SettingsError):
        key_settings(KeyEntry("default", daily=amount), f"sha256:{'0' * 64}", Settings())
    assert len(write_entry(KeyEntry("default", daily=amount))) < 200
    assert time.process_time() - began < 5


@pytest.mark.parametrize("amount", ["25", "25.00", "2.5E+1", "+25", Decimal(25), Decimal("2.5E+1")])
def test_settings_take_every_form_of_an_amount(amount: Any) -> None:
    """A budget, a price and an amount set live mean the same in every form, and are shown as plain digits."""
    settings = Settings(
        plans={"default": PlanSettings(spending=SpendingSettings(daily=amount))},
        routes=(RouteSettings(path="/", price=amount),),
    )
    spending = settings.plans["default"].spending
    assert spending is not None
    assert spending.budget.daily == 25_000_000
    assert spending.daily in {"25", "25.00"}
    assert str(settings.routes[0].price) in {"25", "25.00"}
    live = key_settings(KeyEntry("default", monthly=amount), f"sha256:{'0' * 64}", settings).spending
    assert live is not None
    assert live.budget.monthly == 25_000_000
    assert live.monthly in {"25", "25.00"}


def test_a_live_key_takes_a_whole_amount() -> None:
    """Code may give the amount of a live key as an int, as it may that of a price; a float is none."""
    live = key_settings(KeyEntry("default", daily=25), f"sha256:{'0' * 64}", Settings()).spending
    assert live is not None
    assert live.budget.daily == 25_000_000


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
        ("1E-7", "USD", 1),
        ("1.00E-6", "USD", 1),
        (Decimal("1E-999999"), "USD", 1),
        (Decimal("0E-999999"), "USD", 0),
        ("1.2", "token", 2),
    ],
)
def test_settled_amounts_are_rounded_up(amount: str | Decimal, currency: str, units: int) -> None:
    """A price finer than a unit is charged as the next whole unit, so that no work is free."""
    assert parse_amount(amount, currency, round_up=True) == units


@pytest.mark.parametrize(
    ("estimate", "currency", "units"),
    [
        ("0.031", "USD", 31_000),
        ("0.00000045", "USD", 1),
        (Decimal("1.5"), "token", 2),
        ("1000000000", "USD", MAX_UNITS),
        ("1000000000.0000001", "USD", MAX_UNITS + 1),
        (10**400, "USD", MAX_UNITS + 1),
    ],
)
def test_an_estimate_is_rounded_up_and_may_be_beyond_any_budget(
    estimate: str | int | Decimal, currency: str, units: int
) -> None:
    """A price that can't ever fit is not an error of the app's: it is more than any budget, and refused."""
    assert parse_estimate(estimate, currency) == units


@pytest.mark.parametrize("estimate", ["NaN", "-1", "", 0.1])
def test_an_estimate_that_is_no_amount_is_an_error(estimate: Any) -> None:
    """Only the size of an estimate is forgiven."""
    with pytest.raises(ValueError, match="amount"):
        parse_estimate(estimate, "USD")


@pytest.mark.parametrize(
    ("units", "currency", "text"),
    [
        (25_000_000, "USD", "25.00"),
        (31_000, "USD", "0.031"),
        (1, "USD", "0.000001"),
        (0, "USD", "0.00"),
        (1_500_000, "USD", "1.50"),
        (-250_000, "USD", "-0.25"),
        (-1, "USD", "-0.000001"),
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
