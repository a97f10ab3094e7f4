"""An upgrade while it runs: two of the shipped units behind nginx, restarted one after the other."""

import asyncio
import os
import re
import shlex
import subprocess
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.integration.test_deploy_hosts import WAIT_SECONDS, as_here, asked, in_unit
from tests.support.apps import ROOT
from tests.support.nginx import NginxServer
from tests.support.pages import blocks
from tests.support.servers import StoreServer
from tests.support.slots import until

pytestmark = [pytest.mark.rerun, pytest.mark.slow]

CALLERS = 8
QUOTA = 1_000_000
APP = "tests.support.live_app:app"


class Unit:
    """The shipped unit, with a socket of its own, as systemd starts and stops it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """Output of all its processes so far."""
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Carry out `ExecStart`, and wait until both workers serve."""
        (command,) = in_unit("ExecStart")
        before = len(self.workers())
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                as_here(command.replace("app:app", APP), self.folder),
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(lambda: self.log.count("Application startup complete.") == before + 2, WAIT_SECONDS)
        assert asked(self.folder, "/") == 200

    def stop(self) -> None:
        """Carry out each `ExecStop`, send SIGTERM, and wait for the end."""
        assert self.process is not None
        for command in in_unit("ExecStop"):
            subprocess.run(shlex.split(command.replace("/run/api/", f"{self.folder}/")), check=True)
        self.process.terminate()
        self.process.wait(WAIT_SECONDS)

    def restart(self) -> None:
        """`systemctl restart`."""
        self.stop()
        self.start()

    def workers(self) -> list[int]:
        """The processes that served at any time, in the order they were started."""
        log = self.log if (self.folder / "log").exists() else ""
        return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", log)]


@pytest.fixture
def units(redis_server: StoreServer) -> Iterator[list[Unit]]:
    """Two units with one Redis, in folders whose paths are short enough for sockets."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "ratelimit.toml").write_text(f'plans.default = {{requests = ["{QUOTA}/hour"]}}\n')
        variables = dict(line.split("=", 1) for line in in_unit("Environment"))
        environment = {
            **os.environ,
            **variables,
            "RATELIMIT_SETTINGS": str(folder / "ratelimit.toml"),
            "RATELIMIT_BACKEND__URL": redis_server.url,
            "RATELIMIT_IDENTITY__HASH_SECRET": "a hash secret of two units",
        }
        units = [Unit(folder / letter, environment) for letter in "ab"]
        for unit in units:
            unit.start()
            stack.callback(unit.stop)
        yield units


def configuration(units: list[Unit]) -> str:
    """The configuration of nginx that the page on deployment shows, with the sockets of two units."""
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    one = next(block.text for block in blocks(page) if block.language == "nginx")
    (two,) = re.findall(r"^  upstream api \{.*?^  \}\n", page, re.MULTILINE | re.DOTALL)
    server = one[one.index("server {\n") :].replace("listen 80;", "listen 8080;")
    for unit in units:
        two = two.replace(f"/run/api-{unit.folder.name}/", f"{unit.folder}/")
    return f"events {{}}\nhttp {{\n{textwrap.dedent(two)}{server}}}\n"


async def test_units_are_restarted_under_load(units: list[Unit], tmp_path: Path) -> None:
    """Every request gets its answer, from old and from new processes, and each is counted once."""
    file = tmp_path / "nginx.conf"
    file.write_text(configuration(units), "utf-8")
    balancer = NginxServer(file, tmp_path / "nginx", {})
    balancer.start()
    answers: Counter[int] = Counter()
    workers: set[int] = set()
    is_over = asyncio.Event()

    async def call(client: httpx.AsyncClient, method: str) -> None:
        while not is_over.is_set():
            answer = await client.request(method, "/?seconds=0.01", headers={"X-API-Key": "a"})
            answers[answer.status_code] += 1
            if answer.status_code == 200:
                workers.add(answer.json()["worker"])

    async def met(unit: Unit, which: slice) -> None:
        while not workers & set(unit.workers()[which]):
            await asyncio.sleep(0.05)

    try:
        async with httpx.AsyncClient(base_url=balancer.url, timeout=WAIT_SECONDS) as client:
            async with asyncio.TaskGroup() as group:
                for number in range(CALLERS):
                    group.create_task(call(client, ("GET", "POST")[number % 2]))
                async with asyncio.timeout(3 * WAIT_SECONDS):
                    for unit in units:
                        await met(unit, slice(2))  # the balancer finds out in its own time who is up
                        await asyncio.to_thread(unit.restart)
                        await met(unit, slice(2, 4))
                is_over.set()
            last = await client.get("/", headers={"X-API-Key": "a"})
    finally:
        balancer.stop()
    for unit in units:
        assert len(unit.workers()) == 4
    assert answers.total() == answers[200], answers
    assert QUOTA - int(last.headers["X-RateLimit-Remaining"]) == answers.total() + 1
