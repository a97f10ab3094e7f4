"""Loader of the Lua scripts: each is one text, put together of files in `lua/`.

A file says with `-- include name` where another one stands. Constants (each `local NAME = value` of one
value, in capitals) are written where they are used, and comments are left out: neither costs the server any
time.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).with_name("lua")
_INCLUDE = re.compile(r"^ *-- include (\w+)\n", re.MULTILINE)
_CONSTANT = re.compile(r"^local ([A-Z_]+) = (?:byte\('(.)'\)|(\S+))(?: --.*)?\n", re.MULTILINE)
_TOKEN = re.compile(r"(?P<string>'[^']*')|(?P<comment> *--.*)|\b(?P<name>[A-Z_]+)\b")
_INDENTATION = re.compile(r"^\s+", re.MULTILINE)
"""Blanks before a line, and empty lines."""


class Script(NamedTuple):
    """A script, and the name that a server has for it."""

    text: str
    digest: str


@cache
def get_script(name: str) -> Script:
    """Return a script, put together when it is first asked for."""
    text = load_script(name)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def load_script(name: str) -> str:
    """Put a script together from its file and those that it includes."""
    return with_constants(_with_includes(name))


def _with_includes(name: str) -> str:
    text = _FOLDER.joinpath(f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda line: _with_includes(line[1]), text)


def with_constants(text: str) -> str:
    """Write the constants of a script where they are used, and leave out comments and indentation.

    Raises ValueError where two constants have one name.
    """
    values: dict[str, str] = {}
    for name, letter, value in _CONSTANT.findall(text):
        if name in values:
            raise ValueError(f"{name} is defined twice in the Lua files of a script: rename one of the two")
        values[name] = str(ord(letter)) if letter else value

    def written(found: re.Match[str]) -> str:
        if found["comment"]:
            return ""
        return found["string"] or values.get(found["name"], found["name"])

    return _INDENTATION.sub("", _TOKEN.sub(written, _CONSTANT.sub("", text)))
