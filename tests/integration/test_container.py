"""The shipped Dockerfile: its own steps are carried out, and what they make is started."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from e2b_dockerfile_utils import parse_dockerfile_ast

from tests.support import dockerfile
from tests.support.apps import ROOT
from tests.support.processes import free_port

pytestmark = [pytest.mark.rerun, pytest.mark.once]

DOCKERFILE = ROOT / "examples" / "deploy" / "Dockerfile"
START_SECONDS = 60.0
PORT = "8000"


@pytest.fixture(scope="module")
def image() -> Iterator[dockerfile.Stage]:
    """Build the Dockerfile's image from an empty folder, in a place that any user may read.

    One module of the package is compiled in place of all, to save a minute: the wheel has all of them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        context = folder / "context"
        dockerfile.copy_context(ROOT, context)
        for types in context.rglob("*.pxd"):
            if types.stem != "leaf":
                types.unlink()
        yield dockerfile.build(DOCKERFILE, context, folder)


def test_the_build_gets_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    """`.dockerignore` lets neither tests nor compiled modules nor hidden files into an image."""
    dockerfile.copy_context(ROOT, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "LICENSE",
        "README.md",
        "examples",
        "hatch_build.py",
        "pyproject.toml",
        "ratelimit_mw",
    }
    strange = [
        path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix in {".so", ".pyc"}
    ]
    assert strange == []
    assert (tmp_path / "ratelimit_mw" / "py.typed").exists()


def test_every_base_image_has_a_version() -> None:
    """An image of today and one of next month are built on the same Python."""
    steps = parse_dockerfile_ast(DOCKERFILE.read_text()).instructions
    bases = [step.args[0] for step in steps if step.name == "FROM"]
    assert len(bases) == 2
    assert all(base.startswith("python:3.13") for base in bases)


@pytest.mark.slow
def test_the_image_serves_compiled_and_unprivileged(image: dockerfile.Stage, tmp_path: Path) -> None:
    """Its command serves the example, as a user without rights; its health check sees that, and its end."""
    user = int(image.user.partition(":")[0])
    assert user > 0
    assert [path.name for path in image.folder.iterdir() if path.name not in {".venv", "examples"}] == []
    program = "import ratelimit_mw._internal.runtime.compiled as c; print(c.is_compiled(), c.__file__)"
    assert run_inside(image, ["python", "-c", program]).startswith(f"True {image.folder}")
    assert "check" in run_inside(image, ["ratelimit-mw", "--help"])
    port = free_port()
    with served(image, port, tmp_path) as process:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"X-API-Key": "one"})
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit"] == "60"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with pytest.raises(subprocess.CalledProcessError):
        run_inside(image, with_port(image.health_check, port))


@contextlib.contextmanager
def served(image: dockerfile.Stage, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the image's command, and wait until its health check succeeds."""
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            found(image, with_port(image.command, port)),
            cwd=image.folder,
            env=image.environment,
            user=unprivileged(image),
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not is_healthy(image, port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_healthy(image: dockerfile.Stage, port: int) -> bool:
    """Return whether the image's own health check succeeds."""
    try:
        run_inside(image, with_port(image.health_check, port))
    except subprocess.CalledProcessError:
        return False
    return True


def run_inside(image: dockerfile.Stage, command: list[str]) -> str:
    """Run a command as in the container, and return its output."""
    return subprocess.run(
        found(image, command),
        cwd=image.folder,
        env=image.environment,
        user=unprivileged(image),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def found(image: dockerfile.Stage, command: list[str]) -> list[str]:
    """The command, with its program as the image's PATH finds it."""
    return [str(image.folder / ".venv" / "bin" / command[0]), *command[1:]]


def with_port(command: list[str], port: int) -> list[str]:
    """The command, on a port that is free here, and on loopback alone."""
    return [part.replace(PORT, str(port)).replace("0.0.0.0", "127.0.0.1") for part in command]


def unprivileged(image: dockerfile.Stage) -> int | None:
    """The user of the image, where the tests may run as another who may read this Python; else None."""
    is_readable = all(folder.stat().st_mode & 0o001 for folder in Path(sys.base_prefix).resolve().parents)
    return int(image.user.partition(":")[0]) if os.geteuid() == 0 and is_readable else None
