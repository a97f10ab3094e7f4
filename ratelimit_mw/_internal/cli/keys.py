"""`ratelimit-mw keys set`, `list` and `remove`: plans, overrides and accounts of API keys, live."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.cli.callers import hash_of
from ratelimit_mw._internal.cli.output import CommandError, console, print_json, print_table
from ratelimit_mw._internal.live.key_entries import KeyEntry, sound_entries
from ratelimit_mw._internal.live.registry import Registry, shown_hash
from ratelimit_mw._internal.settings import KeySettings, Settings, SettingsError, SettingsProblem

PATIENCE = 2.0
"""Seconds that a command waits for the backend."""

T = TypeVar("T")


def set_keys(settings: Settings, keys: Sequence[str], entry: KeyEntry, *, as_json: bool) -> None:
    """Give API keys a plan and limits of their own, all of them or none.

    Raises `CommandError` and `BackendError`.
    """
    hashes = _hashes(settings, keys)
    try:
        _run(settings, lambda registry: registry.set(dict.fromkeys(hashes, entry), settings))
    except SettingsError as error:
        problems = dict.fromkeys(_as_options(problem) for problem in error.problems)
        raise CommandError("; ".join(map(str, problems))) from None
    if as_json:
        print_json({"set": hashes, "plan": entry.plan})
        return
    for api_key_hash in hashes:
        console.print(f"{api_key_hash}: plan {entry.plan}, in force within 2 seconds", soft_wrap=True)


def remove_keys(settings: Settings, keys: Sequence[str], *, as_json: bool) -> None:
    """Take back what was set live. Raises `CommandError` and `BackendError`."""
    hashes = _hashes(settings, keys)

    async def remove(registry: Registry) -> None:
        await registry.read()
        for api_key_hash in hashes:
            if api_key_hash not in registry.hashes:
                raise CommandError(_not_set(settings, api_key_hash))
        await registry.remove(hashes)

    _run(settings, remove)
    if as_json:
        print_json({"removed": hashes})
        return
    for api_key_hash in hashes:
        after = next((key.plan for key in settings.keys if key.hash == api_key_hash), None)
        plan = f"plan {after} again, as the settings say" if after else "known nowhere from now on"
        console.print(f"{api_key_hash}: {plan}", soft_wrap=True)


def list_keys(settings: Settings, *, as_json: bool) -> None:
    """Print every key that is set live or listed in the settings. Raises `BackendError`."""
    rows = _in_settings(settings)
    if settings.backend.is_shared:
        live = _run(settings, lambda registry: _live(registry, settings))
        replaced = {row["hash"] for row in live if not row["problems"]}
        rows = [*live, *(row for row in rows if row["hash"] not in replaced)]
    if as_json:
        print_json({"keys": rows})
    elif not rows:
        console.print("no keys")
    else:
        columns = ("key", "plan", "account", "requests", "concurrent", "spending", "from")
        print_table(columns, map(_row, rows), whole=True)  # a hash is there to be copied


def _run(settings: Settings, ask: Callable[[Registry], Awaitable[T]]) -> T:
    if not settings.backend.is_shared:
        raise CommandError(
            f"{settings.source} keeps everything in the memory of each process, where no command can reach: "
            "backend.url is memory://"
        )

    async def run() -> T:
        registry = Registry(open_key_store(settings.backend, timeout=PATIENCE))
        try:
            return await ask(registry)
        finally:
            await registry.close()

    return asyncio.run(run())


def _hashes(settings: Settings, keys: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(hash_of(key, settings) for key in keys))


def _not_set(settings: Settings, api_key_hash: str) -> str:
    listed = any(key.hash == api_key_hash for key in settings.keys)
    where = f"; it is listed in {settings.source}" if listed else ""
    return f"{api_key_hash} is not set live{where}"


def _as_options(problem: SettingsProblem) -> SettingsProblem:
    """A problem with the option that has it in place of its path: `spending.daily` is `--daily`."""
    name = re.split(r"[.\[]", problem.path.removeprefix("spending."))[0]
    option = {"hash": "", "spending": "--daily and --monthly"}.get(name, f"--{name}")
    return replace(problem, path=option)


async def _live(registry: Registry, settings: Settings) -> list[dict[str, Any]]:
    await registry.read()
    sound, wrong = sound_entries(registry.entries, settings)
    rows = []
    for api_key_hash in sorted(registry.hashes):
        problems = [str(problem) for problem in wrong.get(api_key_hash, ())]
        if api_key_hash in registry.unreadable:
            problems.append(registry.unreadable[api_key_hash])
        key = sound.get(api_key_hash)
        row = {"hash": shown_hash(api_key_hash), **(_facts(key) if key is not None else _NO_FACTS)}
        entry = registry.entries.get(api_key_hash)
        if entry is not None:
            row |= {"plan": entry.plan, "account": entry.account}
        rows.append({**row, "from": "live", "problems": problems})
    return rows


def _in_settings(settings: Settings) -> list[dict[str, Any]]:
    return [
        {"hash": key.hash, **_facts(key), "from": f"keys[{index}]", "problems": []}
        for index, key in enumerate(settings.keys)
    ]


def _facts(key: KeySettings) -> dict[str, Any]:
    """What a key has; limits as text, None where they are its plan's."""
    return {
        "plan": key.plan,
        "account": key.account,
        "requests": None if key.requests is None else [window.text for window in key.requests],
        "concurrent": None if key.concurrent is None else key.concurrent.limit,
        "daily": None if key.spending is None else key.spending.daily,
        "monthly": None if key.spending is None else key.spending.monthly,
        "currency": None if key.spending is None else key.spending.currency,
    }


_NO_FACTS = dict.fromkeys(("plan", "account", "requests", "concurrent", "daily", "monthly", "currency"))


def _row(row: dict[str, Any]) -> tuple[object, ...]:
    amounts = [(row["daily"], "a day"), (row["monthly"], "a month")]
    spending = ", ".join(f"{amount} {row['currency']} {period}" for amount, period in amounts if amount)
    place = row["from"] if not row["problems"] else f"{row['from']}, ignored: {'; '.join(row['problems'])}"
    limits = (", ".join(row["requests"] or ()) or "-", row["concurrent"] or "-", spending or "-")
    return row["hash"], row["plan"] or "-", row["account"] or "-", *limits, place
