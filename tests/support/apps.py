"""ASGI apps under real uvicorn processes, as they are run in production."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.processes import HOST, ServerProcess

ROOT = Path(__file__).parents[2]


class AppServer(ServerProcess):
    """`uvicorn module:app` with so many worker processes on one port, started in the project's root.

    `environment` is added to the tests' own, less any setting in it. `arguments` are
    uvicorn's own, such as `"--loop", "uvloop"`; the log level must stay at `info`, since readiness is read
    from the log.
    """

    own_process_group = True

    def __init__(
        self,
        app: str,
        folder: Path,
        *arguments: str,
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(re.sub(r"\W+", "-", app), folder)
        self.app = app
        self.workers = workers
        self.arguments = arguments
        self._environment = dict(environment or {})

    @property
    def url(self) -> str:
        """URL at which it is served, without a slash at the end."""
        return f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        """Access lines are left out: under load they cost more than what is tested."""
        address = ["--host", HOST, "--port", str(self.port), "--workers", str(self.workers)]
        uvicorn = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT), "--no-access-log"]
        return [*uvicorn, *address, *self.arguments, self.app]

    def environment(self) -> dict[str, str]:
        """Without settings of whoever runs the tests, but in Python alone where the tests are."""
        own = {name: value for name, value in os.environ.items() if not _is_setting(name)}
        return {**own, **self._environment}

    def worker_pids(self) -> list[int]:
        """The processes that serve requests, in the order they were started; ended ones left out."""
        return [pid for pid in self._started_pids() if _exists(pid)]

    def answers(self) -> bool:
        """Every worker is up, and the port answers. The app itself is not called: it may be counting."""
        ready = len(self._started_pids())
        if "off" not in self.arguments:
            ready = min(ready, self.log.count("Application startup complete."))
        return ready >= self.workers and self._answers_nonsense()

    def _started_pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", self.log)]

    def _answers_nonsense(self) -> bool:
        """Whether uvicorn answers to text that is not HTTP, which no app is asked about."""
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(b"nonsense\r\n\r\n")
                return connection.recv(16).startswith(b"HTTP/1.1 400")
        except OSError:
            return False


def _is_setting(name: str) -> bool:
    return name.startswith("RATELIMIT_") and name != "RATELIMIT_PURE_PYTHON"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
