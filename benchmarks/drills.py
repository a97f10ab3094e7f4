"""Run the drills and print what callers saw of each: `python -m benchmarks.drills`.

Two workers are under load while their Redis, on this machine, fails in one way after the other.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from tests.support.drill_faults import DRILLS, Drill
from tests.support.drills import TIMEOUT, WORKERS, Report, run
from tests.support.servers import StoreServer

HEAD = (
    "fault",
    "decided meanwhile by",
    "shared again after",
    "worst added latency",
    "requests",
    "lost",
    "over the limit, healthy",
    "over the limit, all",
)


def main() -> None:
    """Run those that are named, or all, and print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="benchmarks.drills", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of drills")
    parser.add_argument("--kind", default="redis", help="the kind of server: redis, valkey, installed")
    arguments = parser.parse_args()
    print(f"{WORKERS} workers, backend.timeout {TIMEOUT:g} s, {arguments.kind}\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for name, drill in DRILLS.items():
        if not arguments.names or any(part in name for part in arguments.names):
            print(_row(_run(drill, arguments.kind)), flush=True)


def _run(drill: Drill, kind: str) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        server = StoreServer(kind, Path(folder) / "server", *drill.arguments)
        server.start()
        try:
            return asyncio.run(run(drill, server, Path(folder)))
        finally:
            server.stop()


def _row(report: Report) -> str:
    cells = (
        report.drill.name,
        ", ".join(sorted(report.policies - {"shared"})) or "shared",
        f"{report.recovered:.2f} s" if report.drill.is_outage else "-",
        f"{report.added * 1000:.0f} ms",
        len(report.entries),
        report.lost,
        report.over_when_healthy,
        report.over,
    )
    books = report.spent == report.sold or not report.drill.keeps_data
    wrong = [] if books else [f"spent {report.spent} of {report.sold}"]
    wrong += [f"{report.held} held"] if report.held and report.drill.keeps_data else []
    wrong += [f"{report.slots} slots leaked"] if report.slots else []
    return f"| {' | '.join(map(str, cells))} |" + (f" WRONG: {', '.join(wrong)}" if wrong else "")


if __name__ == "__main__":
    main()
