"""A key's plan and its own limits, as an app's code or `keys set` says them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """The plan of an API key and what it has in place of that plan's limits.

    As an entry of `[[keys]]`, with the rest of a limit taken from the plan: the unit and the lease of its
    slots, the currency and the time zone of its budget.
    """

    plan: str
    """Name of a plan in the settings."""
    account: str | None = None
    """The account that the key belongs to."""
    requests: Iterable[str] | None = None
    """Rates in place of the plan's, such as `("100/minute",)`."""
    concurrent: int | None = None
    """Slots in place of the plan's."""
    daily: str | int | Decimal | None = None
    """Amount that may be spent in a day. With either amount, the plan's own budget is replaced as a whole."""
    monthly: str | int | Decimal | None = None
    """Amount that may be spent in a calendar month."""
    label: str | None = None
    """Text that is shown beside the key's name."""
    units: Mapping[str, Iterable[str]] | None = None
    """Rates of metered units in place of all of the plan's, such as `{"tokens": ("200000/minute",)}`."""

    def __post_init__(self) -> None:
        if self.requests is not None and not isinstance(self.requests, str):
            object.__setattr__(self, "requests", tuple(self.requests))
        if isinstance(self.units, Mapping):
            units = {unit: _rates(rates) for unit, rates in self.units.items()}
            object.__setattr__(self, "units", units)
        for name in ("daily", "monthly"):
            amount = getattr(self, name)
            if isinstance(amount, int | Decimal) and not isinstance(amount, bool):
                object.__setattr__(self, name, str(amount))

    def __hash__(self) -> int:
        """Hash of all but the units, whose mapping has none."""
        return hash((self.plan, self.account, self.requests, self.concurrent, self.daily, self.monthly))


def _rates(rates: Iterable[str]) -> Iterable[str]:
    """Rates as an entry keeps them; what can't be any is left for the settings to refuse."""
    is_plain = isinstance(rates, str) or not isinstance(rates, Iterable)
    return rates if is_plain else tuple(rates)
