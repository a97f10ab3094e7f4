"""Shell completion of settings files, plans and callers.

A completion never fails and prints no messages. Bash takes `k:5cc4` for three words, as its variable
`COMP_WORDBREAKS` says, and replaces the last one alone; other shells take it for one.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
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

_BREAKS = frozenset(":=")
"""Characters at which bash ends a word and which the words of a command line may contain."""


@contextmanager
def completing_in_bash() -> Iterator[None]:
    """Let a completion see the words as they were typed, if bash asks for one; otherwise change nothing.

    What it prints lacks the beginning of the last word, which bash does not replace.
    """
    if os.environ.get("_RATELIMIT_MW_COMPLETE") != "complete_bash":
        yield
        return
    words, current = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    words, current, kept = join_words(words, current)
    os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(current))
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        sys.stdout.writelines(f"{line.removeprefix(kept)}\n" for line in printed.getvalue().splitlines())


def join_words(words: list[str], current: int) -> tuple[list[str], int, str]:
    """Put together what bash took apart at `:` and `=`; an option is never the rest of the word before it.

    Returns the words, where the one at `current` is now, and the beginning of it that bash does not replace.
    """
    joined: list[str] = []
    new_current, kept = current, ""
    goes_on = False
    for index, word in enumerate(words):
        is_break = word != "" and _BREAKS.issuperset(word)
        if joined and (is_break or (goes_on and not word.startswith("-"))):
            joined[-1] += word
        else:
            joined.append(word)
        if index == current:
            new_current, kept = len(joined) - 1, joined[-1] if is_break else joined[-1].removesuffix(word)
        goes_on = is_break
    return joined, new_current, kept


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
    except Exception:  # noqa: BLE001 - a prompt is not a place for what is wrong
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
