"""Tests that run once: what they leave untested in Python alone is not code of this process."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILED = {
    ".".join(types.relative_to(ROOT).with_suffix("").parts)
    for types in (ROOT / "ratelimit_mw").rglob("*.pxd")
}
ENTRANCES = {
    "ratelimit_mw.Limiter",
    "ratelimit_mw.RateLimitMiddleware",
    "tests.support.asgi",
    "tests.support.conformance",
    "tests.support.commands",
}
"""Names by which a test gets at compiled code without naming its module."""


def imported(module: Path) -> set[str]:
    """Return the modules that a file imports anywhere, and the names that it imports from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *[f"{node.module}.{each.name}" for each in node.names]}
    return found


def test_modules_that_run_once_import_nothing_compiled() -> None:
    """A module marked `once` as a whole imports no compiled module, and nothing that decides for it."""
    marked = re.compile(r"^pytestmark = .*pytest\.mark\.once\b", re.MULTILINE)
    modules = [path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text("utf-8"))]
    assert len(modules) > 10
    wrong = {path.name: imported(path) & (COMPILED | ENTRANCES) for path in modules}
    assert {name: found for name, found in wrong.items() if found} == {}
