"""Sources of the settings: the TOML file and the environment, read but not judged."""

import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin

from ratelimit_mw._internal.runtime.threads import start
from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.errors import SettingsError, SettingsProblem, nearest_name, one_of, shown
from ratelimit_mw._internal.settings.operations import OperationsSettings
from ratelimit_mw._internal.settings.tables import IdentitySettings, ResponseSettings
from ratelimit_mw._internal.settings.values import Table

READ_SECONDS = 10.0
"""Seconds that a start waits for the settings file, which may lie on a mount that hangs."""
MAX_BYTES = 64 * 2**20
"""Bytes of the largest settings file."""

ENVIRONMENT = "environment"
PREFIX = "RATELIMIT_"
SECTIONS: dict[str, type[Table]] = {
    "backend": BackendSettings,
    "identity": IdentitySettings,
    "response": ResponseSettings,
    "operations": OperationsSettings,
}
"""The tables whose values can be set by environment."""
SINGLE: dict[str, type] = {"SHADOW": bool, "PATHS": str}
"""Values outside of tables that can be, and what they are read as."""

_TRUTHS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


@dataclass(slots=True)
class Environment:
    """Values that the environment sets."""

    values: dict[str, Any] = field(default_factory=dict)
    """In the shape of the file."""
    variables: dict[str, str] = field(default_factory=dict)
    """Variable that set the value at a path, such as `backend.url`."""
    problems: list[SettingsProblem] = field(default_factory=list)

    def over(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Return the file's values with these in place of its own."""
        merged = dict(file)
        for name, value in self.values.items():
            below = merged.get(name, {})
            if not isinstance(value, dict):
                merged[name] = value
            elif isinstance(below, dict):  # else the file is wrong there, which is for the checks to say
                merged[name] = below | value
        return merged


def read_file(path: str) -> dict[str, Any]:
    """Return the tables of the TOML file at `path`.

    Raises `SettingsError` where it is missing, can't be read, also not in time, is not UTF-8 or not TOML; the
    last with its line.
    """
    return parse(path, read_file_bytes(path))


def read_file_bytes(path: str) -> bytes:
    """Return what the file at `path` holds. Raises `SettingsError` where that can't be read in time."""
    try:
        return start(lambda: read_bytes(path)).result(READ_SECONDS)
    except TimeoutError:
        what = f"can't be read within {READ_SECONDS:g} s"
        raise SettingsError(
            [SettingsProblem(path, "", what, "a disk or network share that answers")]
        ) from None


def parse(path: str, data: bytes) -> dict[str, Any]:
    """Return the tables that a file at `path` with these bytes holds. Raises `SettingsError`."""
    import tomllib  # noqa: PLC0415 - for those who have a file

    text = ""
    try:
        text = data.decode("utf-8-sig")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text from byte {error.start} on; expected a TOML file saved as UTF-8"
    except tomllib.TOMLDecodeError as error:
        last = f"at the end, line {text.rstrip().count(chr(10)) + 1}"
        what = f"is not valid TOML: {error}".replace("at end of document", last)
    except (ValueError, RecursionError):
        what = "is not valid TOML: a number is too long, or lists are nested too deeply"
    raise SettingsError([SettingsProblem(path, "", what)])


def read_bytes(path: str, *, still: float = 0.0) -> bytes:
    """Return what the regular file at `path` holds; nothing else is opened, as it may never end.

    With `still` it has to stay as it is for so many seconds more: what a file is replaced by may still be
    written. Raises `SettingsError`, and `BlockingIOError` where it changed meanwhile.
    """
    try:
        _check_kind(Path(path).stat().st_mode)
        # Without waiting, where a FIFO has come in the file's place just now.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            _check_kind(before.st_mode)
            data = file.read(MAX_BYTES + 1)
            time.sleep(still)
            after = os.fstat(descriptor)
    except FileNotFoundError:
        what = "there is no such file"
    except _NoFileError as error:
        what = str(error)
    except (OSError, ValueError) as error:  # a ValueError: a path with a zero byte
        what = f"can't be read: {getattr(error, 'strerror', error)}"
    else:
        if still and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise BlockingIOError(f"{path} is being written")
        if len(data) <= MAX_BYTES:
            return data
        what = f"is larger than {MAX_BYTES} bytes"
    raise SettingsError([SettingsProblem(path if path.isprintable() and path else shown(path), "", what)])


class _NoFileError(Exception):
    """A path leads to something that is not a regular file."""


def _check_kind(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    raise _NoFileError(f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Return what variables such as `RATELIMIT_BACKEND__URL` set; names without `__` are not ours."""
    environment = Environment()
    for variable in sorted(variables):
        single = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and single in SINGLE:
            _set(environment, variable, (single.lower(),), variables[variable], SINGLE[single])
        elif variable.startswith(PREFIX) and "__" in variable:
            section, _, name = variable.removeprefix(PREFIX).lower().partition("__")
            table = SECTIONS.get(section)
            if table is None or name not in table.model_fields:
                environment.problems.append(_unknown(variable, section))
            else:
                annotation = table.model_fields[name].annotation
                _set(environment, variable, (section, name), variables[variable], annotation)
    return environment


def _set(environment: Environment, variable: str, path: tuple[str, ...], text: str, annotation: Any) -> None:
    try:
        value = _value(text.encode().decode(), annotation)
    except UnicodeError:  # the variable's bytes are not text, and not shown, since it may be a secret
        environment.problems.append(SettingsProblem(ENVIRONMENT, variable, "is not UTF-8 text"))
        return
    except ValueError as error:
        problem = SettingsProblem(ENVIRONMENT, variable, f"{shown(text)} is not a possible value", str(error))
        environment.problems.append(problem)
        return
    environment.variables[".".join(path)] = variable
    if len(path) == 1:
        environment.values[path[0]] = value
    else:
        environment.values.setdefault(path[0], {})[path[1]] = value


def _value(text: str, annotation: Any) -> object:
    """Return what `text` stands for in a field of this type; raises `ValueError` with what was expected.

    Only what can't be kept as text is converted. So a secret, which is text, is never in an error.
    """
    if annotation is bool:
        return _one_of(_TRUTHS, text)
    if annotation is float:
        return _number(text)
    if get_origin(annotation) is tuple:
        return _list(text)
    choices = {str(choice): choice for choice in get_args(annotation) if isinstance(choice, int)}
    return _one_of(choices, text) if choices else text


def _one_of(values: Mapping[str, Any], text: str) -> object:
    if text.strip().lower() not in values:
        raise ValueError(one_of(values))
    return values[text.strip().lower()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _list(text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        raise ValueError('a list, as JSON or separated by commas, such as "X-API-Key,Authorization"')
    return items


def _unknown(variable: str, section: str) -> SettingsProblem:
    names = {
        section: [f"{section}__{name}".upper() for name in table.model_fields]
        for section, table in SECTIONS.items()
    }
    if section in names:
        expected = one_of(PREFIX + name for name in names[section])
    else:
        expected = f"{PREFIX}SHADOW or a value of {one_of(names)}"
    # Without the prefix, which would make any two names look alike.
    nearest = nearest_name(variable.removeprefix(PREFIX), ["SHADOW", *chain(*names.values())])
    return SettingsProblem(ENVIRONMENT, variable, "unknown name", expected, nearest and PREFIX + nearest)
