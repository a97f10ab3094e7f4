"""Entries of API keys outside the settings file, from `keys set` or from the app's `resolve=` hook."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import ValidationError

from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError, SettingsProblem
from ratelimit_mw._internal.settings.errors import problems_of
from ratelimit_mw._internal.settings.keys import check_hash_kind, check_keys, unknown_plan

_NAMES = frozenset(field.name for field in fields(KeyEntry))


def write_entry(entry: KeyEntry) -> bytes:
    """An entry as the backend keeps it: JSON, without what it leaves to its plan."""
    written = {name: value for name, value in asdict(entry).items() if value is not None}
    return json.dumps(written, separators=(",", ":"), ensure_ascii=False).encode()


def read_entry(text: bytes) -> KeyEntry:
    """The entry that `write_entry` wrote. Raises ValueError for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(values, dict) or "plan" not in values:
        raise ValueError("is not an entry of a key: it has no plan")
    strange = sorted(values.keys() - _NAMES)
    if strange:
        raise ValueError(f"has an unknown name {strange[0][:40]!r}")
    if not isinstance(values.get("requests", []), list):
        raise ValueError("has `requests` that are not a list")
    if not isinstance(values.get("units", {}), dict):
        raise ValueError("has `units` that are not a table")
    return KeyEntry(**values)


def key_settings(entry: KeyEntry, api_key_hash: str, settings: Settings) -> KeySettings:
    """An entry as the settings would have it, checked by itself. Raises `SettingsError`."""
    try:
        return KeySettings.model_validate(_table(entry, api_key_hash, settings))
    except ValidationError as error:
        raise SettingsError(problems_of(error, "")) from None


def sound_entry(entry: KeyEntry, api_key_hash: str, settings: Settings) -> KeySettings:
    """An entry as the settings would have it, checked against the plans. Raises `SettingsError`."""
    key = key_settings(entry, api_key_hash, settings)
    problems = [*check_keys({0: key}, {0: "hash"}, settings.plans)]
    if problems:
        raise SettingsError(each._replace(path=each.path.removeprefix("keys[0].")) for each in problems)
    return key


def fitting_key(entry: KeyEntry, api_key_hash: str, settings: Settings) -> KeySettings:
    """An entry as the settings would have it, checked by itself; an unknown plan is told first.

    Raises `SettingsError`.
    """
    try:
        return key_settings(entry, api_key_hash, settings)
    except SettingsError as error:
        if any(problem.path == "plan" for problem in error.problems):
            raise
        raise SettingsError([*_plan_problems(entry.plan, settings), *error.problems]) from None


def sound_entries(
    entries: Mapping[str, KeyEntry], settings: Settings
) -> tuple[dict[str, KeySettings], dict[str, list[SettingsProblem]]]:
    """Return the entries, by hash, that can be used under these settings, and the problems of the others.

    Entries are checked together with the keys of the file, except for the keys that they replace. If two
    contradict each other, the later one is wrong.
    """
    sound: dict[str, KeySettings] = {}
    wrong: dict[str, list[SettingsProblem]] = {}
    for api_key_hash, entry in entries.items():
        try:
            sound[api_key_hash] = fitting_key(entry, api_key_hash, settings)
        except SettingsError as error:
            wrong[api_key_hash] = list(error.problems)
    listed = [key for key in settings.keys if key.hash not in sound]
    for api_key_hash, problem in contradictions(sound, listed, settings):
        wrong.setdefault(api_key_hash, []).append(problem)
    return {each: key for each, key in sound.items() if each not in wrong}, wrong


def _plan_problems(plan: str, settings: Settings) -> list[SettingsProblem]:
    return [] if plan in settings.plans else [unknown_plan(("plan",), plan, settings.plans)]


def contradictions(
    sound: Mapping[str, KeySettings], listed: Iterable[KeySettings], settings: Settings
) -> Iterator[tuple[str, SettingsProblem]]:
    """Yield the problems of keys with others, with those of the file and with plans, each with its hash."""
    listed = [*listed]
    keys = dict(enumerate([*listed, *sound.values()]))
    fields = dict.fromkeys(range(len(listed), len(keys)), "hash")
    found = [*check_keys(keys, fields, settings.plans)]
    found += check_hash_kind(keys, fields, bool(settings.identity.hash_secret))
    for problem in found:
        index, _, name = problem.path.removeprefix("keys[").partition("].")
        if int(index) in fields:
            yield keys[int(index)].hash, problem._replace(path=name)


def _table(entry: KeyEntry, api_key_hash: str, settings: Settings) -> dict[str, Any]:
    """The entry as a table of `[[keys]]`."""
    plan = settings.plans.get(str(entry.plan))
    table: dict[str, Any] = {"hash": api_key_hash, "plan": entry.plan, "account": entry.account}
    if entry.label is not None:
        table["label"] = entry.label
    if entry.requests is not None:
        table["requests"] = entry.requests
    if entry.units is not None:
        table["units"] = entry.units
    if entry.concurrent is not None:
        own = plan.concurrent if plan is not None else None
        shape = (
            {} if own is None else {"unit": own.unit, "lease": own.lease_seconds, "max_hold": own.max_hold}
        )
        table["concurrent"] = {**_written(shape), "limit": entry.concurrent}
    amounts = _written({"daily": entry.daily, "monthly": entry.monthly})
    if amounts:
        budget = plan.spending if plan is not None else None
        shape = {} if budget is None else budget.model_dump(exclude={"daily", "monthly"})
        table["spending"] = {**_written(shape), **amounts}
    return table


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
