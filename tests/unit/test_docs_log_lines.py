"""The page about troubleshooting: every line that the library logs is explained there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apps import ROOT

pytestmark = pytest.mark.once

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")
SECTION = PAGE[PAGE.index("## Lines of the log") : PAGE.index("## Answers")]
SHOWN = [
    line
    for cell in re.findall(r"^\| (`[^|]+) \| ", SECTION, re.MULTILINE)
    for line in re.findall(r"`([^`]+)`", cell)
]


def texts(expression: ast.expr, module: ast.Module) -> Iterator[str]:
    """Find the texts that an expression may be, `…` in place of what is filled in."""
    match expression:
        case ast.Constant(value=str(text)):
            yield re.sub(r"%[.\d]*[a-z]", "…", text).partition("\n")[0]
        case ast.JoinedStr(values=parts):
            yield "".join([str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts])
        case ast.SetComp(elt=each):
            yield from texts(each, module)
        case ast.BinOp(left=left):
            yield from texts(left, module)
        case ast.Call(func=ast.Name(), args=[first, *_]):
            yield from texts(first, module)
        case ast.Name(id=name):
            for node in ast.walk(module):
                match node:
                    case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                        yield from texts(value, module)
                    case ast.For(target=ast.Name(id=target), iter=value) if target == name:
                        yield from texts(value, module)


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Find what a module logs, each text with its place."""
    module = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=level), args=arguments):
                if level not in LEVELS:
                    continue
                message, *rest = arguments[1:] if level == "log" else arguments
                if ast.unparse(message) == "'%s'":
                    (message,) = rest
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield from ((place, text) for text in [*texts(message, module)] or ["?"])


def is_form(form: str, line: str) -> bool:
    """Whether a line is of a form, whatever its `…` stand for."""
    return re.fullmatch(".*".join(map(re.escape, form.split("…"))), line) is not None


def fit(shown: str, text: str) -> bool:
    """Whether a text of the code and a line of the page may be the same line of a log."""
    return is_form(shown, text.replace("…", "x")) or is_form(text, shown.replace("…", "x"))


def logged() -> list[tuple[str, str]]:
    """Find every line of the library; findings of checks have a page of their own."""
    modules = sorted((ROOT / "ratelimit_mw").rglob("*.py"))
    return [line for module in modules if module.name != "findings.py" for line in lines(module)]


def test_every_log_line_is_explained() -> None:
    """Whoever meets a line in the log finds it on the page, with its cause and what to do."""
    found = logged()
    assert len(found) > 40
    unknown = [f"{place}: {text}" for place, text in found if not any(fit(shown, text) for shown in SHOWN)]
    assert unknown == []


def test_no_line_is_explained_that_there_is_not() -> None:
    """A line on the page is one that the library can log."""
    assert len(SHOWN) > 40
    found = [text for _, text in logged()]
    assert [shown for shown in SHOWN if not any(fit(shown, text) for text in found)] == []


def test_every_background_job_is_named() -> None:
    """The line about a job that failed is shown with the name of each job."""
    modules = (ROOT / "ratelimit_mw").rglob("*.py")
    names = {
        name
        for module in modules
        for name in re.findall(r"\bJob\(\s*\"([^\"]+)\"", module.read_text("utf-8"))
    }
    assert len(names) > 4
    assert [name for name in names if f"`{name} failed`" not in PAGE] == []


def test_every_check_has_a_section() -> None:
    """The page sends readers of a finding to the page of checks, which has every finding."""
    checks = (ROOT / "docs" / "checks.md").read_text("utf-8")
    sources = [module.read_text("utf-8") for module in (ROOT / "ratelimit_mw").rglob("*.py")]
    names = {name for source in sources for name in re.findall(r"\bFinding\(\s*\"([a-z-]+)\"", source)}
    assert len(names) > 20
    assert [name for name in names if f"### {name}\n" not in checks] == []


def test_every_code_of_an_answer_is_explained() -> None:
    """Each code that an answer may have is on the page, with its cause."""
    answers = PAGE[PAGE.index("## Answers") : PAGE.index("## Effects")]
    folders = [ROOT / "ratelimit_mw" / "_internal" / name for name in ("asgi", "policy", "responses")]
    sources = [module.read_text("utf-8") for folder in folders for module in folder.rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r"\"([A-Z]+(?:_[A-Z]+)+)\"", source)}
    assert len(codes) > 8
    assert sorted(code for code in codes if f"code `{code}` | " not in answers) == []
