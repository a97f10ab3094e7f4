"""A backend that fails under load: nobody is lost, kept waiting or let through unnoticed."""

from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.support.drill_faults import DRILLS
from tests.support.drills import TIMEOUT, WORKERS, Report, run

pytestmark = pytest.mark.rerun

SLACK = 1.0
"""Seconds that a busy machine may take longer."""
FAST = ("killed, restarted empty (kill -9)", "SCRIPT FLUSH, ten times a second")


def check(report: Report) -> None:
    """Assert the requirements of every drill."""
    drill = report.drill
    assert report.lost == 0
    assert report.over_when_healthy == 0
    assert report.slots == 0
    if drill.keeps_data:
        assert report.held == 0
        assert report.spent == report.sold
    if not drill.is_outage:
        assert "shared" in report.policies
    assert "Traceback" not in report.log


def check_times(report: Report) -> None:
    """Assert the requirements of a drill's times, as far as the machine let its processes run."""
    assert report.added < 2 * TIMEOUT + SLACK + report.late
    assert report.returned < 2 + report.late
    away, back = [report.log.count(f"backend is {state}") for state in ("away", "back")]
    if not report.is_starved:
        assert report.recovered < 2
        assert away == back
    if report.drill.is_outage and "reset" not in report.drill.name and "memory" not in report.drill.name:
        assert away >= WORKERS
        assert away <= 2 * WORKERS or report.is_starved


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DRILLS]
)
async def test_a_drill(name: str, start_server: StartServer, tmp_path: Path) -> None:
    """A failure brings no exception, no long wait and no lost slot or settle; shared counts soon return."""
    drill = DRILLS[name]
    report = await run(drill, start_server("redis", *drill.arguments), tmp_path)
    check(report)
    check_times(report)
    if drill.is_outage and "reset" not in name:
        # A server that is there and full is not an outage: nothing is admitted uncounted.
        assert report.policies >= ({"local"} if "memory" in name else {"local", "allow"})
        assert ("allow" in report.policies) is ("memory" not in name)
        assert 503 in {entry.status for entry in report.entries if entry.caller == "deny"}
