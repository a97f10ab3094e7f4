"""Locations in a settings file: the line and the column of each name and value.

The standard library reads TOML and tells no locations. The text here is known to be TOML, so that a reader of
names, brackets and quotes will do.
"""

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ratelimit_mw._internal.settings.errors import SettingsError, SettingsProblem, path_of

_BLANK = re.compile(r"(?:[ \t]|\r?\n|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""{1,3}(?!")|\'\'\'.*?\'\'\'{1,3}(?!\')|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL
)
_BARE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}#\n]+")
_SYNTAX = re.compile(r"line (\d+)(?:, column (\d+))?")
_STEP = re.compile(r"(?:\.[^.\[\]\"]+|\.?\"(?:[^\"\\]|\\.)*\"|\[\d+\])$")

Path = tuple[str | int, ...]


class Location(NamedTuple):
    """A line and a column, both from 1 on."""

    line: int
    column: int


def locations_of(text: str) -> Mapping[str, Location]:
    """The location of everything in a TOML text, by its path as errors write it."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    found: dict[str, Location] = {}
    for path, offset in _Reader(text).read():
        line = bisect_right(starts, offset)
        found.setdefault(path_of(path), Location(line, offset - starts[line - 1] + 1))
    return found


def located(error: SettingsError, text: str, file: str) -> SettingsError:
    """An error whose problems in a file of this text have their locations."""
    try:
        locations = locations_of(text)
    except (IndexError, ValueError, RecursionError):
        locations = {}  # no TOML
    return SettingsError(
        problem._replace(location=_location(problem, locations)) if problem.file == file else problem
        for problem in error.problems
    )


def _location(problem: SettingsProblem, locations: Mapping[str, Location]) -> tuple[int, int] | None:
    syntax = _SYNTAX.search(problem.what)
    if not problem.path:
        return (int(syntax[1]), int(syntax[2] or 1)) if syntax else None
    path = problem.path
    while path not in locations:  # what is missing is looked for where it should be
        shorter = _STEP.sub("", path)
        if shorter == path:
            return None
        path = shorter
    return locations[path]


class _Reader:
    """Reads a TOML text once, from its beginning to its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counts: dict[Path, int] = {}
        """Number of tables found so far in each array of tables."""

    def read(self) -> Iterator[tuple[Path, int]]:
        """Every path with its offset. Raises IndexError for what is not TOML."""
        table: Path = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                start = self._at
                table = self._header()
                for length in range(1, len(table) + 1):
                    yield table[:length], start
            else:
                yield from self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> Path:
        is_array = self._text[self._at + 1] == "["
        self._at += 1 + is_array
        name = self._name()
        self._at += 1 + is_array
        path: Path = ()
        for step in name[:-1]:
            path = self._last((*path, step))
        path = (*path, name[-1])
        if is_array:
            self._counts[path] = self._counts.get(path, -1) + 1
        return self._last(path)

    def _last(self, path: Path) -> Path:
        """The last table of an array of tables; the path itself for anything else."""
        return (*path, self._counts[path]) if path in self._counts else path

    def _pair(self, table: Path) -> Iterator[tuple[Path, int]]:
        start = self._at
        name = self._name()
        for length in range(1, len(name) + 1):
            yield (*table, *name[:length]), start
        self._at += 1  # the equals sign
        self._skip(_SPACE)
        yield from self._value((*table, *name))

    def _name(self) -> tuple[str, ...]:
        steps = []
        while True:
            self._skip(_SPACE)
            match = _STRING.match(self._text, self._at) or _BARE_NAME.match(self._text, self._at)
            if match is None:
                raise IndexError("no name")
            self._at = match.end()
            is_quoted = match[0][0] in "\"'"
            steps.append(tomllib.loads(f"name = {match[0]}")["name"] if is_quoted else match[0])
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return tuple(steps)
            self._at += 1

    def _value(self, path: Path) -> Iterator[tuple[Path, int]]:
        first = self._text[self._at]
        if first == "[":
            yield from self._items(path)
        elif first == "{":
            yield from self._inline(path)
        else:
            match = _STRING.match(self._text, self._at) or _BARE_VALUE.match(self._text, self._at)
            if match is None:
                raise IndexError("no value")
            self._at = match.end()

    def _items(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        index = 0
        while self._next() != "]":
            yield (*path, index), self._at
            yield from self._value((*path, index))
            index += 1
            if self._next() == ",":
                self._at += 1
        self._at += 1

    def _inline(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        while self._next() != "}":
            yield from self._pair(path)
            if self._next() == ",":
                self._at += 1
        self._at += 1

    def _next(self) -> str:
        self._skip(_BLANK)
        return self._text[self._at]

    def _skip(self, what: re.Pattern[str]) -> None:
        match = what.match(self._text, self._at)
        self._at = match.end() if match else self._at
