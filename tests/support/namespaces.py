"""A worker and a server in network namespaces of their own; the router between can lose every packet."""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from tests.support.servers import StoreServer

SERVER = "10.213.2.2"
WORKER = "10.213.1.2"
_ROUTER = ("10.213.1.1", "10.213.2.1")
_TOOLS = ("ip", "nsenter", "sysctl", "unshare")
_numbers = itertools.count()


class Namespace:
    """A network namespace, which lasts as long as a process in it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        give_up = time.monotonic() + 10
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == own:
            if self._holder.poll() is not None or time.monotonic() > give_up:
                self.close()
                raise OSError("this system allows no network namespaces")
            time.sleep(0.005)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """A process in it."""
        return self._holder.pid

    @property
    def prefix(self) -> list[str]:
        """Beginning of a command that runs in the namespace."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def run(self, *command: str) -> None:
        """Run a command in it."""
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def close(self) -> None:
        """End it, with its links, once nothing else runs in it."""
        self._holder.kill()
        self._holder.wait()


class Network:
    """A worker's side and a server's, and what is between."""

    def __init__(self, stack: ExitStack) -> None:
        self.worker, self.router, self.server = made = [Namespace() for _ in range(3)]
        for each in made:
            stack.callback(each.close)
        for address, end, other in zip(_ROUTER, (WORKER, SERVER), (self.worker, self.server), strict=True):
            self._link(address, end, other)
        self.heal()

    def _link(self, address: str, end: str, other: Namespace) -> None:
        name = f"rl{os.getpid() % 100_000}-{next(_numbers)}"
        peer = f"peer name {name}b netns {other.pid}".split()
        subprocess.run(
            [*f"ip link add {name}a netns {self.router.pid} type veth".split(), *peer],
            check=True,
            capture_output=True,
        )
        for namespace, link, own in ((self.router, f"{name}a", address), (other, f"{name}b", end)):
            namespace.run("ip", "address", "add", f"{own}/24", "dev", link)
            namespace.run("ip", "link", "set", link, "up")
        other.run("ip", "route", "add", "default", "via", address)

    def cut(self) -> None:
        """Lose every packet between both sides, without a word to either."""
        self.router.run("sysctl", "-q", "net.ipv4.ip_forward=0")

    def heal(self) -> None:
        """Let packets pass."""
        self.router.run("sysctl", "-q", "net.ipv4.ip_forward=1")


class FarServer(StoreServer):
    """A Redis or Valkey on the server's side of a network."""

    network: Network

    @property
    def url(self) -> str:
        """Its address as the worker's side sees it."""
        return f"redis://{SERVER}:{self.port}/0"

    def command(self) -> list[str]:
        """Run it there."""
        arguments = ["--bind", SERVER, "--protected-mode", "no"]
        return [*self.network.server.prefix, *super().command(), *arguments]

    def answers(self) -> bool:
        """Whether a connection from the worker's side is accepted."""
        code = f"import socket; socket.create_connection(('{SERVER}', {self.port}), 1)"
        command = [*self.network.worker.prefix, "python3", "-c", code]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def network() -> Iterator[Network]:
    """A network of its own. Raises OSError where the system allows none."""
    with ExitStack() as stack:
        yield Network(stack)


@cache
def why_not() -> str:
    """Return the reason why there can be no network namespaces here; "" if there can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    try:
        with network():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces: {error}"
