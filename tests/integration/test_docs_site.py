"""The documentation's site: built strictly, complete, and where messages of the package point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ratelimit_mw._internal.settings.findings import DOCS, PAGE
from ratelimit_mw._internal.settings.schema import SCHEMA_URL, json_schema
from tests.support.apps import ROOT
from tools.site_hooks import public_names

pytestmark = [pytest.mark.rerun, pytest.mark.once]

SOURCES = {
    file: file.read_text("utf-8")
    for folder in ("ratelimit_mw", "examples")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".toml", ".js", ".html")
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: any warning, broken link or missing anchor fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def ids(site: Path, page: str) -> set[str]:
    """Anchors of a page of the site."""
    return set(re.findall(r'\bid="([^"]+)"', (site / page / "index.html").read_text("utf-8")))


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """A reader finds each page from every other one."""
    home = (site / "index.html").read_text("utf-8")
    navigation = home[home.index("md-nav--primary") :]
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert len(pages) > 20
    assert [page for page in sorted(pages) if f'href="{page}/"' not in navigation] == []


def test_no_page_is_named_twice() -> None:
    """A reader meets each page once in the navigation, by its own title, and each question once at home."""
    navigation = re.findall(
        r"^ +- ([^:]+): (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE
    )
    assert len(navigation) > 20
    for title, page in navigation:
        assert [name for name, of in navigation if of == page] == [title]
        heading = (ROOT / "docs" / page).read_text("utf-8").partition("\n")[0].removeprefix("# ")
        assert title in (heading, "Home"), page
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", (ROOT / "docs" / "index.md").read_text("utf-8"), re.MULTILINE)
    for column in zip(*rows, strict=True):
        cells = [link for cell in column for link in re.findall(r"\]\(([^)]+)\)", cell) or [cell]]
        assert len(cells) == len(set(cells)) > 10


def test_every_finding_has_its_anchor(site: Path) -> None:
    """A start-up message points at a section that is there."""
    names = {name for text in SOURCES.values() for name in re.findall(r"\bFinding\(\s*\"([a-z-]+)\"", text)}
    assert len(names) > 20
    assert sorted(names - ids(site, PAGE.removeprefix(DOCS).strip("/"))) == []


def test_every_address_in_the_package_is_there(site: Path) -> None:
    """Every address of the site in the package, an example or the project's metadata exists."""
    texts = [*SOURCES.values(), (ROOT / "pyproject.toml").read_text("utf-8")]
    pattern = rf"(?:{re.escape(DOCS)}|\{{DOCS\}})(/[\w./-]*)?(?:#([\w-]+))?"
    found = {match for text in texts for match in re.findall(pattern, text)}
    assert {("/checks/", ""), ("/ratelimit.schema.json", "")} <= found
    for path, anchor in found:
        target = site / path.strip("/")
        assert target.exists(), path
        assert not anchor or anchor in ids(site, path.strip("/")), anchor


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    """Every name that an app can import is on the page of the API."""
    assert sorted(set(public_names()) - ids(site, "api")) == []


def test_the_schema_is_where_it_says(site: Path) -> None:
    """Editors that are given the schema's address get the schema."""
    served = (site / SCHEMA_URL.removeprefix(DOCS).strip("/")).read_text("utf-8")
    assert json.loads(served) == json_schema()


def test_no_page_fetches_from_elsewhere(site: Path) -> None:
    """Pages bring along their scripts, styles, fonts and pictures."""
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link)\b[^>]*>", page.read_text("utf-8"))
        fetched = [tag for tag in tags if re.search(r'(?:src|href)="?https?:', tag)]
        assert [tag for tag in fetched if 'rel="canonical"' not in tag and "rel=canonical" not in tag] == []


def test_links_out_of_the_pages_lead_to_the_repository(site: Path) -> None:
    """A link that leads out of docs/ in a checkout leads to the same file of this version on the site."""
    text = (site / "operations" / "index.html").read_text("utf-8")
    targets = re.findall(r'href="https://github.com/ratelimit-mw/ratelimit-mw/blob/v[\d.]+/([^"#]+)"', text)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
