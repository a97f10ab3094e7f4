"""Errors of the settings with all that helps to put them right: file, path, fault, expected, nearest.

Values are shown only where a check shows them on purpose, since a file holds API keys, passwords and secrets.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from ratelimit_mw._internal.runtime.printable import printable

_FAULT = "settings"
_PARTS = ("what", "expected", "nearest")
_BARE_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
_KINDS = {bool: "a boolean", int: "a whole number", float: "a float", str: "a string"} | {
    list: "a list",
    tuple: "a list",
    dict: "a table",
}
_WANTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "tuple_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_RANGES = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")} | {
    "greater_than": ("gt", "more than"),
}


class SettingsProblem(NamedTuple):
    """One thing that is wrong, and where."""

    file: str
    """The settings file, or `environment`."""
    path: str
    """Path in it, such as `plans.pro.requests[1]`; the variable's name for the environment."""
    what: str
    expected: str = ""
    nearest: str = ""
    """The nearest valid name, where one is near."""
    location: tuple[int, int] | None = None
    """Line and column in the file, where somebody has looked them up."""

    def __str__(self) -> str:
        file = self.file if self.location is None else f"{self.file}:{self.location[0]}:{self.location[1]}"
        where = ": ".join(part for part in (file, self.path) if part)
        text = f"{where}: {self.what}"
        text += f"; expected {self.expected}" if self.expected else ""
        return printable(text + (f"; did you mean '{self.nearest}'?" if self.nearest else ""))


class SettingsError(Exception):
    """The settings can't be used. `problems` has all that is wrong; the text is one line for each."""

    def __init__(self, problems: Iterable[SettingsProblem]) -> None:
        self.problems: tuple[SettingsProblem, ...] = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def fault(what: str, expected: str = "", nearest: str = "") -> PydanticCustomError:
    """Return the error that a validator raises for one value."""
    return PydanticCustomError(_FAULT, "{what}", {"what": what, "expected": expected, "nearest": nearest})


def faults(found: Iterable[tuple[tuple[int | str, ...], PydanticCustomError]]) -> ValidationError:
    """Return one error that holds several faults, each at a path below the value being validated."""
    lines = [InitErrorDetails(type=error, loc=path, input=None) for path, error in found]
    return ValidationError.from_exception_data("settings", lines, hide_input=True)


def in_our_words(error: ValidationError, names: Iterable[str]) -> ValidationError:
    """Return `error` with every fault put as `fault` does; `names` are those the table may have."""
    return faults((line["loc"], _fault_of(line, list(names))) for line in error.errors(include_url=False))


def problems_of(error: ValidationError, file: str) -> list[SettingsProblem]:
    """Return what an error that went through `in_our_words` holds."""
    return [
        SettingsProblem(file, path_of(line["loc"]), *(line["ctx"][part] for part in _PARTS))
        for line in error.errors(include_url=False)
    ]


def path_of(steps: Iterable[int | str]) -> str:
    """Return `plans.pro.requests[1]` for `("plans", "pro", "requests", 1)`."""
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]":  # pydantic's mark for the name of a table, whose path already names it
            path += ("." if path else "") + _name(step)
    return path


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return that one of `names` which `name` most likely stands for, or nothing."""
    by_folded = {known.casefold(): known for known in names}
    from difflib import get_close_matches  # noqa: PLC0415 - for those who misspell a name

    close = get_close_matches(name.casefold()[:100], by_folded, n=1)
    return by_folded[close[0]] if close else ""


def unknown_name(name: str, names: Iterable[str]) -> PydanticCustomError:
    """Return the error for a name that a table doesn't have."""
    names = list(names)
    return fault("unknown name", one_of(names), nearest_name(name, names))


def one_of(names: Iterable[str]) -> str:
    """Return `'a', 'b' or 'c'`."""
    *first, last = [f"'{name}'" for name in names]
    return f"{', '.join(first)} or {last}" if first else last


def shown(value: object) -> str:
    """Return a value as an error shows it: on one line and not too long. Not for secrets."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}…{text[-1]}"


def type_name(value: object) -> str:
    """Return what TOML calls a value of this type."""
    return next((words for kind, words in _KINDS.items() if isinstance(value, kind)), "a date or time")


def _fault_of(line: Mapping[str, Any], names: list[str]) -> PydanticCustomError:
    kind, value, context = line["type"], line["input"], line.get("ctx", {})
    if kind == _FAULT:
        return fault(context["what"], context["expected"], context["nearest"])
    if kind == "extra_forbidden":
        return unknown_name(str(line["loc"][-1]), names)
    if kind == "missing":
        return fault("is missing")
    if kind in _WANTED:
        return fault(f"is {type_name(value)}", _WANTED[kind])
    if kind in _RANGES:
        name, words = _RANGES[kind]
        return fault(f"{shown(value)} is out of range", f"{words} {context[name]:.15g}")
    if kind == "finite_number":
        return fault(f"{shown(value)} is not a finite number")
    if kind == "literal_error":
        return _choice_fault(value, context["expected"])
    return fault(line["msg"])


def _choice_fault(value: object, expected: str) -> PydanticCustomError:
    choices = re.findall(r"'([^']*)'", expected)
    if choices and not isinstance(value, str):
        return fault(f"is {type_name(value)}", expected)
    return fault(f"{shown(value)} is not a choice", expected, nearest_name(str(value), choices))


def _name(step: str) -> str:
    if _BARE_NAME.fullmatch(step):
        return step
    return json.dumps(step if len(step) <= 60 else step[:60] + "…", ensure_ascii=False)
