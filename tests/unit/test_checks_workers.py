"""Whether several processes serve with one that counts in memory, seen from what runs."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.apps import ROOT
from tests.support.processes import HOST, ServerProcess
from tests.support.slots import until

pytestmark = pytest.mark.rerun

APP = "tests.support.served:app"
GUNICORN = """
workers = {workers}
worker_class = "asgi"
bind = "{address}"
chdir = "{root}"
"""
PATIENCE = 4.0
"""Seconds after which a worker has looked around at least once."""


class AnyServer(ServerProcess):
    """A server of ASGI apps, by its command line and environment."""

    own_process_group = True

    def __init__(self, folder: Path, arguments: list[str], environment: dict[str, str], files: bool) -> None:
        super().__init__("server", folder)
        self._arguments = arguments
        self._environment = environment
        self._has_file = files

    def command(self) -> list[str]:
        """With the port in place of `PORT`."""
        if self._has_file:
            text = GUNICORN.format(workers=2, address=f"{HOST}:{self.port}", root=ROOT)
            (self.folder / "gunicorn.conf.py").write_text(text)
        arguments = [each.replace("PORT", str(self.port)) for each in self._arguments]
        return [sys.executable, *arguments]

    def environment(self) -> dict[str, str]:
        """With the project on the path, and the test's own variables."""
        return {**super().environment(), "PYTHONPATH": str(ROOT), **self._environment}

    def answers(self) -> bool:
        """Whether something is answered on the port."""
        try:
            return httpx.get(f"http://{HOST}:{self.port}/", timeout=5).status_code in (200, 429)
        except httpx.HTTPError:
            return False


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyServer]:
    """The server of the test's parameters."""
    arguments, environment = request.param
    files = "{FOLDER}" in " ".join(arguments)
    arguments = [each.replace("{FOLDER}", str(tmp_path)) for each in arguments]
    server = AnyServer(tmp_path, arguments, environment, files)
    server.start()
    yield server
    server.stop()


UVICORN = ["-m", "uvicorn", "--host", HOST, "--port", "PORT", APP]
HYPERCORN = ["-m", "hypercorn", "--bind", f"{HOST}:PORT", APP]
GRANIAN = ["-m", "granian", "--interface", "asgi", "--host", HOST, "--port", "PORT", APP]
GUNICORN_FILE = ["-m", "gunicorn", "-c", "{FOLDER}/gunicorn.conf.py", APP]
IN_PYTHON = ["-c", f"from uvicorn import Config, Server; Server(Config('{APP}', port=PORT)).run()"]


def said(server: AnyServer) -> int:
    """Return the number of processes that have said that they are one of several."""
    return server.log.count("/checks/#memory-with-workers]")


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(([*UVICORN, "--workers", "2"], {}), id="uvicorn"),
        pytest.param((UVICORN, {"WEB_CONCURRENCY": "2"}), id="uvicorn by variable", marks=pytest.mark.slow),
        pytest.param((GUNICORN_FILE, {}), id="gunicorn.conf.py"),
        pytest.param(([*HYPERCORN, "--workers", "2"], {}), id="hypercorn"),
        pytest.param((GRANIAN, {"GRANIAN_WORKERS": "2"}), id="granian by variable", marks=pytest.mark.slow),
    ],
    indirect=True,
)
@pytest.mark.once
def test_each_of_several_workers_says_so(server: AnyServer) -> None:
    """However a server was told to start several workers, each of them tells that it is one."""
    until(lambda: said(server) == 2, 60)
    assert "memory://, and 2 or more workers run" in server.log


@pytest.mark.parametrize(
    "server",
    [
        pytest.param((UVICORN, {}), id="uvicorn", marks=pytest.mark.slow),
        pytest.param(
            ([*UVICORN, "--reload"], {"WEB_CONCURRENCY": "8"}), id="uvicorn --reload", marks=pytest.mark.slow
        ),
        pytest.param((IN_PYTHON, {"WEB_CONCURRENCY": "8"}), id="uvicorn in Python", marks=pytest.mark.slow),
        pytest.param((HYPERCORN, {"WEB_CONCURRENCY": "8"}), id="hypercorn"),
        pytest.param((GRANIAN, {"WEB_CONCURRENCY": "8"}), id="granian", marks=pytest.mark.slow),
    ],
    indirect=True,
)
@pytest.mark.once
def test_one_worker_says_nothing_whatever_variables_say(server: AnyServer) -> None:
    """A variable that nobody reads starts no workers, and there is nothing to warn of."""
    time.sleep(PATIENCE)
    assert said(server) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing can be seen elsewhere")
def test_a_process_that_does_not_listen_is_told_nothing() -> None:
    """Without a listening socket there are no workers to look for; with one, this process is alone."""
    script = """
import socket
from ratelimit_mw._internal.checks.processes import processes_serving
print(processes_serving())
with socket.create_server(("127.0.0.1", 0)):
    print(processes_serving())
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["None", "1"]
