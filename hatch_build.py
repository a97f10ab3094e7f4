"""Compiles the modules of the request path, where a C compiler is at hand. The package works without.

A module is compiled if a `.pxd` file with C types lies beside it: from its `.pyx` file, or else from the very
`.py` file that runs uncompiled. Only an editable installation writes into the source tree.

`RATELIMIT_PURE_PYTHON=1` in the environment leaves it out, as at run time. `RATELIMIT_REQUIRE_COMPILED=1`
makes a failed compilation an error, for images and wheels that have to be fast. In a folder that
`RATELIMIT_COMPILED_CACHE` names, compiled modules are kept for the next build of the same source: to compile
all of them takes minutes.
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from Cython import __version__ as cython_version
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
    before, target = Path.cwd(), target or root
    os.chdir(root)
    try:
        extensions = [_extension(types) for types in sorted(Path(PACKAGE).rglob("*.pxd"))]
        path_of = build_ext(Distribution()).get_ext_filename
        paths = {each.name: path_of(each.name) for each in extensions}
        kept = _kept(extensions)
        made = [each for each in extensions if each.name not in kept or not kept[each.name].exists()]
        if made:
            _build(made, target)
        for name, place in kept.items():
            module = target / paths[name]
            if place.exists():
                _copy(place, module)
            else:
                _copy(module, place)
        return list(paths.values())
    finally:
        os.chdir(before)


def _build(extensions: list[Extension], target: Path) -> None:
    """Compile these modules into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        modules = cythonize(
            extensions,
            build_dir=folder,
            compiler_directives=DIRECTIVES,
            nthreads=(os.cpu_count() or 1) if POSIX else 0,
            quiet=True,
        )
        command = build_ext(Distribution({"name": "ratelimit-mw", "ext_modules": modules}))
        command.build_lib = str(target)
        command.parallel = os.cpu_count()
        command.build_temp = folder
        command.ensure_finalized()
        command.run()


def _extension(types: Path) -> Extension:
    """The module that these C types belong to."""
    source = types.with_suffix(".pyx")
    if not source.exists():
        source = types.with_suffix(".py")
    name = ".".join(types.with_suffix("").parts)
    return Extension(name, [str(source)], extra_compile_args=FLAGS)


def _kept(extensions: Iterable[Extension]) -> dict[str, Path]:
    """Where each module is kept, by its name; nothing where no cache is wanted.

    The name of the file stands for all that the module is made of: its source, the C types of every module
    (it may use any), versions, and what the compilers are told.
    """
    cache = os.environ.get("RATELIMIT_COMPILED_CACHE")
    if not cache:
        return {}
    told = [
        cython_version,
        sys.version,
        platform.platform(),
        FLAGS,
        DIRECTIVES,
        os.environ.get("CFLAGS"),
        os.environ.get("CC"),
    ]
    types = [path.read_bytes() for path in sorted(Path(PACKAGE).rglob("*.pxd"))]
    common = hashlib.sha256(repr([told, types]).encode())
    kept = {}
    for each in extensions:
        digest = common.copy()
        digest.update(each.name.encode() + Path(each.sources[0]).read_bytes())
        kept[each.name] = Path(cache, digest.hexdigest())
    return kept


def _copy(source: Path, to: Path) -> None:
    """Copy a file, so that it is either there as a whole or not at all."""
    to.parent.mkdir(parents=True, exist_ok=True)
    half = to.with_name(f"{to.name}.{os.getpid()}")
    shutil.copyfile(source, half)
    half.replace(to)
