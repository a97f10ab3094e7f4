"""The prose of the code: docstrings open with a noun or a verb, not with a riddle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
RIDDLE = re.compile(r"(What|Who|Whose|Whom|Where|When|How|Which|Why|The same|As|Those|That)\b")


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Find the docstrings of modules, classes, functions and attributes, each with its line."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            value = each.value if isinstance(each, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield each.lineno, value.value.strip()


@pytest.mark.parametrize("folder", ["ratelimit_mw", "tests", "benchmarks", "examples"])
def test_no_docstring_opens_with_a_riddle(folder: str) -> None:
    """A docstring opens with what its object is or does: none begins with What, Who, Where and the like."""
    riddles = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path.read_text("utf-8"))
        if RIDDLE.match(text)
    ]
    assert riddles == []
