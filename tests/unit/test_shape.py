"""Shape of the package: short files, and a guide to the modules of each folder."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ratelimit_mw"
INTERNAL = PACKAGE / "_internal"
MOST_LINES = 350

pytestmark = pytest.mark.once


def test_no_file_is_long() -> None:
    """A file of Python, Cython or Lua has 350 lines at most: a longer one holds two concepts."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".lua")]
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert len(lines) > 200
    assert {name: number for name, number in lines.items() if number > MOST_LINES} == {}


@pytest.mark.parametrize(
    "folder", [path.parent for path in sorted(INTERNAL.rglob("__init__.py"))], ids=lambda path: path.name
)
def test_a_folder_names_its_modules(folder: Path) -> None:
    """The docstring of a folder names each module and folder in it, and none that is not there."""
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    named = set(re.findall(r"`([\w/]+(?:\.(?:py|pyx|lua|toml)|/))`", doc))
    inside = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    inside |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert inside - named == set()
    places = (folder, folder / "lua", INTERNAL, PACKAGE.parent)
    assert [name for name in sorted(named) if not any((place / name).exists() for place in places)] == []
