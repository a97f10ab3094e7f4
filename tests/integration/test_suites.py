"""Suites of apps that run with warnings as errors: what an event loop opened is closed with it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.apps import ROOT
from tests.support.servers import StoreServer
from tests.support.slots import until
from tests.support.topologies import Cluster

pytestmark = [pytest.mark.rerun, pytest.mark.once]

ABOUT_HTTPX = "Using `httpx` with"
"""Start of Starlette's advice to take another client, which is nothing of ours."""
ABOUT_REDIS = "'asyncio.iscoroutinefunction' is deprecated"
"""Start of redis-py's warning on Python 3.14."""


def connections(server: StoreServer) -> int:
    """Return the number of clients that a server has, without the asking one."""
    with server.client() as client:
        return len(client.client_list()) - 1


def test_a_suite_with_warnings_as_errors_passes(
    redis_server: StoreServer, shared_cluster: Callable[[str], Cluster]
) -> None:
    """No socket, transport or task is left to a warning, with or without lifespan, and none to the server."""
    before = connections(redis_server)
    environment = {**os.environ, "REDIS_URL": redis_server.url, "CLUSTER_URL": shared_cluster("redis").url}
    options = [
        "-W",
        "error",
        "-W",
        f"ignore:{ABOUT_HTTPX}",
        "-W",
        f"ignore:{ABOUT_REDIS}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
        "-o",
        "addopts=",
    ]
    command = [sys.executable, "-X", "dev", "-m", "pytest", *options, "tests/support/suite_of_an_app.py"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout[-20_000:]
    assert re.search(r"\d+ passed", run.stdout)
    until(lambda: connections(redis_server) <= before)
