"""Mutation testing of the code that decides: `make mutants`, or `python -m tests.mutants money periods`.

Cosmic Ray changes one thing of a module after the other, in a copy of this project, and runs the tests that
concern it, in Python alone. A change that no test notices survives, and is printed: either a test is missing,
or the change means nothing. A module takes minutes to hours; each is given `--minutes`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.apps import ROOT

MODULES = {
    "backends/counts.py": "-k memory test_conformance_windows.py test_conformance_slots.py"
    " test_conformance_money.py",
    "backends/memory.py": "-k memory test_conformance_windows.py test_conformance_slots.py"
    " test_conformance_money.py test_conformance_sharing.py test_memory_bounds.py",
    "decision.py": "test_headers.py test_refusals.py test_spending.py test_slots.py",
    "identity.py": "test_identity.py test_address.py",
    "money.py": "test_money.py",
    "periods.py": "test_periods.py",
    "policy.py": "test_policy.py test_routing.py test_spending.py",
    "wire/headers.py": "test_headers.py test_spending.py",
    "wire/refusals.py": "test_refusals.py test_refusals_problem.py",
}
"""The modules, and for each what pytest is told: the files of its tests, fastest first."""

CONFIG = """[cosmic-ray]
module-path = "ratelimit_mw/{module}"
timeout = 60.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def survivors(module: str, tests: str, minutes: float) -> Iterator[str]:
    """Yield what survived of a module, as differences, and at last how many there were."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("ratelimit_mw", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        arguments = " ".join(f"tests/{each}" if each.endswith(".py") else each for each in tests.split())
        config = CONFIG.format(module=module, python=sys.executable, tests=arguments)
        (folder / "config.toml").write_text(config, encoding="utf-8")
        cosmic_ray("baseline", "config.toml", folder=folder)
        cosmic_ray("init", "config.toml", "session.sqlite", folder=folder)
        try:
            cosmic_ray("exec", "config.toml", "session.sqlite", folder=folder, seconds=60 * minutes)
        except subprocess.TimeoutExpired:
            yield f"{module}: the time is over"
        done = [
            json.loads(line)[1] for line in cosmic_ray("dump", "session.sqlite", folder=folder).splitlines()
        ]
        tried = [result for result in done if result is not None]
        survived = [result for result in tried if result["test_outcome"] == "survived"]
        yield from [str(result["diff"]) for result in survived]
        yield f"{module}: {len(survived)} of {len(tried)} survived, {len(done) - len(tried)} were not tried"


def cosmic_ray(*command: str, folder: Path, seconds: float | None = None) -> str:
    """Run a command of Cosmic Ray in the copy; what it printed."""
    environment = {**os.environ, "RATELIMIT_PURE_PYTHON": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    script = Path(sys.executable).with_name("cosmic-ray")
    return subprocess.run(
        [str(script), *command],
        cwd=folder,
        env=environment,
        timeout=seconds,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def main() -> None:
    """Parse the command line, and try the modules one after the other."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="all, where none is named")
    parser.add_argument("--minutes", type=float, default=60.0)
    asked = parser.parse_args()
    for module, tests in MODULES.items():
        if not asked.modules or Path(module).stem in asked.modules:
            for line in survivors(module, tests, asked.minutes):
                print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
