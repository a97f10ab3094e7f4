"""A backend that fails under load: nobody is lost, kept waiting or let through unnoticed."""

from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.drills import DRILLS, TIMEOUT, WORKERS, Report, run

SLACK = 1.0
"""Seconds that a busy machine may take longer."""
FAST = ("killed, restarted empty (kill -9)", "SCRIPT FLUSH, ten times a second")


def check(report: Report) -> None:
    """What is required of every drill."""
    drill = report.drill
    assert report.lost == 0
    assert report.added < 2 * TIMEOUT + SLACK
    assert report.recovered < 2
    assert report.over_when_healthy == 0
    assert report.slots == 0
    if drill.keeps_data:
        assert report.held == 0
        assert report.spent == report.sold
    if not drill.is_outage:
        assert "shared" in report.policies
    assert "Traceback" not in report.log
    assert report.log.count("backend is away") == report.log.count("backend is back")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DRILLS]
)
async def test_a_drill(name: str, start_server: StartServer, tmp_path: Path) -> None:
    """Whatever fails: no exception, no long wait, no slot or settle lost, and shared counts soon again."""
    drill = DRILLS[name]
    report = await run(drill, start_server("redis", *drill.arguments), tmp_path)
    check(report)
    if drill.is_outage and "reset" not in name:
        assert report.policies >= {"local", "allow"}
        assert 503 in {entry.status for entry in report.entries if entry.caller == "deny"}
        assert WORKERS <= report.log.count("backend is away") <= 2 * WORKERS or "memory" in name
