"""Output of commands: tables for people, JSON for programs, one line for an error."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ratelimit_mw._internal.runtime.printable import printable

WIDTH = 140
"""Columns of a table that goes to a file or another program, which have no width of their own."""
WIDEST = 10_000
"""Columns, at most, of a table whose cells can't be divided."""
PAGE = 500
"""Rows of a table that are laid out together."""


class _SafeConsole(Console):
    """A console on which texts from outside, such as paths and accounts, are nothing but text."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; of plain texts every character that is not printed is replaced."""
        super().print(*[printable(each) if isinstance(each, str) else each for each in objects], **options)

    def out(self, *objects: Any, **options: Any) -> None:
        """Print objects as they are, line breaks included."""
        super().print(*objects, no_wrap=True, overflow="ignore", crop=False, **options)


console = _SafeConsole(markup=False, highlight=False, emoji=False)
errors = _SafeConsole(markup=False, highlight=False, emoji=False, stderr=True)
if not console.is_terminal:
    console.width = WIDTH


DONE, REFUSED, MISUSED, AWAY = range(4)
"""Exit statuses: done; refused by what was found, such as bad settings; wrong usage; backend away or rights
missing."""


class CommandError(Exception):
    """A command can't do what it was asked to. Its text is the one line that says why."""

    status = REFUSED
    """Exit status of the command."""


class UsageError(CommandError):
    """A command was given what it can't take."""

    status = MISUSED


def escape_what_is_not_in_encoding() -> None:
    """Have characters that the encoding of standard output lacks written as escapes, as in errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_json(value: object) -> None:
    """Print a value as JSON."""
    is_utf_8 = console.encoding.replace("_", "-").startswith("utf-8")
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf_8)
    # Nothing but line breaks stands outside the texts, and within them JSON escapes those itself.
    text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    console.out(text, highlight=False)


def print_error(text: str) -> None:
    """Print the one line that a command fails with."""
    errors.out(f"ratelimit-mw: {printable(' '.join(text.split()))}", highlight=False)


_notes: list[str] = []


def note(text: str) -> None:
    """Have something said beside what the command prints, once it has ended."""
    _notes.append(" ".join(text.split()))


def take_notes() -> list[str]:
    """Return the notes made since the last call, and forget them."""
    notes = [*_notes]
    _notes.clear()
    return notes


def print_notes() -> None:
    """Print what was noted, on the output for errors."""
    for text in take_notes():
        errors.out(f"note: {printable(text)}", highlight=False)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names with their values, one a line."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(Text(f"{name:<{width}}", style="bold"), value, sep="  ", soft_wrap=True)


def without_unused(
    columns: Sequence[str], rows: Iterable[Sequence[object]], name: str
) -> tuple[list[str], list[list[object]]]:
    """Leave a column out of a table where no row has anything in it."""
    kept, at = [list(row) for row in rows], columns.index(name)
    if any(row[at] != "-" for row in kept):
        return list(columns), kept
    return [each for each in columns if each != name], [row[:at] + row[at + 1 :] for row in kept]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, whole: bool = False) -> None:
    """Print rows under bold headings; what is too long goes on in the next line, or stays `whole`.

    Many rows come page by page, so that the first are there at once. Where they go into a file, a bar on the
    terminal shows how far it is.
    """
    rows = list(rows)
    pages = [rows[start : start + PAGE] for start in range(0, len(rows), PAGE)] or [rows]
    shows_bar = len(pages) > 1 and errors.is_terminal and not console.is_terminal
    for page in track(pages, "printing", console=errors, transient=True, disable=not shows_bar):
        if whole:
            print_whole(_table(columns, page))
        else:
            console.print(_table(columns, page))


def print_whole(renderable: RenderableType) -> None:
    """Print something as wide as it needs to be, so that nothing in it is divided."""
    own = console.width
    options = console.options.update(width=WIDEST)
    console.width = max(own, console.measure(renderable, options=options).maximum)
    console.print(renderable)
    console.width = own


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[printable(str(cell)) for cell in row])
    return table
