"""Load on one server: by wrk where it is installed, else by connections of our own in another process.

`python -m benchmarks.load HOST PORT CONNECTIONS SECONDS CALLERS` is that other process.
"""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PATH = "/v1/predictions"
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
        numbers = map(str, (port, load.connections, load.seconds, load.callers))
        command = [sys.executable, "-m", "benchmarks.load", *numbers]
    else:
        command = [WRK, "-t1", f"-c{load.connections}", f"-d{load.seconds:.0f}s", "--latency"]
        command += ["-s", str(Path(__file__).with_name("callers.lua")), f"http://127.0.0.1:{port}"]
        command += ["--", PATH, str(load.callers), str(_first(load.callers))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=load.seconds + 60)
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def _first(callers: int) -> int:
    """The caller to begin with: from the first one on, each round would meet those of the one before."""
    return random.randrange(callers)


class _Client(asyncio.Protocol):
    """One connection that sends the next request as soon as it has the answer to the last one."""

    def __init__(self, callers: int, first: int, latencies: list[float], statuses: list[int]) -> None:
        self._callers = callers
        self._first = first
        self._latencies = latencies
        self._statuses = statuses
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            self._transport = transport
            self._send()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end or len(body) < content_length(head):
            return
        self._latencies.append(time.perf_counter() - self._sent)
        self._statuses.append(int(head[9:12]))
        self._data = b""
        self._send()

    def _send(self) -> None:
        caller = (self._first + len(self._latencies)) % self._callers
        self._sent = time.perf_counter()
        request = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nX-API-Key: key-{caller}\r\n\r\n"
        self._transport.write(request.encode())


def content_length(head: bytes) -> int:
    """Bytes of the body that a head announces."""
    lines = (line.partition(b":") for line in head.split(b"\r\n"))
    return next((int(value) for name, _, value in lines if name.lower() == b"content-length"), 0)


async def _generate(port: int, connections: int, seconds: float, callers: int) -> Sample:
    latencies: list[float] = []
    statuses: list[int] = []
    loop, begin, first = asyncio.get_running_loop(), time.perf_counter(), _first(callers)
    for _ in range(connections):
        await loop.create_connection(lambda: _Client(callers, first, latencies, statuses), "127.0.0.1", port)
    await asyncio.sleep(seconds)
    spent, ordered = time.perf_counter() - begin, sorted(latencies) or [0.0]
    p50, p99 = (ordered[int(len(ordered) * share)] * 1e6 for share in (0.5, 0.99))
    return Sample(len(latencies), spent, p50, p99, 0, sum(status >= 400 for status in statuses))


if __name__ == "__main__":
    sample = asyncio.run(_generate(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
    print(json.dumps({name: getattr(sample, name) for name in sample.__slots__}))
