"""Metered units: tokens, images, seconds and whatever else only the app can count once a request is done.

A request is charged an estimate of each unit when it is admitted, in the same step as all its other limits,
and settles what it has used later. All windows that count one unit in one scope are a `Meter`: they are
charged, given back and settled together.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from ratelimit_mw._internal.model.limits import Limit, Window

MAX_AMOUNT = 10**9
"""The largest estimate and the largest amount settled of a unit: as large as the largest quota."""

_MAPPINGS = (dict, Mapping)
"""Types of mappings. The first is the type of nearly all, and an instance of it is found at once."""

Units = Mapping[str, int]
"""Amounts by the name of their unit, such as `{"tokens": 812}`."""


class Meter(NamedTuple):
    """One unit as it is counted under one partition: all its windows, which are charged alike."""

    partition: str
    scope: str
    unit: str
    windows: tuple[Window, ...]

    def __hash__(self) -> int:
        return hash((self.partition, self.scope))  # windows have no hash that is remembered

    @property
    def open_scope(self) -> str:
        """Scope of the meter's estimates that may lapse; each set of windows has its own.

        The settings may change while requests run, and an estimate is given back to the windows it is in.
        """
        return f"{self.scope}:{'+'.join([str(window.seconds) for window in self.windows])}"


class Counted(Protocol):
    """One limit and where it is counted."""

    @property
    def partition(self) -> str:
        """The string the limit is counted under."""

    @property
    def scope(self) -> str:
        """Name that tells the limits of one partition apart."""

    @property
    def limit(self) -> Limit:
        """The limit."""


def meters_of(counters: Iterable[Counted]) -> tuple[Meter, ...]:
    """The meters of a charge, in the order of their first windows."""
    found: dict[tuple[str, str], list[Window]] = {}
    for counter in counters:
        if isinstance(counter.limit, Window) and counter.limit.is_metered:
            found.setdefault((counter.partition, counter.scope), []).append(counter.limit)
    return tuple([Meter(*place, windows[0].counts, tuple(windows)) for place, windows in found.items()])


def meter_places(counters: Iterable[Counted], meters: Iterable[Meter]) -> tuple[int, ...]:
    """For each limit the number of its meter among `meters`, from 1 on; 0 where it has none."""
    numbers = {meter[:2]: number for number, meter in enumerate(meters, 1)}
    return tuple(
        [
            numbers[counter.partition, counter.scope]
            if isinstance(counter.limit, Window) and counter.limit.is_metered
            else 0
            for counter in counters
        ]
    )


def check_amounts(units: object) -> dict[str, int]:
    """Amounts as they may be charged. Raises ValueError for anything but whole numbers by unit."""
    if not isinstance(units, _MAPPINGS):
        raise ValueError(f"units must be a mapping such as {{'tokens': 812}}, not {type(units).__name__}")
    checked = {}
    for unit, amount in units.items():
        if not (type(unit) is str and type(amount) is int and 0 <= amount <= MAX_AMOUNT):
            _check_amount(unit, amount)
        checked[unit] = amount
    return checked


def _check_amount(unit: object, amount: object) -> None:
    if not isinstance(unit, str):
        raise ValueError(f"the name of a unit must be a string, not {unit!r:.40}")
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(
            f"the amount of {unit!r:.40} must be a whole number from 0 to {MAX_AMOUNT}, not {amount!r:.40}"
        )
