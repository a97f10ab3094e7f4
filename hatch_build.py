"""Compiles what is compiled of the package, where a C compiler is at hand. The package works without.

`RATELIMIT_PURE_PYTHON=1` in the environment leaves it out, here as at run time.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

MODULE = "ratelimit_mw._speedups"
SOURCE = "ratelimit_mw/_speedups.pyx"
FLAGS = ["-O2", "-g0"] if os.name == "posix" else []


class CompileHook(BuildHookInterface):
    """Puts the compiled module beside its source, from where editable installations use it too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform; leave it one for all where that fails."""
        if os.environ.get("RATELIMIT_PURE_PYTHON"):
            return
        try:
            compiled = _compile(Path(self.root))
        except Exception as error:  # noqa: BLE001 - whatever a compiler dies of, the package works without
            self.app.display_warning(f"Nothing is compiled, the package will be slower: {error}")
            return
        build_data["artifacts"].append(compiled)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(root: Path) -> str:
    """The path of the compiled module, below the root."""
    before = Path.cwd()
    os.chdir(root)
    try:
        with tempfile.TemporaryDirectory() as folder:
            modules = cythonize(
                [Extension(MODULE, [SOURCE], extra_compile_args=FLAGS)], build_dir=folder, quiet=True
            )
            command = build_ext(Distribution({"name": "ratelimit-mw", "ext_modules": modules}))
            command.inplace = True
            command.build_temp = folder
            command.ensure_finalized()
            command.run()
            return command.get_ext_filename(MODULE)
    finally:
        os.chdir(before)
