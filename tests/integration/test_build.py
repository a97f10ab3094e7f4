"""An installation succeeds wherever Python is, whatever becomes of what could be compiled."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import pytest

from ratelimit_mw._internal.runtime.compiled import PURE
from tests.support.apps import ROOT

pytestmark = [pytest.mark.rerun, pytest.mark.once]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without anything compiled."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "ratelimit_mw", copy / "ratelimit_mw", ignore=ignored)
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a source."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != PURE} | variables
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # what Python keeps of a module is not the build's
    return subprocess.run(
        command,
        cwd=source,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def break_sources(source: Path) -> None:
    """Have every module that would be compiled end in what no compiler takes."""
    broken = [*source.rglob("*.pyx"), *source.rglob("*.pxd")]
    assert broken
    for file in broken:
        file.write_text(f"{file.read_text('utf-8')}\ncdef this is none (\n", encoding="utf-8")


def files_of(folder: Path) -> dict[Path, int]:
    """All files and folders below a folder, and when each was changed last."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_sources_that_the_compiler_rejects_break_no_installation(source: Path, tmp_path: Path) -> None:
    """The package is installed uncompiled, and the build says so."""
    break_sources(source)
    done = build(source, tmp_path / "out")
    assert done.returncode == 0, done.stdout
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-none-any.whl")
    assert "Nothing is compiled" in done.stdout


def test_a_build_that_has_to_be_compiled_fails_if_it_is_not(source: Path, tmp_path: Path) -> None:
    """An image or a wheel for the index never gets Python alone unseen."""
    break_sources(source)
    done = build(source, tmp_path / "out", RATELIMIT_REQUIRE_COMPILED="1")
    assert done.returncode != 0
    assert "Nothing is compiled" not in done.stdout
    assert list((tmp_path / "out").glob("*.whl")) == []


def leave_one_module(source: Path) -> None:
    """Leave one module to be compiled, which stands for all, and takes a second."""
    for types in source.rglob("*.pxd"):
        if types.stem != "leaf":
            types.unlink()


def test_what_was_compiled_is_compiled_again_where_it_has_changed(source: Path, tmp_path: Path) -> None:
    """A cache spares whoever builds the same source again the compiler, and nobody else."""
    leave_one_module(source)
    cached = partial(
        build,
        source,
        tmp_path / "out",
        RATELIMIT_REQUIRE_COMPILED="1",
        RATELIMIT_COMPILED_CACHE=str(tmp_path / "cache"),
    )
    first = cached()
    assert first.returncode == 0, first.stdout
    again = cached(PATH="")
    assert again.returncode == 0, again.stdout
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (compiled,) = [name for name in archive.namelist() if name.endswith(".so")]
        assert archive.read(compiled)[1:4] == b"ELF"
    for changed in ("leaf.pyx", "leaf.pxd"):
        (file,) = source.rglob(changed)
        before = file.read_text("utf-8")
        file.write_text(f"{before}\n# changed\n", "utf-8")
        assert cached(PATH="").returncode != 0
        file.write_text(before, "utf-8")


def test_a_build_writes_nothing_into_its_source(source: Path, tmp_path: Path) -> None:
    """A wheel with compiled modules is built from a source tree that nobody may write to."""
    leave_one_module(source)
    for path in (source, *source.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files_of(source)
    done = build(source, tmp_path / "out", RATELIMIT_REQUIRE_COMPILED="1")
    assert done.returncode == 0, done.stdout
    assert files_of(source) == before
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (compiled,) = [name for name in archive.namelist() if name.endswith(".so")]
    assert compiled.startswith("ratelimit_mw/_internal/runtime/leaf.")
    assert not wheel.name.endswith("-none-any.whl")
    for path in (source, *source.rglob("*")):
        path.chmod(0o755)  # so that whoever runs the tests can remove it


def test_a_source_distribution_has_all_that_a_checkout_has(tmp_path: Path) -> None:
    """Tests, benchmarks, examples and the deployment run from it; nothing of this machine is in it."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as opened:
        names = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    kinds = (
        "*.py",
        "*.md",
        "*.toml",
        "*.lua",
        "*.pxd",
        "*.pyx",
        "*.json",
        "*.yml",
        "*.conf",
        "*.html",
        "*.css",
    )
    folders = ("benchmarks", "docs", "examples", "ratelimit_mw", "tests")
    wanted = {file.relative_to(ROOT) for kind in kinds for file in ROOT.glob(kind)}
    wanted |= {
        file.relative_to(ROOT) for name in folders for kind in kinds for file in (ROOT / name).rglob(kind)
    }
    assert Path("docker-compose.yml") in wanted
    assert wanted - names == set()
    assert {
        name for name in names if name.suffix in {".so", ".pyc", ".whl"} or ".venv" in name.parts
    } == set()


@pytest.mark.parametrize("platform", ["linux", "macos", "windows"])
def test_every_declared_python_gets_wheels(platform: str) -> None:
    """Every Python that the package declares gets it compiled from the index, on glibc and on musl."""
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    built = {tuple(line.partition("_")[0].split("-")) for line in done.stdout.split()}
    pythons = {f"cp3{minor}" for minor in declared_pythons()}
    for tag in {"linux": ["manylinux", "musllinux"], "macos": ["macosx"], "windows": ["win"]}[platform]:
        assert pythons <= {python for python, of_tag in built if of_tag == tag}
    assert not any(python.endswith("t") for python, _ in built)


def declared_pythons() -> list[str]:
    """Minor versions of Python 3 that the package says it runs on."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    return re.findall(r"Programming Language :: Python :: 3\.(\d+)", "\n".join(classifiers))
