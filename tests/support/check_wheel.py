"""Run by a Python that has the built wheel and its required dependencies, and nothing else.

The wheel holds every file of the package, and every module that needs no extra can be imported from it. Its
metadata lead to pages that exist for readers of the index. `--compiled` asks for compiled modules, too.
"""

import importlib
import importlib.metadata
import pkgutil
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "ratelimit_mw"
NEED_EXTRAS = {"typer", "rich", "uvicorn", "prometheus_client", "opentelemetry"}
URLS = {"Changelog", "Documentation", "Homepage", "Issues", "Source"}


def main() -> int:
    """Report what is missing; the exit status says whether anything is."""
    package = importlib.import_module("ratelimit_mw")
    installed = Path(str(package.__file__)).parent
    problems = []
    if installed == SOURCE:
        problems.append("imported from the source tree")
    problems += [f"not in the wheel: {name}" for name in sorted(_files(SOURCE) - _files(installed))]
    problems += [f"not in the source: {name}" for name in sorted(_files(installed) - _files(SOURCE))]
    if "--compiled" in sys.argv:
        problems += [f"not compiled: {name}" for name in _uncompiled(installed)]
    problems += _failed_imports(list(package.__path__))
    metadata = importlib.metadata.metadata("ratelimit-mw")
    if metadata["Version"] != package.__version__:
        problems.append("the wheel has another version than the package")
    named = {url.partition(",")[0] for url in metadata.get_all("Project-URL") or ()}
    problems += [f"no project URL: {name}" for name in sorted(URLS - named)]
    problems += [f"no whole link: {link}" for link in _partial_links(str(metadata.json["description"]))]
    sys.stdout.write("\n".join(problems) + "\n" if problems else f"wheel {package.__version__}: complete\n")
    return bool(problems)


def _files(folder: Path) -> set[str]:
    """Return the files of the package that a wheel for any platform has."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith((".so", ".pyd"))
    }


def _uncompiled(installed: Path) -> list[str]:
    """Modules with C types that have no compiled module for this Python beside them."""
    types = installed.rglob("*.pxd")
    return [
        path.stem
        for path in types
        if not any(path.with_name(path.stem + suffix).exists() for suffix in EXTENSION_SUFFIXES)
    ]


def _partial_links(description: str) -> list[str]:
    """Links of a Markdown text that lead nowhere on another page than the repository's."""
    return re.findall(r"\]\((?!https://|#)([^)]*)\)", description)


def _failed_imports(path: list[str]) -> list[str]:
    """Modules that can't be imported, but for want of an extra."""
    failures = []
    for module in pkgutil.walk_packages(path, "ratelimit_mw.", onerror=lambda _name: None):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in NEED_EXTRAS:
                failures.append(f"{module.name}: {error}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
