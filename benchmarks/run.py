"""Run the load test: `python -m benchmarks.run`, or `make bench`.

Everything runs on this machine, on servers that it starts and stops. Each round measures every variant
once, with the bare app in between; what counts are ratios and their medians.
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

from benchmarks.load import GENERATOR, Load
from benchmarks.measure import Case, Result, bench
from benchmarks.memory import memory
from benchmarks.peers import PEERS
from benchmarks.plot import bars
from benchmarks.report import goals, render
from ratelimit_mw.compiled import core

RESULTS = Path(__file__).parent / "results"
SWEEPS = ("connections", "callers", "routes", "workers", "limits")


def main() -> None:
    """Parse the command line and run."""
    arguments = _parser().parse_args()
    if any(getattr(arguments, name) for name in SWEEPS):
        _sweep(arguments)
    else:
        _compare(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured")
    parser.add_argument("--seconds", type=int, default=2, help="length of one measurement")
    parser.add_argument("--quick", action="store_true", help="one round of one second, without peers")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="measure these variants alone")
    for name in SWEEPS:
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=f"sweep the number of {name}")
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    """Ours and the peers', against the goals."""
    rounds, seconds = (1, 1) if arguments.quick else (arguments.rounds, arguments.seconds)
    one, many = Load(seconds=seconds), Load(callers=1000, seconds=seconds)
    alone = Load(connections=1, seconds=seconds)
    cases = {
        name: Case(name, one)
        for name in ("bare", "server", "headers", "get", "memory", "redis-1", "redis-2", "prefetch")
    }
    cases |= {f"{name} x1000": Case(name, many) for name in ("memory", "redis-1", "redis-2")}
    cases |= {"refuse": Case("refuse", one)}
    cases |= {} if arguments.quick else {name: Case(name, one) for name in PEERS}
    cases |= {f"{name} latency": Case(name, alone) for name in ("bare", "get", "redis-1", "redis-2")}
    if arguments.only:
        cases = {name: case for name, case in cases.items() if case.variant in (*arguments.only, "bare")}
    with bench() as (running, stack, folder):
        running.start(stack, folder, list(cases.values()))
        measured = running.measure(list(cases.values()), rounds)
        stored = memory(running.store.url, running.client)
        missing = running.missing
    medians = {name: measured[case].medians() for name, case in cases.items() if case in measured}
    _on_fastapi(medians)
    lines = goals(medians, stored)
    kind = "compiled" if core is not None else "in Python alone"
    print(f"load: {GENERATOR}, {rounds} rounds of {seconds} s, the middleware {kind}")
    print(f"\n{_table(medians)}\n\n{render(lines)}")
    for name, reason in missing.items():
        print(f"{name} did not run: {reason}")
    if arguments.quick or arguments.only:
        return
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "compiled": core is not None,
        "load": GENERATOR,
        "rounds": rounds,
        "seconds": seconds,
    }
    table = [{**line._asdict(), "verdict": line.verdict} for line in lines]
    document = {"machine": machine, "goals": table, "cases": medians, "memory": stored, "missing": missing}
    (RESULTS / "latest.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "latest.svg").write_text(_plot(medians))


def _on_fastapi(medians: dict[str, dict[str, float]]) -> None:
    """What runs on FastAPI is a share of bare FastAPI."""
    bare = medians.get("fastapi")
    if bare is not None and "fastapi-limiter" in medians:
        medians["fastapi-limiter"]["share"] = medians["fastapi-limiter"]["rate"] / bare["rate"]


def _table(medians: dict[str, dict[str, float]]) -> str:
    rows = [
        f"{'':<18}{'share':>7}{'req/s':>8}{'p50 us':>8}{'p99 us':>8}{'app us':>8}{'Redis us':>10}{'calls':>7}"
    ]
    for name, figures in medians.items():
        row = f"{name:<18}{figures['share']:>7.2f}{figures['rate']:>8.0f}{figures['p50']:>8.0f}"
        row += f"{figures['p99']:>8.0f}{figures['app_us']:>8.1f}{figures['redis_us']:>10.1f}"
        row += f"{figures['calls']:>7.2f}"
        row += f"  {figures['refused']:.0f} refused" if figures["refused"] else ""
        rows.append(row + (f"  {figures['failed']:.0f} FAILED" if figures["failed"] else ""))
    return "\n".join(rows)


def _plot(medians: dict[str, dict[str, float]]) -> str:
    ours = {
        "redis-1": ("one window", 0.78),
        "redis-1 x1000": ("one window, 1,000 callers", 0.72),
        "redis-2": ("two windows, slot", 0.70),
        "redis-2 x1000": ("the same, 1,000 callers", 0.62),
        "memory": ("the same in memory", 0.85),
        "prefetch": ("two windows, prefetch", 0.85),
    }
    peers = {name: name for name in PEERS if name != "fastapi"} | {"get": "one redis-py GET"}
    values = {shown: medians[name]["share"] for name, (shown, _) in ours.items() if name in medians}
    values |= {shown: medians[name]["share"] for name, shown in peers.items() if name in medians}
    return bars("Throughput as a share of the bare app's", values, dict(ours.values()))


def _sweep(arguments: argparse.Namespace) -> None:
    """How the cost grows: two windows and a slot in Redis, one thing changed at a time."""
    base = Case("redis-2", Load(callers=1000, seconds=arguments.seconds))
    cases = {
        f"{name} {number}": _changed(base, name, number)
        for name in SWEEPS
        for number in getattr(arguments, name) or ()
    }
    yardsticks = {Case("bare", base.load, (), case.workers) for case in cases.values()}
    with bench() as (running, stack, folder):
        running.start(stack, folder, [*yardsticks, *cases.values()])
        measured: dict[Case, Result] = running.measure(list(cases.values()), arguments.rounds)
        missing = running.missing
    print(_table({name: measured[case].medians() for name, case in cases.items() if case in measured}))
    for name, reason in missing.items():
        print(f"{name} did not run: {reason}")


def _changed(base: Case, name: str, number: int) -> Case:
    if name == "connections":
        return replace(base, load=replace(base.load, connections=number))
    if name == "callers":
        return replace(base, load=replace(base.load, callers=number))
    if name == "workers":
        return replace(base, workers=number)
    if name == "limits":
        # So many callers that even the smallest limit refuses nobody.
        environment = (("BENCH_LIMIT", str(number)),)
        return replace(base, load=replace(base.load, callers=20_000), environment=environment)
    return replace(base, environment=(("BENCH_ROUTES", str(number)),))


if __name__ == "__main__":
    main()
