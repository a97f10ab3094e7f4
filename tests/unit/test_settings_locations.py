"""The line and the column of everything in a settings file."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw._internal.settings import Settings, SettingsError
from ratelimit_mw._internal.settings.errors import path_of
from ratelimit_mw._internal.settings.locations import located, locations_of
from tests.support.apps import ROOT

FILES = [
    *ROOT.glob("tests/settings_*/*.toml"),
    *ROOT.glob("examples/**/*.toml"),
    ROOT / "pyproject.toml",
]

TEXT = """\
# a comment with [brackets] and "quotes"
backend = { url = "redis://h", timeout = "x" }
[plans.pro]
requests = [
  "60/m",   # one
  "5/hour", # ]
]
concurrent.limitt = 5
[plans."odd \\"name\\""]
requests = ['1/x']

[[routes]]
path = \"\"\"
/a\"\"\"
[[routes]]
path = "b"
[[keys]]
key = "k"
[keys.spending]
daily = "0"
"""


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Every path in what a file holds."""
    if path:
        yield path_of(path)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield from paths(each, (*path, name))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_everything_in_a_file_has_a_place(file: Path) -> None:
    """Every name, table and item is found, within the file, whatever TOML the file uses."""
    text = file.read_bytes().decode("utf-8", errors="replace")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    locations = locations_of(text)
    lines = text.split("\n")
    assert set(paths(values)) - set(locations) == set()
    assert all(
        1 <= line <= len(lines) and column <= len(lines[line - 1]) for line, column in locations.values()
    )


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("backend.timeout", (2, 32)),
        ("plans.pro", (3, 1)),
        ("plans.pro.requests[0]", (5, 3)),
        ("plans.pro.requests[1]", (6, 3)),
        ("plans.pro.concurrent.limitt", (8, 1)),
        ('plans."odd \\"name\\"".requests[0]', (10, 13)),
        ("routes[0].path", (13, 1)),
        ("routes[1]", (15, 1)),
        ("keys[0].spending.daily", (20, 1)),
    ],
)
def test_a_path_has_its_location(path: str, location: tuple[int, int]) -> None:
    """Comments, strings of several lines, inline tables, dotted names and arrays of tables are read past."""
    assert locations_of(TEXT)[path] == location


def test_every_problem_is_located(tmp_path: Path) -> None:
    """A missing entry is placed at the table it belongs in; a text begins with file, line and column."""
    file = tmp_path / "s.toml"
    file.write_text(TEXT)
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    problems = located(caught.value, TEXT, str(file)).problems
    locations = {problem.path: problem.location for problem in problems}
    assert locations["keys[0].plan"] == (17, 1)
    assert locations["plans.pro.requests[0]"] == (5, 3)
    assert None not in locations.values()
    assert str(problems[0]).startswith(f"{file}:2:32: backend.timeout: ")


@pytest.mark.parametrize("text", ["a = ", "a", "a = [1, 2", '"', "a = {b = "])
def test_what_is_no_toml_has_the_place_that_the_parser_tells(text: str, tmp_path: Path) -> None:
    """A syntax error is placed, too; no text makes the reader fail."""
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    (problem,) = located(caught.value, text, str(file)).problems
    assert problem.location is not None
    assert problem.location[0] == 1 + text.count("\n")
