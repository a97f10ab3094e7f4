"""Load on one server: by wrk where it is installed, else by connections of our own in another process.

`python -m benchmarks.load PORT CONNECTIONS CALLERS SECONDS` is that other process.
"""

import json
import random
import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

PATH = "/v1/predictions"
REQUEST = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nX-API-Key: key-%d\r\n\r\n".encode()
CONTENT_LENGTH = re.compile(rb"\r\n(?i:content-length):[ \t]*(\d+)")
PIECE = 4096
"""Bytes that are read at once."""
WRK = shutil.which("wrk")
GENERATOR = "wrk" if WRK else "the built-in generator"


@dataclass(frozen=True, slots=True)
class Load:
    """Load to put on a server."""

    connections: int = 32
    callers: int = 1
    """API keys used in turn."""
    seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Results of a load. Latencies are in microseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    failed: int
    refused: int
    """Answers of status 400 and above."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def run_load(port: int, load: Load) -> Sample:
    """Put the load on the server at `port` of this machine. Raises CalledProcessError."""
    if WRK is None:
        numbers = map(str, (port, *astuple(load)))
        command = [sys.executable, "-m", "benchmarks.load", *numbers]
    else:
        command = [WRK, "-t1", f"-c{load.connections}", f"-d{load.seconds:.0f}s", "--latency"]
        command += ["-s", str(Path(__file__).with_name("callers.lua")), f"http://127.0.0.1:{port}"]
        command += ["--", PATH, str(load.callers), str(_first(load.callers))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=load.seconds + 60)
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def _first(callers: int) -> int:
    """The caller to begin with: from the first one on, each round would meet those of the one before."""
    return random.randrange(callers)


@dataclass(slots=True, eq=False)
class _Connection:
    """One connection, its request's beginning, and what has come of the answer."""

    socket: socket.socket
    since: float = 0.0
    data: bytes = b""


class Connections:
    """Connections to a server of this machine, each with one request at a time.

    A plain loop uses them: an event loop takes as much CPU for a request as the server that it measures.
    """

    def __init__(self, port: int, number: int, callers: int) -> None:
        self.free: list[_Connection] = []
        self.latencies: list[float] = []
        """Seconds until each good answer."""
        self.refused: list[float] = []
        """Seconds until each answer of status 400 and above."""
        self.failed = 0
        """Requests that were lost with their connection."""
        self._port = port
        self._callers = callers
        self._caller = _first(callers)
        self._selector = selectors.DefaultSelector()
        for _ in range(number):
            self._connect()

    def send(self, since: float) -> None:
        """Send the next caller's request over a free connection. Its latency counts from `since`."""
        connection = self.free.pop()
        connection.since = since
        self._caller = (self._caller + 1) % self._callers
        with suppress(ConnectionError):  # a connection that has ended is met by `receive`
            connection.socket.send(REQUEST % self._caller)

    def receive(self, timeout: float) -> None:
        """Wait for answers, and read those that have come. Raises OSError if the server is gone."""
        for key, _ in self._selector.select(timeout):
            connection: _Connection = key.data
            try:
                data = connection.socket.recv(PIECE)
            except ConnectionError:
                data = b""
            if not data:
                self._replace(connection)
                continue
            connection.data += data
            if status := _status(connection.data):
                latencies = self.latencies if status < 400 else self.refused
                latencies.append(time.perf_counter() - connection.since)
                connection.data = b""
                self.free.append(connection)

    def close(self) -> None:
        """Close all connections."""
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        self._selector.close()

    def _connect(self) -> None:
        connection = _Connection(socket.create_connection(("127.0.0.1", self._port)))
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.free.append(connection)

    def _replace(self, connection: _Connection) -> None:
        """Connect anew where the server has closed a connection."""
        if connection in self.free:
            self.free.remove(connection)
        else:
            self.failed += 1
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._connect()


def _status(answer: bytes) -> int:
    """Status of an answer; 0 as long as a part of it is missing."""
    end = answer.find(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(answer, 0, end)
    if end < 0 or len(answer) < end + 4 + (int(length[1]) if length else 0):
        return 0
    return int(answer[9:12])


def generate(port: int, load: Load) -> Sample:
    """Put the load on the server at `port`, from this process. Raises OSError if the server is gone."""
    with closing(Connections(port, load.connections, load.callers)) as connections:
        begin = now = time.perf_counter()
        end = begin + load.seconds
        while now < end:
            while connections.free:
                connections.send(time.perf_counter())
            connections.receive(end - now)
            now = time.perf_counter()
    latencies = sorted(connections.latencies + connections.refused)
    p50, p99 = (share_of(latencies, share) * 1e6 for share in (0.5, 0.99))
    return Sample(len(latencies), now - begin, p50, p99, connections.failed, len(connections.refused))


def share_of(ordered: list[float], share: float) -> float:
    """Return the value that this share of all is below; 0 if there are none."""
    return ordered[int(len(ordered) * share)] if ordered else 0.0


if __name__ == "__main__":
    port, connections, callers, seconds = sys.argv[1:]
    sample = generate(int(port), Load(int(connections), int(callers), float(seconds)))
    print(json.dumps(asdict(sample)))
