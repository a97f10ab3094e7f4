"""A limiter that was used before its process forked: each worker goes on by itself, and sees every change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.apps import ROOT
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun


@pytest.mark.parametrize("way", ["ended", "closed", "running", "locked"])
def test_workers_see_what_changes_after_the_fork(tmp_path: Path, redis_server: StoreServer, way: str) -> None:
    """Live keys and changed settings reach workers of a limiter that was used before, whatever its loop does.

    Counts and figures of before are the parent's alone, and no two processes give out the same lease.
    """
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        plans.default = {{ requests = ["100000/hour"], concurrent = 1000 }}
        plans.pro.requests = ["5/hour"]
    """
    file = written(tmp_path / "s.toml", text)
    command = [sys.executable, "-m", "tests.support.forked", str(file), way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    workers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(workers) == 2
    for worker in workers:
        assert (worker["key"], worker["quota"]) == (True, 7)
        assert (worker["leases"], worker["decisions"], worker["batches"]) == (0, 0, 0)
        assert (worker["policy"], worker["counted"], worker["backend_up"]) == ("shared", True, True)
    ids = [each for worker in workers for each in worker["ids"]]
    assert len(ids) == len(set(ids))
    assert "Traceback" not in done.stderr
    assert "Task was destroyed" not in done.stderr
