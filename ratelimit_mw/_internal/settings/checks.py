"""Checks of the settings that need more than one table.

They run on what is sound of each, whatever else is wrong, so that one look at a file finds everything.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from ratelimit_mw._internal.model.money import TOKEN
from ratelimit_mw._internal.settings.errors import SettingsProblem, path_of
from ratelimit_mw._internal.settings.keys import ListedKeys, check_hash_kind, check_keys, unknown_plan
from ratelimit_mw._internal.settings.networks import AddressSettings, check_addresses
from ratelimit_mw._internal.settings.tables import IdentitySettings, KeySettings, PlanSettings, RouteSettings
from ratelimit_mw._internal.settings.values import Table

_Table = TypeVar("_Table", bound=Table)


class SoundParts(NamedTuple):
    """The tables that could be read, each without the entries that could not."""

    identity: IdentitySettings | None
    plans: Mapping[str, PlanSettings | None]
    """Every plan there is, `None` where nothing of it could be read; empty where no plan could."""
    keys: Mapping[int, KeySettings]
    routes: Mapping[int, RouteSettings]
    addresses: Mapping[int, AddressSettings]


def sound_parts(data: Mapping[str, Any]) -> SoundParts:
    """Return what is sound in the tables of a file."""
    return SoundParts(
        identity=_sound(IdentitySettings, data.get("identity", {})),
        plans={name: _sound(PlanSettings, plan) for name, plan in _dict(data.get("plans")).items()},
        keys=_sound_entries(KeySettings, data.get("keys")),
        routes=_sound_entries(RouteSettings, data.get("routes")),
        addresses=_sound_entries(AddressSettings, data.get("addresses")),
    )


def cross_check(parts: SoundParts, listed: ListedKeys) -> Iterator[SettingsProblem]:
    """Yield everything that is wrong between the tables."""
    if parts.identity is not None:
        yield from _check_identity_plans(parts.identity, parts.plans)
        yield from check_hash_kind(parts.keys, listed.fields, bool(parts.identity.hash_secret))
    yield from check_keys(parts.keys, listed.fields, parts.plans)
    yield from check_addresses(parts.addresses, parts.plans)
    yield from _check_prices(parts)


def _check_identity_plans(
    identity: IdentitySettings, plans: Mapping[str, PlanSettings | None]
) -> Iterator[SettingsProblem]:
    for name in ("default_plan", "anonymous_plan"):
        plan = getattr(identity, name)
        if plans and plan not in plans:
            yield unknown_plan(("identity", name), plan, plans)


def _check_prices(parts: SoundParts) -> Iterator[SettingsProblem]:
    """Yield prices that a budget in whole tokens can't be charged."""
    plans = [
        path_of(("plans", name, "spending")) for name, plan in parts.plans.items() if _counts_tokens(plan)
    ]
    keys = [path_of(("keys", index, "spending")) for index, key in parts.keys.items() if _counts_tokens(key)]
    if not plans + keys:
        return
    expected = f"a whole number, since {(plans + keys)[0]} is in tokens"
    for index, route in parts.routes.items():
        if route.price is not None and route.price % 1:
            what = f"'{route.price}' is not a whole number of tokens"
            yield SettingsProblem("", path_of(("routes", index, "price")), what, expected)


def _counts_tokens(spender: PlanSettings | KeySettings | None) -> bool:
    return spender is not None and spender.spending is not None and spender.spending.currency == TOKEN


def _sound_entries(table: type[_Table], entries: Any) -> dict[int, _Table]:
    found = enumerate(entries if isinstance(entries, list | tuple) else ())
    sound = {index: _sound(table, entry) for index, entry in found}
    return {index: entry for index, entry in sound.items() if entry is not None}


def _sound(table: type[_Table], data: Any) -> _Table | None:
    """Return the table without those of its entries that are wrong, if it can do without them."""
    try:
        return table.model_validate(data)
    except ValidationError as error:
        wrong = {line["loc"][0] for line in error.errors() if line["loc"]}
    try:
        return table.model_validate({name: value for name, value in _dict(data).items() if name not in wrong})
    except ValidationError:
        return None


def _dict(data: Any) -> dict[Any, Any]:
    return data if isinstance(data, dict) else {}
