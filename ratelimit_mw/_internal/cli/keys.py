"""`ratelimit-mw keys set`, `list` and `remove`: plans, overrides and accounts of API keys, live."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.cli.callers import find_entries, hash_of, read_key
from ratelimit_mw._internal.cli.counts import patient_limiter, run_with
from ratelimit_mw._internal.cli.names import is_name
from ratelimit_mw._internal.cli.output import (
    CommandError,
    console,
    note,
    print_json,
    print_table,
    without_unused,
)
from ratelimit_mw._internal.cli.recording import PATIENCE, record
from ratelimit_mw._internal.live.network_entries import network_of, shown_name
from ratelimit_mw._internal.live.registry import Registry, shown_hash
from ratelimit_mw._internal.live.timed_entries import TimedEntry, time_text, until_text
from ratelimit_mw._internal.model.limits import Window
from ratelimit_mw._internal.policy.identity import HASH, key_partition
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError, SettingsProblem

T = TypeVar("T")


def hash_key(settings: Settings, key: str) -> str:
    """The hash of an API key, or of the one whose caller is named. Raises `CommandError`, `BackendError`.

    What comes from standard input is a key, whatever it looks like.
    """
    if key != "-" and is_name(key):
        (api_key_hash, *others) = _names(settings, [key])
        if not HASH.fullmatch(api_key_hash):
            raise CommandError(f"{key} is neither an API key nor an account of known keys")
        if others:
            raise CommandError(
                f"{key} has several keys: name one of them, as ratelimit-mw keys list shows it"
            )
        return api_key_hash
    return hash_of(read_key(key), settings)


def set_keys(
    settings: Settings, keys: Sequence[str], entry: KeyEntry, seconds: float | None, *, as_json: bool
) -> None:
    """Give API keys a plan and limits of their own, or networks a plan, all of them or none.

    Each keeps the account and the label that it has, where the entry names no others. With `seconds` it goes
    back by itself after so long. Raises `CommandError` and `BackendError`.
    """
    names = _names(settings, keys)
    entries: dict[str, KeyEntry] = {}

    async def change(registry: Registry) -> str:
        await registry.read()
        held: dict[str, KeyEntry | KeySettings] = {key.hash: key for key in settings.keys}
        held.update(registry.in_force())
        entries.update({each: _keeping(entry, held.get(each), account) for each, account in names.items()})
        before = {each: registry.entries.get(each) for each in entries}
        after = entries if seconds is None else await registry.for_a_while(entries, seconds)
        await registry.set(after, settings)
        until = until_text(after)
        await record(settings, "plan", _shown(entries), f"plan {entry.plan}{until}", (before, after))
        return until

    try:
        until = _run(settings, change)
    except SettingsError as error:
        problems = dict.fromkeys(_as_options(problem) for problem in error.problems)
        raise CommandError("; ".join(map(str, problems))) from None
    if as_json:
        print_json({"set": list(names), "callers": _shown(names), "plan": entry.plan, "for": seconds})
        return
    for name, each in entries.items():
        label = f" ({each.label})" if each.label else ""
        console.print(
            f"{shown_name(name)}{label}: plan {each.plan}{until}, in force within 2 seconds", soft_wrap=True
        )
    if settings.plans[entry.plan].blocked and any(network_of(each) is not None for each in names):
        note("callers with an API key keep their own plans; identity.blocked_networks refuses them, too")


def _keeping(entry: KeyEntry, held: KeyEntry | KeySettings | None, account: str | None) -> KeyEntry:
    """The entry with the account and the label of what held before, or the account that was named."""
    if held is not None:
        account = account or held.account
    label = held.label if held is not None and entry.label is None else entry.label
    return replace(entry, account=account if entry.account is None else entry.account, label=label)


def read_units(options: Sequence[str] | None) -> dict[str, list[str]] | None:
    """Rates of metered units, as `--units` has them. Raises `CommandError` for what is none."""
    if not options:
        return None
    units: dict[str, list[str]] = {}
    for option in options:
        unit, equals, rate = option.partition("=")
        if not equals:
            raise CommandError(
                f"--units: {option[:40]!r} names no unit; expected UNIT=RATE, such as tokens=200000/minute"
            )
        units.setdefault(unit.strip(), []).append(rate.strip())
    return units


def remove_keys(settings: Settings, keys: Sequence[str], *, as_json: bool) -> None:
    """Take back what was set live. Raises `CommandError` and `BackendError`."""
    named = _names(settings, keys)

    async def remove(registry: Registry) -> list[str]:
        await registry.read()
        # Of an account's keys, those that are listed in the file alone have nothing to take back.
        present = registry.hashes
        hashes = [each for each, account in named.items() if account is None or each in present]
        for each in hashes or named:
            if each not in present:
                raise CommandError(_not_set(settings, each))
        before = {each: registry.entries.get(each) for each in hashes}
        await registry.remove(hashes)
        entries = (before, dict.fromkeys(hashes))
        await record(settings, "take-back", _shown(hashes), "what was set live is taken back", entries)
        return hashes

    removed = _run(settings, remove)
    if as_json:
        print_json({"removed": removed, "callers": _shown(removed)})
        return
    listed = {key.hash: key.plan for key in settings.keys}
    listed |= {str(entry.network): entry.plan for entry in settings.addresses}
    for name in removed:
        plan = f"plan {listed[name]} again, as the settings say" if name in listed else "unknown from now on"
        console.print(f"{shown_name(name)}: {plan}", soft_wrap=True)


def list_keys(settings: Settings, *, as_json: bool) -> None:
    """Print every key that is set live or listed in the settings. Raises `BackendError`."""
    rows = _in_settings(settings)
    if settings.backend.is_shared:
        live = _run(settings, lambda registry: _live(registry, settings))
        replaced = {row["hash"] or row["network"] for row in live if not row["problems"]}
        rows = [*live, *(row for row in rows if (row["hash"] or row["network"]) not in replaced)]
    if as_json:
        print_json({"keys": rows})
    elif not rows:
        console.print("no keys")
    else:
        columns = ("key", "label", "plan", "account", "requests", "units", "concurrent", "spending", "from")
        print_table(
            *without_unused(columns, map(_row, rows), "units"), whole=True
        )  # a hash is there to be copied


def _run(settings: Settings, ask: Callable[[Registry], Awaitable[T]]) -> T:
    _check_shared(settings)

    async def run() -> T:
        registry = Registry(open_key_store(settings.backend, timeout=PATIENCE))
        try:
            return await ask(registry)
        finally:
            await registry.close()

    return asyncio.run(run())


def _check_shared(settings: Settings) -> None:
    if not settings.backend.is_shared:
        raise CommandError(
            f"{settings.source}: backend.url is memory://, so live keys and counts are in the memory of each "
            "process, and no command can reach them"
        )


def _names(settings: Settings, keys: Sequence[str]) -> dict[str, str | None]:
    """The hashes and networks of entries; a key with the account whose name stood for it."""
    _check_shared(settings)
    limiter = patient_limiter(settings)
    return run_with(limiter, find_entries(limiter, list(keys)))


def _shown(names: Iterable[str]) -> list[str]:
    return [shown_name(each) for each in names]


def _not_set(settings: Settings, name: str) -> str:
    listed = name in {key.hash for key in settings.keys} | {str(each.network) for each in settings.addresses}
    where = f"; it is listed in {settings.source}" if listed else ""
    return f"{shown_name(name)} is not set live{where}"


def _as_options(problem: SettingsProblem) -> SettingsProblem:
    """A problem with the option that has it in place of its path: `spending.daily` is `--daily`."""
    name = re.split(r"[.\[]", problem.path.removeprefix("spending."))[0]
    option = {"hash": "", "spending": "--daily and --monthly"}.get(name, f"--{name}")
    return problem._replace(path=option)


async def _live(registry: Registry, settings: Settings) -> list[dict[str, Any]]:
    await registry.read()
    entries = registry.in_force()
    (sound, _), wrong = registry.checked_under(settings)
    rows = []
    for name in sorted(registry.hashes):
        problems = [str(problem) for problem in wrong.get(name, ())]
        if name in registry.unreadable:
            problems.append(registry.unreadable[name])
        key, entry = sound.get(name), entries.get(name)
        row = {**_of_name(name), **(_facts(key) if key is not None else _NO_FACTS)}
        if entry is not None:
            row |= {"plan": entry.plan, "account": entry.account, "label": entry.label}
        end = entry if isinstance(entry, TimedEntry) else None
        then = None if end is None or end.then is None else end.then.plan
        row |= {"until": end and end.until, "then": then}
        rows.append({**row, "from": "live", "problems": problems})
    return rows


def _of_name(name: str) -> dict[str, Any]:
    """Return the columns that identify an entry; of one whose name is neither hash nor network, nothing."""
    is_network = network_of(name) is not None
    return {
        "hash": None if is_network else shown_hash(name),
        "network": name if is_network else None,
        "caller": key_partition(name) if HASH.fullmatch(name) else None,
    }


def _in_settings(settings: Settings) -> list[dict[str, Any]]:
    sound: dict[str, Any] = {"until": None, "then": None, "problems": []}
    keys = [
        {**_of_name(key.hash), **_facts(key), "from": f"keys[{index}]", **sound}
        for index, key in enumerate(settings.keys)
    ]
    networks = [
        {
            **_of_name(str(each.network)),
            **_NO_FACTS,
            "plan": each.plan,
            "from": f"addresses[{index}]",
            **sound,
        }
        for index, each in enumerate(settings.addresses)
    ]
    return [*keys, *networks]


def _facts(key: KeySettings) -> dict[str, Any]:
    """Return a key's plan, account and limits as JSON has them; None for a limit that is its plan's."""
    return {
        "plan": key.plan,
        "account": key.account,
        "label": key.label,
        "requests": None if key.requests is None else _texts(key.requests),
        "units": None if key.units is None else {unit: _texts(each) for unit, each in key.units.items()},
        "concurrent": None if key.concurrent is None else key.concurrent.limit,
        "daily": None if key.spending is None else key.spending.daily,
        "monthly": None if key.spending is None else key.spending.monthly,
        "currency": None if key.spending is None else key.spending.currency,
    }


_FACTS = ("plan", "account", "label", "requests", "units", "concurrent", "daily", "monthly", "currency")
_NO_FACTS = dict.fromkeys(_FACTS)


def _texts(windows: Iterable[Window]) -> list[str]:
    return [window.text for window in windows]


def _row(row: dict[str, Any]) -> tuple[object, ...]:
    amounts = [(row["daily"], "a day"), (row["monthly"], "a month")]
    spending = ", ".join(f"{amount} {row['currency']} {period}" for amount, period in amounts if amount)
    source = row["from"] + _end_text(row)
    if row["problems"]:
        source += f", ignored: {'; '.join(row['problems'])}"
    rates = ", ".join(row["requests"] or ()) or "-"
    units = ", ".join(f"{unit}={rate}" for unit, each in (row["units"] or {}).items() for rate in each)
    limits = (rates, units or "-", row["concurrent"] or "-", spending or "-")
    return (
        row["hash"] or row["network"],
        row["label"] or "-",
        row["plan"] or "-",
        row["account"] or "-",
        *limits,
        source,
    )


def _end_text(row: dict[str, Any]) -> str:
    """The end of an entry that goes back by itself, and what comes then."""
    if row["until"] is None:
        return ""
    then = f"plan {row['then']}" if row["then"] else "as the settings say"
    return f" until {time_text(row['until'])}, then {then}"
