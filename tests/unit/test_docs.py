"""The pages under docs/: complete, linked, and true where a test can tell."""

import re
import tomllib
from pathlib import Path

import pytest

from ratelimit_mw import Settings
from tests.support.apps import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
WRAPPED = [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY"))]
PRIVATE = ROOT / "ratelimit_mw" / "_internal"
HOW_IT_WORKS = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """A page that is moved or renamed takes its links along."""
    targets = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)", page.read_text(encoding="utf-8"))
    for name, anchor in targets:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in _anchors(target), f"{name}#{anchor}"


@pytest.mark.parametrize("page", WRAPPED, ids=lambda page: page.name)
def test_prose_wraps_at_100_columns(page: Path) -> None:
    """A line of prose fits on a screen; tables, code and single words may be longer."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "    "))]
    breakable = [line for line in lines if " " in re.sub("`[^`]*`", "", line.strip(" -"))]
    assert [line for line in breakable if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_settings_block_loads(page: Path) -> None:
    """Text that is printed as settings is accepted as settings."""
    for text in re.findall(
        r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        Settings(**tomllib.loads(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_compiles(page: Path) -> None:
    """Text that is printed as Python is Python; it stands inside a coroutine."""
    for text in re.findall(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        compile("async def f():\n" + re.sub(r"^", "    ", text, flags=re.MULTILINE), page.name, "exec")


def test_the_picture_of_the_folders_is_that_of_the_layers() -> None:
    """The folders are listed as they may import one another: each may import those below it."""
    shown = re.findall(r"^\| `(\w+)/` \| ", HOW_IT_WORKS, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = [each["layers"] for each in contracts if each.get("containers") == ["ratelimit_mw._internal"]]
    assert shown == [folder for layer in layers for folder in layer.split(" : ")]


def test_the_way_of_a_request_is_that_of_the_code() -> None:
    """The way has ten steps at most, and each of its modules has the class and the method that are named."""
    steps = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \| `(\w+)\.(\w+)` \|", HOW_IT_WORKS, re.MULTILINE)
    assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1))
    assert 5 < len(steps) <= 10
    for _, module, owner, method in steps:
        text = (PRIVATE / module).read_text(encoding="utf-8")
        assert re.search(rf"^class {owner}\b", text, re.MULTILINE), (module, owner)
        assert re.search(rf"^    (async )?def {method}\(", text, re.MULTILINE), (module, method)


def test_how_it_works_names_what_there_is() -> None:
    """Every file that the page names exists, and every class, method and attribute is in the code."""
    names = re.findall(r"`([^`\n]+)`", HOW_IT_WORKS)
    there = [path for path in (ROOT / "ratelimit_mw").rglob("*") if path.suffix in (".py", ".pyx", ".lua")]
    paths = [f"/{path.relative_to(ROOT)}" for path in (*there, *PRIVATE.rglob("*.pxd"))]
    files = [name for name in names if re.fullmatch(r"[\w/-]+\.(py|pyx|pxd|lua|md|toml|acl)", name)]
    assert len(files) > 50
    for name in files:
        assert (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in paths), name
    code = "\n".join(path.read_text(encoding="utf-8") for path in there)
    words = set(re.findall(r"\w+", code))
    named = re.compile(r"[A-Z]\w+(\.\w+)?|_?[a-z]*(_[a-z]+)+")
    parts = {
        part for name in names if name not in files and named.fullmatch(name) for part in name.split(".")
    }
    assert len(parts) > 50
    assert parts - words == set()


def test_the_tests_that_show_attacks_are_there() -> None:
    """Each attack is shown by a test in a folder of `tests/`, and the page says in which."""
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    tests = re.findall(r"`(\w+/test_\w+\.py)`", page)
    rows = re.findall(r"^\| (?!They try|---).*", page, re.MULTILINE)
    assert len(tests) >= len(rows) > 10
    assert [name for name in tests if not (ROOT / "tests" / name).is_file()] == []


def test_every_folder_of_tests_is_explained() -> None:
    """CONTRIBUTING.md has a row for each folder with tests or helpers, and the files that it names exist."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    there = {folder.parent.name for folder in (ROOT / "tests").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `tests/(\w+)/` \| ", page, re.MULTILINE)) == there
    named = re.findall(r"`(tests/[\w/]+(?:/|\.py))`", page)
    assert [name for name in named if not (ROOT / name).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
