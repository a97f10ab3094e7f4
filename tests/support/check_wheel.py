"""Run by a Python that has the built wheel and its required dependencies, and nothing else.

The wheel holds every file of the package, and every module that needs no extra can be imported from it.
"""

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "ratelimit_mw"
NEED_EXTRAS = {"typer", "rich", "uvicorn", "prometheus_client", "opentelemetry"}


def main() -> int:
    """Report what is missing; the exit status says whether anything is."""
    package = importlib.import_module("ratelimit_mw")
    installed = Path(str(package.__file__)).parent
    problems = []
    if installed == SOURCE:
        problems.append("imported from the source tree")
    problems += [f"not in the wheel: {name}" for name in sorted(_files(SOURCE) - _files(installed))]
    problems += [f"not in the source: {name}" for name in sorted(_files(installed) - _files(SOURCE))]
    problems += _failed_imports(list(package.__path__))
    if importlib.metadata.version("ratelimit-mw") != package.__version__:
        problems.append("the wheel has another version than the package")
    sys.stdout.write("\n".join(problems) + "\n" if problems else f"wheel {package.__version__}: complete\n")
    return bool(problems)


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


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
