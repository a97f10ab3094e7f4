"""Cost of a start: `python -m benchmarks.start`.

Each line is a process of its own that imports, perhaps starts an app, sends it one request without a socket,
and ends. Printed are its CPU time from beginning to end, the least of all rounds, since other work can only
add to it, and what memory it has in the end (Linux). The bytecode of all modules is on disk, as installers
leave it there: without, Python would compile the sources at each start.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.idle import serving
from tests.support.apps import ROOT
from tests.support.servers import server_binaries

ROUNDS = 15
_BASE = "import starlette.applications, uvicorn\n"
_APP = """
import asyncio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def home(request):
    return PlainTextResponse("home")

app = Starlette(routes=[Route("/", home)])
{middleware}

async def main():
    inbox, outbox, sent = asyncio.Queue(), asyncio.Queue(), asyncio.Queue()
    lifespan = asyncio.ensure_future(app({{"type": "lifespan", "state": {{}}}}, inbox.get, outbox.put))
    await inbox.put({{"type": "lifespan.startup"}})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    await inbox.put({{"type": "http.request", "body": b""}})
    http = {{"type": "http", "http_version": "1.1", "scheme": "http", "method": "GET", "query_string": b""}}
    http |= {{"path": "/", "raw_path": b"/", "root_path": "", "headers": [(b"host", b"app")], "state": {{}}}}
    http |= {{"client": ("192.0.2.1", 1), "server": ("app", 80)}}
    await app(http, inbox.get, sent.put)
    start = await sent.get()
    assert start["status"] == 200, start
    assert any(name == b"x-ratelimit-limit" for name, _ in start["headers"]) == {limited}, start
    await inbox.put({{"type": "lifespan.shutdown"}})
    await lifespan

asyncio.run(main())
"""
_MIDDLEWARE = """
from ratelimit_mw import RateLimitMiddleware, Settings
plans = {{name: {{"requests": ["1000000/minute"]}} for name in ("default", "anonymous")}}
written = {{"identity": {{"hash_secret": "a secret of the benchmark's own"}}, "plans": plans}}
written["backend"] = {{"url": "{url}", "timeout": 5}}
app.add_middleware(RateLimitMiddleware, settings=Settings.model_validate(written))
"""
_MEMORY = """
from pathlib import Path
rollup = Path("/proc/self/smaps_rollup")
lines = rollup.read_text().splitlines()[1:] if rollup.exists() else []
kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
print(kib.get("Rss", 0), kib.get("Private_Dirty", 0))
"""


class Cost(NamedTuple):
    """Cost of one process."""

    cpu_ms: float
    rss_mib: float
    """Memory that it has, compiled code among it, which other processes may share."""
    own_mib: float
    """Memory that it has written to: no other process can share it."""


def programs(url: str) -> dict[str, str]:
    """The processes that are measured, by what they do; one of them asks the server at a URL."""

    def app(backend: str | None = None) -> str:
        middleware = "" if backend is None else _MIDDLEWARE.format(url=backend)
        return _BASE + _APP.format(middleware=middleware, limited=backend is not None)

    return {
        "Python": "",
        "Starlette and uvicorn imported": _BASE,
        "the same and pydantic": _BASE + "from pydantic import BaseModel, SecretStr",
        "the same and ratelimit_mw": _BASE + "import ratelimit_mw",
        "a bare app, one request": app(),
        "limits in memory, one request": app("memory://"),
        "limits in Redis, one request": app(url),
    }


def measure(code: Mapping[str, str], rounds: int) -> dict[str, Cost]:
    """The least cost of each process in so many rounds."""
    costs: dict[str, list[Cost]] = {name: [] for name in code}
    for _ in range(rounds + 1):  # the first round writes the bytecode
        for name, program in code.items():
            costs[name].append(_cost(program))
    return {name: Cost(*map(min, zip(*each[1:], strict=True))) for name, each in costs.items()}


def _cost(program: str) -> Cost:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", program + _MEMORY]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=own, check=True, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rss, own_kib = done.stdout.split()[-2:]
    return Cost(1000 * seconds, int(rss) / 1024, int(own_kib) / 1024)


def main() -> None:
    """Parse the command line, and measure."""
    parser = argparse.ArgumentParser(prog="benchmarks.start", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with serving(arguments.server) as server:
        costs = measure(programs(server.url), arguments.rounds)
    print(f"{'':32} CPU ms  RSS MiB  own MiB")
    for name, cost in costs.items():
        print(f"{name:32} {cost.cpu_ms:6.0f} {cost.rss_mib:8.1f} {cost.own_mib:8.1f}")


if __name__ == "__main__":
    main()
