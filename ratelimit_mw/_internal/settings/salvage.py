"""Settings of a file that has mistakes, without what is wrong: for operators, never for an app.

Who has to act at night needs the backend's place and the hash secret. A mistake in a plan must not stand in
the way, and a mistake in either of those must.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.checks import SoundParts, sound_parts
from ratelimit_mw._internal.settings.errors import SettingsError
from ratelimit_mw._internal.settings.loader import Settings, prepared
from ratelimit_mw._internal.settings.sources import parse, read_environment, read_file_bytes
from ratelimit_mw._internal.settings.tables import IdentitySettings, PlanSettings
from ratelimit_mw._internal.settings.values import PlanName

_SECTION = re.compile(r"^[ \t]*\[[^\[\],]+\]|^[ \t]*\[\[[^\[\],]+\]\]", re.MULTILINE)
_LINE = re.compile(r"line (\d+)")
_NEEDED = ("backend", "hash_secret")
_TABLES = ("backend", "identity", "RATELIMIT_BACKEND", "RATELIMIT_IDENTITY")
_NOT_THE_PLACE = ("timeout", "on_failure", "local_share")
"""Names in `[backend]` that have no part in the backend's location."""
_ENTRY = re.compile(r"(keys|routes|addresses)\[(\d+)\]")
_PAST_THE_END = 1 << 62
_ROUNDS = 50
"""Times that the settings are put together at most, each without what was wrong the time before."""


def load_sound(path: str | None) -> tuple[Settings, SettingsError | None]:
    """Load the usable part of a settings file, with the settings from the environment.

    Returns the settings, and the error that lists the mistakes; the error is None if there are none. Raises
    `SettingsError` if the backend's location or the hash secret can't be told.
    """
    try:
        return Settings.load(path), None
    except SettingsError as error:
        # First what stands in the way: the mistakes that can't be done without.
        wrong = SettingsError(sorted(error.problems, key=lambda each: not each.path.startswith(_TABLES)))
    named = path or os.environ.get("RATELIMIT_SETTINGS") or None
    tables = {} if named is None else _tables(named, wrong)
    values = read_environment(os.environ).over(tables)
    backend = _backend(values.get("backend", {}))
    identity = values.get("identity", {})
    secret = identity.get("hash_secret", "") if isinstance(identity, dict) else None
    if backend is None or not isinstance(secret, str):
        raise wrong
    return _assembled(values, backend, named, wrong), wrong


def _backend(table: Any) -> BackendSettings | None:
    """The backend's place; None where something is wrong that may have a part in it."""
    try:
        return BackendSettings.model_validate(table)
    except ValidationError as error:
        wrong = {line["loc"][0] for line in error.errors() if line["loc"]}
    if not isinstance(table, dict) or not wrong <= set(_NOT_THE_PLACE):
        return None
    return BackendSettings.model_validate({name: each for name, each in table.items() if name not in wrong})


def _tables(path: str, wrong: SettingsError) -> dict[str, Any]:
    """The tables of a file, without the sections that are not TOML. Raises `SettingsError`."""
    data = read_file_bytes(path)
    try:
        return parse(path, data)
    except SettingsError:
        text = data.decode("utf-8-sig", errors="replace")
    sections = _sections(text)
    error = _toml_error(sections)
    while error is not None:
        # What is not closed is met where the next section begins, so that either may be the one.
        index = _section_at(sections, error)
        without = [_without(sections, each) for each in (index, _before(sections, index)) if each is not None]
        sections = max(without, key=lambda each: _toml_error(each) or _PAST_THE_END)
        error = _toml_error(sections)
        dropped = "".join(section for section in _sections(text) if section not in sections)
        if any(name in dropped for name in _NEEDED):
            raise wrong
    return tomllib.loads("".join(sections))


def _sections(text: str) -> list[str]:
    starts = [0, *(match.start() for match in _SECTION.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(starts)]


def _toml_error(sections: list[str]) -> int | None:
    """The line that is not TOML; None where all are."""
    text = "".join(sections)
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        line = _LINE.search(str(error))
        return int(line[1]) if line else text.count("\n") + 1
    return None


def _section_at(sections: list[str], line: int) -> int:
    """The last section with anything in it that begins at this line or before."""
    begins, found = 1, 0
    for index, section in enumerate(sections):
        if section.strip() and begins <= line:
            found = index
        begins += section.count("\n")
    return found


def _before(sections: list[str], index: int) -> int | None:
    return next((each for each in range(index - 1, -1, -1) if sections[each].strip()), None)


def _without(sections: list[str], index: int) -> list[str]:
    """Return the sections with one of them emptied; the number of lines stays the same."""
    empty = "\n" * sections[index].count("\n")
    return [empty if at == index else section for at, section in enumerate(sections)]


class _Parts:
    """Valid parts of a settings file, reduced step by step until they fit together."""

    def __init__(self, data: Mapping[str, Any], identity: IdentitySettings, parts: SoundParts) -> None:
        self.identity = identity
        self.plans = {name: plan or PlanSettings() for name, plan in parts.plans.items()}
        self.entries: dict[str, dict[int, Any]] = {
            "keys": {**parts.keys},
            "addresses": {**parts.addresses},
            "routes": {**parts.routes},
        }
        own = {"backend", "identity", "plans", *self.entries}
        self.others = {name: data[name] for name in Settings.model_fields if name in data and name not in own}

    def settings(self, backend: BackendSettings) -> Settings:
        """The settings of these parts. Raises `SettingsError`."""
        return Settings(
            backend=backend,
            identity=self.identity,
            plans=self.plans,
            keys=tuple(self.entries["keys"].values()),
            addresses=tuple(self.entries["addresses"].values()),
            routes=tuple(self.entries["routes"].values()),
            **self.others,
        )

    def drop(self, error: SettingsError) -> None:
        """Drop what an error is about; plans that are missing are added, without limits."""
        indexes = {table: [*entries] for table, entries in self.entries.items()}
        for problem in error.problems:
            entry = _ENTRY.match(problem.path)
            name = problem.path.partition(".")[0].partition("[")[0]
            if entry is not None:
                self.entries[entry[1]].pop(indexes[entry[1]][int(entry[2])], None)
            elif name == "identity":
                for plan in (self.identity.default_plan, self.identity.anonymous_plan):
                    self.plans.setdefault(plan, PlanSettings())
            elif name == "plans":
                self.plans = {plan: each for plan, each in self.plans.items() if _is_plan_name(plan)}
            else:
                self.others.pop(name, None)


def _assembled(
    values: Mapping[str, Any], backend: BackendSettings, named: str | None, wrong: SettingsError
) -> Settings:
    data, _ = prepared(dict(values))
    sound = sound_parts(data)
    if sound.identity is None:
        raise wrong
    parts = _Parts(data, sound.identity, sound)
    for _ in range(_ROUNDS):
        try:
            settings = parts.settings(backend)
        except SettingsError as error:
            parts.drop(error)
        else:
            settings.comes_from(named)
            return settings
    raise wrong


def _is_plan_name(name: str) -> bool:
    try:
        TypeAdapter(PlanName).validate_python(name)
    except ValidationError:
        return False
    return True
