"""Hooks of mkdocs: what the site needs beside the pages in docs/, which are read on a code host, too."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import ratelimit_mw
from ratelimit_mw import __version__
from ratelimit_mw._internal.settings.schema import SCHEMA_URL, json_schema

_OUTSIDE = re.compile(r"(!?)(\[[^\]]*\])\(\.\./([^)\s]+)\)")
_FILE = re.compile(r"\[([\w-]+\.md)\]\((?=\1[)#])")
"""A link to a page that is called by its file's name, as on a code host."""
_REPOSITORY = "https://github.com/ratelimit-mw/ratelimit-mw"


def on_config(config: MkDocsConfig) -> None:
    """Name the version that is documented."""
    config.site_name = f"ratelimit-mw {__version__}"


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add what pages show of other folders, the JSON schema, and pages that the navigation lacks."""
    schema = json.dumps(json_schema(), indent=2)
    files.append(File.generated(config, SCHEMA_URL.rpartition("/")[2], content=schema))
    for picture in Path(config.docs_dir, "../benchmarks/results").glob("*.svg"):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    named = str(config.nav)
    (guides,) = [section["Guides"] for section in config.nav or () if "Guides" in section]
    guides += [page.src_uri for page in files.documentation_pages() if f"'{page.src_uri}'" not in named]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Lead links out of docs/ to the repository, and call pages by their titles.

    The page of the API gets the public names that it lacks.
    """
    if page.file.src_uri == "api.md":
        lacking = [name for name in public_names() if not re.search(rf"^::: {name}$", markdown, re.MULTILINE)]
        further = "".join([f"\n::: {name}\n" for name in lacking])
        markdown += f"\n## Further names\n{further}" if further else ""
    titled = _FILE.sub(lambda link: f"[{_title(Path(config.docs_dir, link[1]))}](", markdown)
    return _OUTSIDE.sub(_absolute, titled)


def public_names() -> list[str]:
    """Return the names that apps import: those of the package, and its public modules."""
    names = [f"ratelimit_mw.{name}" for name in ratelimit_mw.__all__ if not name.startswith("_")]
    modules = [module.stem for module in Path(ratelimit_mw.__path__[0]).glob("[!_]*.py")]
    return names + [f"ratelimit_mw.{name}" for name in sorted(modules)]


def _title(page: Path) -> str:
    return page.read_text("utf-8").partition("\n")[0].removeprefix("# ")


def _absolute(link: re.Match[str]) -> str:
    image, text, path = link.groups()
    target = f"images/{Path(path).name}" if image else f"{_REPOSITORY}/blob/v{__version__}/{path}"
    return f"{image}{text}({target})"
