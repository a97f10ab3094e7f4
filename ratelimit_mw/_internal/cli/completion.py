"""Shell completion of settings files, plans and callers.

A completion never fails and prints no messages.
"""

import asyncio
from pathlib import Path

import typer

from ratelimit_mw._internal.cli.names import Directory
from ratelimit_mw._internal.cli.output import take_notes
from ratelimit_mw._internal.cli.sources import load_usable
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.settings import Settings

PATIENCE = 1.0
"""Seconds that a person at a prompt waits for callers."""
MANY = 50
"""Callers that are offered at most."""


def complete_file(incomplete: str) -> list[str]:
    """TOML files and folders that begin so."""
    folder = incomplete[: incomplete.rfind("/") + 1]
    try:
        found = [each for each in Path(folder or ".").iterdir() if each.is_dir() or each.suffix == ".toml"]
    except OSError:
        return []
    names = [f"{folder}{each.name}{'/' if each.is_dir() else ''}" for each in found]
    return sorted(name for name in names if name.startswith(incomplete))


def complete_plan(context: typer.Context, incomplete: str) -> list[str]:
    """Plans of the settings that begin so."""
    settings = _settings(context)
    return [] if settings is None else [name for name in settings.plans if name.startswith(incomplete)]


def complete_caller(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of callers who are known or were seen lately that begin so, each with its label or account."""
    settings = _settings(context)
    if settings is None:
        return []
    try:
        return asyncio.run(_callers(settings, incomplete))
    except Exception:  # noqa: BLE001 - a prompt is no place for what is wrong
        return []


def complete_account(context: typer.Context, incomplete: str) -> list[str]:
    """Accounts of known keys that begin so."""
    settings = _settings(context)
    accounts = {key.account or "" for key in settings.keys} if settings is not None else set()
    return sorted(each for each in accounts if each and each.startswith(incomplete))


async def _callers(settings: Settings, incomplete: str) -> list[tuple[str, str]]:
    limiter = Limiter(settings)
    directory = Directory(limiter)
    try:
        async with asyncio.timeout(PATIENCE):
            await directory.read()
    except Exception:  # noqa: BLE001, S110 - those of the file are known all the same
        pass
    finally:
        await limiter.close()
    return directory.starting_with(incomplete, MANY)


def _settings(context: typer.Context) -> Settings | None:
    named = context.params.get("settings")
    try:
        return load_usable(named if isinstance(named, str) else None)
    except Exception:  # noqa: BLE001 - as above
        return None
    finally:
        take_notes()
