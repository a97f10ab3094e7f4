"""Metered units in the settings: rates of tokens, images and the like, and what a route is thought to use."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from ratelimit_mw._internal.model.limits import REQUESTS, Window
from ratelimit_mw._internal.model.metered import MAX_AMOUNT
from ratelimit_mw._internal.settings.errors import fault, shown
from ratelimit_mw._internal.settings.limits import MAX_RATES, Rates
from ratelimit_mw._internal.settings.values import text

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


def _unit_name(unit: str) -> str:
    if unit == REQUESTS:
        raise fault(
            "'requests' can't be the name of a metered unit",
            "another name; rates of requests belong under `requests`",
        )
    if not _NAME.fullmatch(unit):
        expected = "a small letter, and then up to 31 small letters, digits and hyphens"
        raise fault(f"{shown(unit)} is not the name of a unit", expected)
    return unit


def _some_rates(rates: tuple[Window, ...]) -> tuple[Window, ...]:
    if not rates:
        raise fault("limits nothing", "at least one rate")
    return rates


def _counting_units(units: dict[str, tuple[Window, ...]]) -> dict[str, tuple[Window, ...]]:
    number = sum(map(len, units.values()))
    if number > MAX_RATES:
        raise fault(f"has {number} rates", f"at most {MAX_RATES}")
    return {unit: counting(unit, windows) for unit, windows in units.items()}


def counting(unit: str, windows: tuple[Window, ...]) -> tuple[Window, ...]:
    """Return windows of the same rates that count a unit."""
    return tuple([Window(each.quota, each.multiple, each.unit, unit) for each in windows])


UnitName = Annotated[str, AfterValidator(_unit_name), text("name", f"^{_NAME.pattern}$")]
UnitRates = Annotated[
    dict[UnitName, Annotated[Rates, AfterValidator(_some_rates)]], AfterValidator(_counting_units)
]
Estimates = Annotated[dict[UnitName, Annotated[int, Field(ge=0, le=MAX_AMOUNT)]], Field(max_length=MAX_RATES)]
