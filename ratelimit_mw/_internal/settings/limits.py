"""The limits in the settings: rates, slots and amounts, as the file writes them and as values."""

import re
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)

from ratelimit_mw._internal.model.limits import UNIT_SECONDS, Slots, Window
from ratelimit_mw._internal.model.money import parse_amount, plain_text
from ratelimit_mw._internal.settings.errors import fault, faults, nearest_name, shown, type_name
from ratelimit_mw._internal.settings.values import Items, Label, Table, any_case, read_by, text

MAX_QUOTA = 10**9
"""The largest quota and cost: what the backends count exactly, with room to spare."""
MAX_RATES = 32
"""The most rates of one list: a request may meet five lists, and the script takes 255 limits."""
MAX_SLOTS = 10**6
"""The most slots that one limit may have."""
MAX_SECONDS = 10 * UNIT_SECONDS["year"]
"""Seconds of the longest window, `lease` and `max_hold`."""

RATE = "rate"
"""Title of a rate in the JSON schema and in the reference."""

MAX_RATE = 100
"""Characters of the longest rate: a pattern takes up to the square of its blanks in steps."""

_LEASE = 30.0
_RATE = 'one rate, such as "60/minute", "1000 per hour" or "5/2 seconds"'
_ABBREVIATIONS = {
    short: unit
    for unit, names in {
        "second": ("s", "sec", "secs"),
        "minute": ("m", "min", "mins"),
        "hour": ("h", "hr", "hrs"),
        "day": ("d",),
        "month": ("mo", "mon"),
        "year": ("y", "yr", "yrs"),
    }.items()
    for short in names
}
_RATE_PARTS = re.compile(
    r"\s*(?P<quota>[0-9]+)\s*(?:/|per)\s*(?P<multiple>[0-9]*)\s*(?P<unit>[a-z]+)\s*", re.IGNORECASE
)
_SEPARATORS = re.compile(":?[,;|]")


def parse_rate(rate: object) -> Window:
    """Return the window that one rate stands for: a count, "/" or "per", perhaps a multiple, and a unit."""
    if isinstance(rate, Window):
        return _window(rate.text, rate)
    if not isinstance(rate, str):
        raise fault(f"is {type_name(rate)}", _RATE)
    if len(rate) > MAX_RATE:
        raise fault(f"{shown(rate)} is too long for a rate", f"at most {MAX_RATE} characters")
    window = _read_rate(rate)
    if window:
        return _window(rate, window)
    if all(map(_read_rate, _SEPARATORS.split(rate))):
        raise fault(f"{shown(rate)} is several rates", "one rate per string")
    raise fault(f"{shown(rate)} is not a rate", _RATE, _rate_nearest(rate))


def _read_rate(rate: str) -> Window | None:
    parts = _RATE_PARTS.fullmatch(rate) if rate.isascii() else None
    unit = parts["unit"].lower().removesuffix("s") if parts else ""
    if not parts or unit not in UNIT_SECONDS:
        return None
    return Window(int(parts["quota"]), int(parts["multiple"] or 1), unit)


def _window(rate: str, window: Window) -> Window:
    if type(window.quota) is not int or type(window.multiple) is not int:
        raise fault(f"{shown(rate)} is not in whole numbers", _RATE)
    if window.quota < 1 or window.multiple < 1:
        raise fault(f"{shown(rate)} never admits anything", "a count and a multiple of at least 1")
    if window.quota > MAX_QUOTA:
        raise fault(f"{shown(rate)} is too large", f"a count of at most {MAX_QUOTA}")
    if window.seconds > MAX_SECONDS:
        raise fault(f"{shown(rate)} is too long", "a window of at most 10 years")
    return window


def _rate_text(window: Window) -> str:
    return window.text


def _rate_nearest(rate: str) -> str:
    parts = _RATE_PARTS.fullmatch(rate)
    name = parts["unit"].lower() if parts else ""
    unit = _ABBREVIATIONS.get(name, "") or (
        nearest_name(name.removesuffix("s"), UNIT_SECONDS) if name else ""
    )
    return rate[: parts.start("unit")].lstrip() + unit if parts and unit else ""


def _one_per_length(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    if len(windows) > MAX_RATES:
        raise fault(f"has {len(windows)} rates", f"at most {MAX_RATES}")
    first: dict[int, int] = {}
    for index, window in enumerate(windows):
        first.setdefault(window.length, index)
    again = [index for index, window in enumerate(windows) if first[window.length] != index]
    if again:
        text = "has the same window length as another rate of the list"
        expected = "one rate for each length"
        raise faults(((index,), fault(f"'{windows[index].text}' {text}", expected)) for index in again)
    return windows


class SlotsTable(Table):
    """`concurrent`: slots as a table. A whole number in its place is its `limit`."""

    limit: Annotated[int, Field(ge=1, le=MAX_SLOTS)]
    """Requests or jobs that may run at once."""
    unit: Label = "request"
    """Name of what takes a slot, as refusals call it. Default: "request"."""
    lease: Annotated[float, Field(ge=1, le=MAX_SECONDS, allow_inf_nan=False)] | None = None
    """Seconds after which the slot of a dead process is free, and its estimate given back. Live processes
    renew both. Default: 30, or `max_hold` if shorter."""
    max_hold: Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)] | None = None
    """Seconds after which a slot is freed though its work goes on. Default: none."""

    @model_validator(mode="after")
    def _hold_outlasts_lease(self) -> Self:
        if self.lease and self.max_hold and self.max_hold < self.lease:
            found = fault(f"{self.max_hold:g} is shorter than the lease", f"at least {self.lease:g}")
            raise faults([(("max_hold",), found)])
        return self

    def slots(self) -> Slots:
        """Return the limit that this table describes."""
        lease_seconds = self.lease or min(_LEASE, self.max_hold or _LEASE)
        return Slots(self.limit, self.unit, lease_seconds, self.max_hold)


def _slots_table(slots: Slots) -> dict[str, Any]:
    """Slots as the file would have them."""
    lease, max_hold = slots.lease_seconds, slots.max_hold
    return {"limit": slots.limit, "unit": slots.unit, "lease": lease, "max_hold": max_hold}


def parse_slots(concurrent: object) -> Slots:
    """Return the limit that `concurrent` stands for: a whole number, or a table with at least a `limit`."""
    if isinstance(concurrent, Slots):
        concurrent = _slots_table(concurrent)
    if isinstance(concurrent, dict):
        return SlotsTable.model_validate(concurrent).slots()
    if isinstance(concurrent, bool) or not isinstance(concurrent, int):
        raise fault(
            f"is {type_name(concurrent)}", "a whole number, or a table such as { limit = 5, lease = 30 }"
        )
    if not 1 <= concurrent <= MAX_SLOTS:
        raise fault(f"{shown(concurrent)} is out of range", f"a whole number from 1 to {MAX_SLOTS}")
    return Slots(concurrent)


class _SlotsSchema:
    """JSON schema of `concurrent`, for which pydantic sees a function alone."""

    def __get_pydantic_json_schema__(self, _: object, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [_WHOLE, handler(SlotsTable.__pydantic_core_schema__)]}


def parse_amount_of(amount: object, currency: str) -> int:
    """Return an amount in units of `currency`."""
    return parse_amount(money_text(amount, currency), currency)


def money_text(amount: object, currency: str) -> str:
    """Return an amount as decimal text: as it was written, where that is plain digits."""
    if not isinstance(amount, str | Decimal):
        raise fault(f"is {type_name(amount)}", 'a decimal string, such as "25.00"')
    try:
        return plain_text(amount, currency)
    except ValueError as error:
        raise fault(f"{shown(str(amount))} is not an amount: {error}") from None


def parse_price(price: object) -> Decimal:
    """Return a price exactly as it is written; which currency it is in is its plan's business."""
    return Decimal(money_text(price, ""))


_WHOLE = {"type": "integer", "minimum": 1, "maximum": MAX_SLOTS}
_UNITS = "|".join(map(any_case, UNIT_SECONDS))
_RATE_TEXT = rf"^\s*0*[1-9][0-9]*\s*(/|{any_case('per')})\s*(0*[1-9][0-9]*)?\s*({_UNITS})[Ss]?\s*$"
MONEY = text("amount of money", r"^\s*\+?[0-9_]*[.]?[0-9_]*([eE][+-]?[0-9]+)?\s*$")
"""JSON schema of an amount: more than the forms that `Decimal` reads, and no negative one."""

Rate = Annotated[Window, read_by(parse_rate, _rate_text), text(RATE, _RATE_TEXT)]
Rates = Annotated[Items[Rate], AfterValidator(_one_per_length)]
Concurrent = Annotated[Slots, read_by(parse_slots, _slots_table), _SlotsSchema()]
Price = Annotated[Decimal, read_by(parse_price), MONEY]
