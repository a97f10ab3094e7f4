"""Instructions for each request, of the app's server and of Redis: `python -m benchmarks.instructions`.

Counted by callgrind, which has to be installed (valgrind). Unlike times, they are nearly the same on a busy
machine and on a quiet one. What runs every second or so is left out: callgrind takes fifty times as long.
`RATELIMIT_PURE_PYTHON=1` counts Python alone; 20,000 callers in turn are more than a process remembers.
Each case runs itself in a process of its own, as `--inside CASE CALLERS PID`.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from benchmarks.apps import HOOKED, SETTINGS, USED, VARIANTS, YARDSTICKS, knock
from benchmarks.load import PATH
from benchmarks.stored import PATIENCE
from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.cache import refusals as refused
from ratelimit_mw._internal.limiter import engine
from ratelimit_mw._internal.live import registry, reload, rights
from ratelimit_mw._internal.observe import reporting
from tests.support.apps import ROOT
from tests.support.servers import StoreServer
from tests.support.topologies import Cluster

CASES = (
    "headers",
    "memory",
    "redis-1",
    "redis-2",
    "prefetch",
    "shared",
    "shared-ahead",
    "refuse",
    "priced",
    "units",
    *HOOKED,
)
REFUSING = ("refuse", "refusal")
IN_REDIS = ("redis-1", "redis-2", "shared", "shared-ahead", "units")
"""Cases of which Redis is counted too."""
REQUESTS = 3_200
CONNECTIONS = 32
IN_A_CALL = 12
"""Requests that a call of the script brings, in what is counted of Redis: as under load."""
CALLGRIND = ("valgrind", "--tool=callgrind", "--instr-atstart=no")


class Transport(asyncio.Transport):
    """Takes what the server answers."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.heard = asyncio.Event()

    def write(self, data: bytes) -> None:  # type: ignore[override]
        """Keep it, and wake who waits for answers: to look for them again and again would be counted, too."""
        self.written.append(data)
        self.heard.set()

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return the information of a connection from this machine."""
        return {"peername": ("127.0.0.1", 50_000), "sockname": ("127.0.0.1", 80)}.get(name, default)

    def is_closing(self) -> bool:
        """Never."""
        return False

    def pause_reading(self) -> None:
        """Nothing comes that was not asked for."""

    resume_reading = pause_reading


async def ask_app(case: str, callers: int) -> Callable[[int], Awaitable[None]]:
    """Make a function that has so many requests served, by callers in turn.

    It uses uvicorn's protocol, without sockets.
    """
    server = Config(VARIANTS[case], factory=True, log_level="error", access_log=False, http="httptools")
    server.load()
    protocols = [HttpToolsProtocol(server, ServerState(), {}) for _ in range(CONNECTIONS)]
    transport = Transport()
    for protocol in protocols:
        protocol.connection_made(transport)
    asked = 0

    async def ask(number: int) -> None:
        nonlocal asked
        for _ in range(number // CONNECTIONS):
            for protocol in protocols:
                head = f"GET {PATH} HTTP/1.1\r\nHost: bench\r\nX-API-Key: key-{asked % callers}\r\n\r\n"
                protocol.data_received(head.encode())
                asked += 1
            while not all([each.cycle.response_complete for each in protocols]):
                transport.heard.clear()
                await transport.heard.wait()
        _check(server.loaded_app)
        statuses = {data[9:12] for data in transport.written if data.startswith(b"HTTP/")}
        transport.written.clear()
        if not statuses <= ({b"200", b"429"} if case in REFUSING else {b"200"}):
            raise RuntimeError(f"{case} was answered {statuses}")

    return ask


async def ask_sockets(case: str, callers: int) -> Callable[[int], Awaitable[None]]:
    """Make a function that has so many WebSockets opened, by callers in turn, without a server."""
    app = VARIANTS[case]()
    asked = 0

    async def ask(number: int) -> None:
        nonlocal asked
        for _ in range(number // CONNECTIONS):
            await asyncio.gather(*[knock(app, (asked + place) % callers) for place in range(CONNECTIONS)])
            asked += CONNECTIONS
        _check(app)

    return ask


async def ask_redis(case: str, callers: int) -> Callable[[int], Awaitable[None]]:
    """Make a function that has so many requests decided about, `IN_A_CALL` at once."""
    limiter = Limiter(SETTINGS[case]())
    await limiter.open()
    asked = 0

    async def one(number: int) -> None:
        lease = await limiter.acquire(api_key=f"key-{number % callers}", path=PATH)
        if case == "units":
            await lease.settle(units=USED)
        await lease.release()

    async def ask(number: int) -> None:
        nonlocal asked
        for _ in range(number // IN_A_CALL):
            await asyncio.gather(*[one(asked + place) for place in range(IN_A_CALL)])
            asked += IN_A_CALL

    return ask


async def inside(case: str, callers: int, pid: int) -> None:
    """Ask, and have what the process `pid` runs counted once every caller was met twice."""
    # By the clock a busy machine does more of these in a count, and looks through more processes and sockets.
    reporting.REPORT_SECONDS = engine.TAKE_OVER_SECONDS = engine.LOOK_SECONDS = 1e9  # type: ignore[attr-defined]
    registry.POLL_SECONDS = reload.POLL_SECONDS = rights.LOOK_SECONDS = refused.LONGEST = 1e9
    asks_app = ask_sockets if "websocket" in case else ask_app
    ask = await (asks_app if pid == os.getpid() else ask_redis)(case, callers)
    await ask(max(2 * callers, 20 * CONNECTIONS))
    _tell(pid, "-z")
    _tell(pid, "-i", "on")
    await ask(REQUESTS)
    _tell(pid, "-i", "off")


def _check(app: Any) -> None:
    """Raise RuntimeError where the middleware in an app has decided without Redis."""
    while not isinstance(app, RateLimitMiddleware):
        app = getattr(app, "app", None)
        if app is None:
            return
    if alone := sum(app.limiter.stats().decisions_without_backend.values()):
        raise RuntimeError(f"{alone} requests were decided about without Redis")


def _tell(pid: int, *setting: str) -> None:
    subprocess.run(["callgrind_control", *setting, str(pid)], check=True, capture_output=True)


class CountedStore(StoreServer):
    """A Redis under callgrind."""

    def command(self) -> list[str]:
        """Return the server's command, under the tool that counts its instructions."""
        return [*CALLGRIND, f"--callgrind-out-file={self.folder}/out", *super().command()]


@contextmanager
def store(kind: type[StoreServer | Cluster]) -> Iterator[Any]:
    """A Redis, or a cluster, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        server = kind("redis", Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def of_app(case: str, callers: int) -> float:
    """Instructions of the app's server for a request."""
    kind: type[StoreServer | Cluster] = Cluster if case == "cluster" else StoreServer
    with store(kind) as server, tempfile.TemporaryDirectory() as folder:
        command = [*CALLGRIND, f"--callgrind-out-file={folder}/out", sys.executable, "-m", __spec__.name]
        # Under callgrind a turn of the loop takes longer than a request would wait.
        settings = {"BENCH_REDIS": server.url, "BENCH_TIMEOUT": str(PATIENCE)}
        environment = {**os.environ, **settings, "PYTHONHASHSEED": "1"}
        arguments = ["--inside", case, str(callers), "0"]
        done = subprocess.run(
            command + arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return _collected(done.stderr) / REQUESTS


def of_redis(case: str, callers: int) -> float:
    """Instructions of Redis for a request and its release."""
    with store(CountedStore) as server:
        command = [sys.executable, "-m", __spec__.name, "--inside", case, str(callers), str(server.pid)]
        environment = {**os.environ, "BENCH_REDIS": server.url, "BENCH_TIMEOUT": str(PATIENCE)}
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        server.stop()
        return _collected(server.log) / (REQUESTS // IN_A_CALL * IN_A_CALL)


def _collected(text: str) -> int:
    return int(re.findall(r"Collected : (\d+)", text)[-1])


def main() -> None:
    """Parse the command line, and count."""
    parser = argparse.ArgumentParser(prog="benchmarks.instructions", description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--callers", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        case, callers, pid = arguments.inside
        uvloop.run(inside(case, int(callers), int(pid) or os.getpid()))
        return
    yardsticks: dict[str, float] = {}
    print(f"{'':<16}{'callers':>8}{'app':>10}{'beyond':>10}{'':<17}{'Redis':>10}")
    for case in arguments.cases:
        bare = YARDSTICKS.get(case, "bare")
        if bare not in yardsticks:
            yardsticks[bare] = of_app(bare, 1)
        for callers in arguments.callers:
            app = of_app(case, callers)
            row = f"{case:<16}{callers:>8}{app:>10,.0f}{app - yardsticks[bare]:>10,.0f} {bare:<16}"
            print(row + (f"{of_redis(case, callers):>10,.0f}" if case in IN_REDIS else ""), flush=True)


if __name__ == "__main__":
    main()
