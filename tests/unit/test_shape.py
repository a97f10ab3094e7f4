"""Shape of the package: no file of it takes longer to read than a reader has patience."""

from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ratelimit_mw"
MOST_LINES = 350

pytestmark = pytest.mark.once


def test_no_file_is_long() -> None:
    """A file of Python, Cython or Lua has 350 lines at most: a longer one holds two concepts."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".lua")]
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert len(lines) > 200
    assert {name: number for name, number in lines.items() if number > MOST_LINES} == {}
