"""Compiles the modules of the request path, where a C compiler is at hand. The package works without.

A module is compiled if a `.pxd` file with C types lies beside it: from its `.pyx` file, or else from the very
`.py` file that runs uncompiled. `RATELIMIT_PURE_PYTHON=1` in the environment leaves it out, as at run time.
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
FLAGS = ["-O2", "-g0"] if os.name == "posix" else []
DIRECTIVES = {
    "language_level": "3",
    # The annotations of the sources are for readers and type checkers; C types stand in the `.pxd` files.
    "annotation_typing": False,
}


class CompileHook(BuildHookInterface):
    """Puts compiled modules beside their sources, from where editable installations use them too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform; leave it one for all where that fails."""
        if os.environ.get("RATELIMIT_PURE_PYTHON"):
            return
        try:
            compiled = _compile(Path(self.root))
        except Exception as error:  # noqa: BLE001 - whatever a compiler dies of, the package works without
            self.app.display_warning(f"Nothing is compiled, the package will be slower: {error}")
            return
        build_data["artifacts"] += compiled
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(root: Path) -> list[str]:
    """Compile all modules that have C types; returns their paths below the root."""
    before = Path.cwd()
    os.chdir(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            modules = cythonize(
                [_extension(types) for types in sorted(Path(PACKAGE).rglob("*.pxd"))],
                build_dir=folder,
                compiler_directives=DIRECTIVES,
                nthreads=os.cpu_count() or 1,
                quiet=True,
            )
            command = build_ext(Distribution({"name": "ratelimit-mw", "ext_modules": modules}))
            command.inplace = True
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
