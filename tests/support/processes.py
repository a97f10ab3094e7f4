"""A server process on a free port of this machine, started by a test and gone at its end."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LAST_WORDS_SECONDS = 2.0
ATTEMPTS = 5

# Below the ports that outgoing connections get: one of those could take the port of a server that is
# down for a while, and a client that tries such a port long enough connects to itself.
# A cluster node also uses its port + 10000.
PORTS = range(15_000, 22_000)
TEST_PROCESSES = 7
"""Number of processes that may run tests at once without ever trying the same port.

Each process has a share of the ports."""


class ServerError(Exception):
    """A server did not start, or not in time. Says what it wrote."""


def _own_ports() -> Iterator[int]:
    """The ports of this process, round and round: one handed out comes again after all others."""
    number = int("0" + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"))
    share = PORTS[number % TEST_PROCESSES :: TEST_PROCESSES]
    start = random.randrange(len(share))
    return itertools.cycle((*share[start:], *share[:start]))


_ports = _own_ports()


def free_port() -> int:
    """A port nothing listens on right now. Another process may still be quicker to take it."""
    for port in itertools.islice(_ports, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port
    raise ServerError(f"no free port from {PORTS.start} to {PORTS.stop}")


class ServerProcess(ABC):
    """One server on `HOST:port`, which it keeps from start to start; its output goes to a file."""

    own_process_group = False
    """Whether it starts processes of its own, which have to go with it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{name}.log"
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """The command that serves `HOST:port` in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether this very process serves on the port, and not another that was quicker to take it."""

    def environment(self) -> dict[str, str]:
        """The environment it runs in: the tests' own."""
        return dict(os.environ)

    @property
    def pid(self) -> int:
        """The process started last."""
        if self._process is None:
            raise ServerError(f"{self.name} was never started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended. A stopped (paused) one is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Output since its latest start, of both streams."""
        if not self._log.exists():
            return ""
        return self._log.read_bytes()[self._log_start :].decode(errors="replace")

    def start(self) -> None:
        """Start it and wait until it answers; on another port if its port was taken meanwhile."""
        self._start(keep_port=False)

    def restart(self) -> None:
        """Stop it as `stop` does, if it still runs, and start it again on the same port."""
        self.stop()
        self._start(keep_port=True)

    def stop(self, signal_number: int = signal.SIGTERM) -> int | None:
        """Ask it to end, wait, and insist if it takes too long. Returns its exit status."""
        if self._process is None:
            return None
        if self.alive:
            self._process.send_signal(signal_number)
            self.continue_signal()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
                self._wait_for_its_processes()
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it and what it started as a crash would, without a chance to tidy up."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self.own_process_group:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def stop_signal(self) -> None:
        """Pause it (SIGSTOP): connections stay open and are accepted, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def continue_signal(self) -> None:
        """Let it go on (SIGCONT) after `stop_signal`; nothing changes if it was not paused."""
        if self.alive:
            os.kill(self.pid, signal.SIGCONT)

    def _wait_for_its_processes(self) -> None:
        """Wait for the processes that it started: they end a little later, and may have coverage to write."""
        give_up = time.monotonic() + LAST_WORDS_SECONDS
        while self.own_process_group and time.monotonic() < give_up:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)

    def _start(self, *, keep_port: bool) -> None:
        for attempt in range(ATTEMPTS):
            self._spawn()
            if self._became_ready():
                return
            taken = not self.alive and "address already in use" in self.log.lower()
            self.kill()
            failure = f"{self.name} did not start on port {self.port}; it wrote:\n{self.log}"
            if not taken or attempt + 1 == ATTEMPTS:
                raise ServerError(failure)
            if keep_port:
                time.sleep(0.2 * (attempt + 1))
            else:
                self.port = free_port()

    def _spawn(self) -> None:
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                process_group=0 if self.own_process_group else None,
            )

    def _became_ready(self) -> bool:
        give_up = time.monotonic() + START_SECONDS
        while self.alive and time.monotonic() < give_up:
            if self.answers():
                return True
            time.sleep(0.02)
        return False
