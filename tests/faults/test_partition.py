"""A worker that a network cuts off from its server under load: afterwards every sum is right."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apps import ROOT
from tests.support.namespaces import FarServer, Network, network, why_not

pytestmark = pytest.mark.rerun


@pytest.fixture
def far(tmp_path: Path, kind: str) -> Iterator[tuple[Network, FarServer]]:
    """A network, and a server of each kind on its other side."""
    if why_not():
        pytest.skip(why_not())
    with network() as between:
        server = FarServer(kind, tmp_path)
        server.network = between
        server.start()
        try:
            yield between, server
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "slots"), [(0.6, "slots"), (2.0, "no slots")])
def test_lost_packets_leave_no_estimate_and_no_slot_without_an_owner(
    far: tuple[Network, FarServer], seconds: float, slots: str
) -> None:
    """The kernel goes on sending what was written before: what was given up charges nothing, however late."""
    between, server = far
    command = [*between.worker.prefix, sys.executable, "-m", "tests.support.partition_app", server.url, slots]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(1)
        for _ in range(2):
            between.cut()
            time.sleep(seconds)
            between.heal()
            time.sleep(1)
        worker.stdin.write("\n")
        worker.stdin.flush()
        told = json.loads(worker.stdout.readline())
    assert told["spent"] == told["ledger"]
    assert (told["held"], told["slots"], told["leases"]) == (0, 0, 0)
    assert told["by"].keys() == {"shared", "local"}
    assert told["lost"] == [0, 0, 0]
