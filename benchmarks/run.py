"""Run the load test: `python -m benchmarks.run`, or `make bench`.

Everything runs on this machine, on servers that it starts and stops. Each round measures every variant
once, between two measurements of the bare app; what counts are ratios to those, and their medians.
"""

import argparse
import json
import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.load import GENERATOR, Load
from benchmarks.measure import Bench, Case, awake, bench
from benchmarks.memory import memory
from benchmarks.peers import PEERS
from benchmarks.plot import bars
from benchmarks.report import SHARES, Medians, goals, render, table
from ratelimit_mw._internal.runtime.compiled import PURE, is_compiled

MANY = 1000
"""Callers in turn, each known to the process and to Redis."""
SOME = 100
"""Callers in turn where one thing more is asked of the middleware."""
MORE = ("redis-2", "priced", "on_decision", "identify", "resolve", "price", "traced")
"""Variants with two windows and a slot in Redis, each with one thing more, after the one without."""
YARDSTICKS = {"fastapi-limiter": "fastapi", "traced": "bare traced"}
"""Yardsticks of the variants that are not measured against the bare app."""
RESULTS = Path(__file__).parent / "results"
SWEEPS = ("connections", "callers", "routes", "workers", "limits")
FIRST, *_ = SWEPT = ("redis-2", "redis-1", "prefetch", "memory")
"""Variants of which a sweep shows how the cost grows."""


def main() -> None:
    """Parse the command line and run."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 1
    with awake() if arguments.awake else nullcontext():
        _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not any(getattr(arguments, name) for name in SWEEPS):
        if arguments.stored:
            parser.error("--stored goes with a sweep, such as --callers")
        _compare(arguments)
        return
    swept = arguments.only or [FIRST]
    if not set(swept) <= set(SWEPT) or (arguments.stored and "memory" in swept):
        parser.error("a sweep is of redis-2, redis-1, prefetch or, without --stored, memory")
    _sweep(arguments, swept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="times that everything is measured")
    parser.add_argument("--seconds", type=int, default=1, help="length of one measurement")
    parser.add_argument("--quick", action="store_true", help="one round of one second, without peers")
    parser.add_argument("--awake", action="store_true", help="let no core fall asleep (Linux)")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="measure, or sweep, these variants alone"
    )
    for name in SWEEPS:
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=f"sweep the number of {name}")
    parser.add_argument(
        "--stored", type=int, metavar="N", help="sweep with the windows of N callers in Redis"
    )
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    """Ours and the peers', against the goals."""
    cases = _cases(arguments)
    with bench() as (running, stack, folder):
        running.start(stack, folder, list(cases.values()))
        medians = _medians(running, cases, arguments.rounds)
        stored = memory(running.store.url, running.client)
        missing = running.missing
    lines = goals(medians, stored)
    kind = "compiled" if is_compiled() else "in Python alone"
    print(f"load: {GENERATOR}, {arguments.rounds} rounds of {arguments.seconds} s, the middleware {kind}")
    print(f"\n{table(medians)}\n\n{render(lines)}")
    _print_missing(missing)
    if arguments.quick or arguments.only or arguments.awake:
        return
    machine = {
        "python": platform.python_version(),
        "compiled": is_compiled(),
        "load": GENERATOR,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
    }
    written = [{**line._asdict(), "verdict": line.verdict} for line in lines]
    document = {"machine": machine, "goals": written, "cases": medians, "memory": stored, "missing": missing}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "latest.svg").write_text(_plot(medians))


def _cases(arguments: argparse.Namespace) -> dict[str, Case]:
    """Return the cases to measure, by the names that the tables and the goals have for them."""
    one, alone = Load(seconds=arguments.seconds), Load(connections=1, seconds=arguments.seconds)
    many = replace(one, callers=MANY)
    undecided = ("bare", "server", "headers", "refusal", "get")
    cases = {name: Case(name, one) for name in (*undecided, "memory", "redis-1", "redis-2", "prefetch")}
    cases |= {f"memory x{MANY}": Case("memory", many)}
    cases |= {f"{name} x{MANY}": Case(name, many, stored=MANY) for name in ("redis-1", "redis-2")}
    cases |= {"refuse": Case("refuse", one)}
    some = replace(one, callers=SOME)
    cases |= {f"{name} x{SOME}": Case(name, some, yardstick=YARDSTICKS.get(name, "bare")) for name in MORE}
    cases |= {f"redis-2 pure x{SOME}": Case("redis-2", some, environment=((PURE, "1"),))}
    if not arguments.quick:
        cases |= {name: Case(name, one, yardstick=YARDSTICKS.get(name, "bare")) for name in PEERS}
    cases |= {f"{name} latency": Case(name, alone) for name in ("bare", "get", "redis-1", "redis-2")}
    if not arguments.only:
        return cases
    floors = {floor for _, case, _, floor in SHARES if cases[case].variant in arguments.only}
    wanted = {"bare", *arguments.only, *floors}
    return {name: case for name, case in cases.items() if case.variant in wanted}


def _medians(running: Bench, cases: dict[str, Case], rounds: int) -> dict[str, dict[str, float]]:
    measured = running.measure(list(cases.values()), rounds)
    return {name: measured[case].medians() for name, case in cases.items() if case in measured}


def _print_missing(missing: dict[str, str]) -> None:
    for name, reason in missing.items():
        print(f"{name} did not run: {reason}")


def _plot(medians: Medians) -> str:
    ours = {
        "redis-1": ("one window", 0.78),
        "redis-1 x1000": ("one window, 1,000 callers", 0.72),
        "redis-2": ("two windows, slot", 0.70),
        "redis-2 x1000": ("the same, 1,000 callers", 0.62),
        "memory": ("the same in memory", 0.85),
        "prefetch": ("two windows, prefetch", 0.85),
        f"priced x{SOME}": ("two windows, slot, price", 0.58),
        f"on_decision x{SOME}": ("two windows, slot, on_decision", 0.62),
        f"identify x{SOME}": ("two windows, slot, identify", 0.62),
        f"redis-2 pure x{SOME}": ("two windows, slot, in Python alone", 0.56),
    }
    peers = {name: name for name in PEERS if name != "fastapi"} | {"get": "one redis-py GET"}
    values = {shown: medians[name]["share"] for name, (shown, _) in ours.items() if name in medians}
    values |= {shown: medians[name]["share"] for name, shown in peers.items() if name in medians}
    return bars("Throughput as a share of the bare app's", values, dict(ours.values()))


def _sweep(arguments: argparse.Namespace, swept: list[str]) -> None:
    """Print the growth of the cost, one thing changed at a time."""
    load = Load(callers=MANY, seconds=arguments.seconds)
    medians: dict[str, dict[str, float]] = {}
    with bench() as (running, stack, folder):
        for variant in swept:  # one after the other: each fills Redis with its own callers
            base = Case(variant, load, stored=0 if variant == "memory" else MANY)
            cases = {
                f"{variant}, {name} {number}": _stored(_changed(base, name, number), arguments.stored)
                for name in SWEEPS
                for number in getattr(arguments, name) or ()
            }
            running.start(stack, folder, list(cases.values()))
            medians |= _medians(running, cases, arguments.rounds)
    print(table(medians))
    if arguments.stored:
        print("\n".join(running.held))
    _print_missing(running.missing)


def _changed(base: Case, name: str, number: int) -> Case:
    if name == "connections":
        return replace(base, load=replace(base.load, connections=number))
    if name == "callers":
        # Whoever comes is new, unless `--stored` says otherwise: that is what many callers are to Redis.
        return replace(base, load=replace(base.load, callers=number), stored=0)
    if name == "workers":
        return replace(base, workers=number)
    if name == "limits":
        # So many callers that even the smallest limit refuses nobody.
        environment = (("BENCH_LIMIT", str(number)),)
        return replace(base, load=replace(base.load, callers=20_000), environment=environment, stored=0)
    return replace(base, environment=(("BENCH_ROUTES", str(number)),))


def _stored(case: Case, callers: int | None) -> Case:
    """Return the case with the windows of so many callers in Redis, long enough to be there to the end."""
    if callers is None:
        return case
    return replace(case, stored=callers, environment=(*case.environment, ("BENCH_PERIODS", "hour day")))


if __name__ == "__main__":
    main()
