"""Tells whether the modules of the request path are compiled, and runs them from their sources if asked.

They are compiled where a C compiler was at hand when the package was installed. Python runs the same files
uncompiled with `RATELIMIT_PURE_PYTHON=1` in the environment.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

from ratelimit_mw._internal.runtime.version import __version__

PURE = "RATELIMIT_PURE_PYTHON"
"""Name of the environment variable."""
_PACKAGE = "ratelimit_mw."


class _SourceFinder:
    """Finds modules of this package as source files only, though compiled ones may lie beside them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of this package; None for any other."""
        if not fullname.startswith(_PACKAGE):
            return None
        finders = [FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)) for folder in path or ()]
        found = [spec for finder in finders if (spec := finder.find_spec(fullname)) is not None]
        return found[0] if found else None


def obey_environment() -> None:
    """Have Python run the sources if `RATELIMIT_PURE_PYTHON` is set. Called before any module is imported."""
    if os.environ.get(PURE):
        # In place of Python's own finder alone: a tool that stands before it, and measures coverage perhaps,
        # sees the modules of this package, too.
        own = [at for at, finder in enumerate(sys.meta_path) if finder is PathFinder]
        sys.meta_path.insert(min(own, default=0), _SourceFinder())


def is_compiled() -> bool:
    """Whether the modules of the request path are compiled in this process."""
    from ratelimit_mw._internal.runtime import leaf  # noqa: PLC0415 - only now it is decided which one this is

    return not str(leaf.__file__).endswith(".py")


def build_text() -> str:
    """The version of this package, the Python that runs it, and whether it is compiled, for a person."""
    import platform  # noqa: PLC0415 - for commands alone

    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{__version__}, {python}, {'compiled' if is_compiled() else 'not compiled'}"
