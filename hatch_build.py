"""Compiles the modules of the request path, where a C compiler is at hand. The package works without.

A module is compiled if a `.pxd` file with C types lies beside it: from its `.pyx` file, or else from the very
`.py` file that runs uncompiled. Only an editable installation writes into the source tree.

`RATELIMIT_PURE_PYTHON=1` in the environment leaves it out, as at run time. `RATELIMIT_REQUIRE_COMPILED=1`
makes a failed compilation an error, for images and wheels that have to be fast.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

PACKAGE = "ratelimit_mw"
POSIX = os.name == "posix"
FLAGS = ["-O2", "-g0"] if POSIX else []
DIRECTIVES = {
    "language_level": "3",
    # The annotations of the sources are for readers and type checkers; C types stand in the `.pxd` files.
    "annotation_typing": False,
}


class CompileHook(BuildHookInterface):
    """Adds compiled modules to the wheel, or puts them beside their sources for an editable installation."""

    _built: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform; leave it one for all where that fails."""
        if os.environ.get("RATELIMIT_PURE_PYTHON"):
            return
        root = Path(self.root)
        self._built = tempfile.TemporaryDirectory()
        is_editable = version == "editable"
        folder = root if is_editable else Path(self._built.name)
        try:
            compiled = _compile(root, folder)
        except Exception as error:
            if os.environ.get("RATELIMIT_REQUIRE_COMPILED"):
                raise
            self.app.display_warning(f"Nothing is compiled, the package will be slower: {error}")
            return
        if not is_editable:
            build_data["force_include"].update({str(folder / path): path for path in compiled})
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for this wheel."""
        if self._built is not None:
            self._built.cleanup()


def _compile(root: Path, target: Path | None = None) -> list[str]:
    """Compile all modules that have C types into a folder, by default beside their sources.

    Returns their paths below that folder.
    """
    before = Path.cwd()
    os.chdir(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            modules = cythonize(
                [_extension(types) for types in sorted(Path(PACKAGE).rglob("*.pxd"))],
                build_dir=folder,
                compiler_directives=DIRECTIVES,
                nthreads=(os.cpu_count() or 1) if POSIX else 0,
                quiet=True,
            )
            command = build_ext(Distribution({"name": "ratelimit-mw", "ext_modules": modules}))
            command.build_lib = str(target or root)
            command.parallel = os.cpu_count()
            command.build_temp = folder
            command.ensure_finalized()
            command.run()
            return [command.get_ext_filename(module.name) for module in modules]
    finally:
        os.chdir(before)


def _extension(types: Path) -> Extension:
    """The module that these C types belong to."""
    source = types.with_suffix(".pyx")
    if not source.exists():
        source = types.with_suffix(".py")
    name = ".".join(types.with_suffix("").parts)
    return Extension(name, [str(source)], extra_compile_args=FLAGS)
