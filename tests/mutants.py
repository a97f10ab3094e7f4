"""Mutation testing of the code that decides: `make mutants`, or `python -m tests.mutants money routing:40`.

Cosmic Ray's operators change one thing of a module after the other, in a copy of this project, and the tests
that concern the module run on each such mutant, in Python alone. A change that no test notices survives, and
is printed: either a test is missing, or the change means nothing. A module takes minutes.
"""

import argparse
import difflib
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple, NoReturn, Protocol

import pytest
from _pytest.main import pytest_runtestloop
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword, Name

Process = get_context("fork").Process
Node = Any
"""A node or a leaf of a tree of parso, which has few types."""
ROOT = Path(__file__).resolve().parent.parent
OWN = ("ratelimit_mw", "tests")
WALL_SECONDS = 300.0
"""A run of the tests that takes longer waits for something that never comes.

So does one in a fork that takes five times as long as the first one, and half a minute."""

OPTIONS = ("-x", "-q", "-p", "no:cacheprovider")
COMMAND = (sys.executable, "-m", "pytest", *OPTIONS)
LONGEST = 0.15
"""Seconds that a test may keep the processor busy: one that takes longer is left out."""
SERVERS = {
    "cluster",
    "kind",
    "redis_server",
    "server",
    "server_url",
    "start_app",
    "start_server",
    "valkey_server",
}
"""Fixtures of tests that are left out, as those of a parameter that names a server are."""

OUTCOMES = """
    status spending headers refused units late_limits conformance_money conformance_slots conformance_units
"""
COUNTS = "conformance_windows conformance_slots conformance_money conformance_sharing prefetch_backends"

MODULES = {
    "backends/memory/budgets": f"{COUNTS} estimates clock_steps memory_bounds local",
    "backends/memory/counts": f"{COUNTS} clock_steps memory_bounds local",
    "backends/memory/meters": "conformance_units units memory_bounds",
    "backends/memory/prepared": f"{COUNTS} memory_bounds",
    "backends/memory/backend": f"{COUNTS} memory_bounds local limiter",
    "backends/memory/bounded_store": "memory_bounds",
    "cache/prefetch": "prefetch prefetch_backends",
    "cache/prefetch_state": "prefetch prefetch_backends",
    "cache/refusals": "refused",
    "lease/lease": "slots spending refused estimates jobs units late_limits",
    "lease/manager": "detach settling renewals spending jobs estimates units late_limits limits_by_answer",
    "lease/settling": "settling spending jobs estimates units units_outage late_limits",
    "lease/renewals": "renewals slots estimates",
    "limiter/decider": "limiter hooks_decisions hooks_log decision_counts slots refused local unservable"
    " prefetch limits_by_answer max_wait units",
    "model/charge": f"{OUTCOMES} charge limits_in_code memory_bounds prefetch",
    "model/outcome": OUTCOMES,
    "model/reservation": f"reservation {OUTCOMES}",
    "model/limits": "limits headers conformance_windows application_share",
    "model/money": "money spending",
    "model/periods": "periods",
    "model/status": "status refused",
    "observe/decision_counts": "decision_counts prometheus",
    "outage/fallback": "local unservable units_outage application_share",
    "outage/reconcile": "local units_outage",
    "outage/unsynced": "unsynced local units_outage",
    "policy/api_key_reader": "identity",
    "policy/client_address": "address forwarded_findings identity networks",
    "policy/decision": "decision headers refusals spending units limiter limits_switches rate_limited"
    " late_limits",
    "policy/identity": "identity policy resolve",
    "policy/lookup": "policy identity spending",
    "policy/policy": "policy refusals spending decision_counts",
    "policy/routing": "routing loose_paths",
    "responses/header_sender": "headers websocket spending",
    "responses/headers": "headers spending policy",
    "responses/refusals": "refusals refusals_problem websocket spending refused kept_bodies networks units",
}
"""The modules, and the tests that concern each."""

NAMES = """
    ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_FloorDiv
    ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_Mod_FloorDiv
    ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_RShift_LShift ReplaceBinaryOperator_LShift_RShift
    ReplaceBinaryOperator_BitOr_BitAnd ReplaceBinaryOperator_BitAnd_BitOr
    ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq ReplaceComparisonOperator_Lt_LtE
    ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE ReplaceComparisonOperator_GtE_Gt
    ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is
    ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Not AddNot
    ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue
    ReplaceContinueWithBreak ExceptionReplacer NumberReplacer ZeroIterationForLoop
"""
"""Operators of Cosmic Ray: of each kind the change that is noticed least. A test that notices a difference
in place of a sum notices a product as well."""


class Operator(Protocol):
    """One kind of change, as Cosmic Ray has it."""

    def mutation_positions(self, node: Node) -> Iterator[tuple[object, object]]:
        """Yield the start and end of a node once for each change that can be made to it."""

    def mutate(self, node: Node, index: int) -> Node:
        """Make one of them."""


class DeleteStatement:
    """Leaves out an assignment or a call; not in `__init__`, where an attribute would be missing."""

    def mutation_positions(self, node: Node) -> Iterator[tuple[object, object]]:
        """Yield the position of a statement that can be left out."""
        if node.type == "simple_stmt" and node.children[0].type in {"expr_stmt", "atom_expr", "await"}:
            scope = node.search_ancestor("funcdef", "classdef")
            if scope is not None and scope.type == "funcdef" and scope.name.value != "__init__":
                yield node.start_pos, node.end_pos

    def mutate(self, node: Node, index: int) -> Node:
        """Put `pass` in its place."""
        node.children[0] = Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)
        return node


class SwapFunction:
    """Puts the greatest in place of the least and all in place of any, and the other way round."""

    def __init__(self) -> None:
        self.other = {"min": "max", "max": "min", "any": "all", "all": "any"}

    def mutation_positions(self, node: Node) -> Iterator[tuple[object, object]]:
        """Yield the position of such a name."""
        if isinstance(node, Name) and node.value in self.other:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Node, index: int) -> Node:
        """Put its counterpart in its place."""
        node.value = self.other[node.value]
        return node


class Mutant(NamedTuple):
    """One change of a module."""

    line: int
    operator: Operator
    occurrence: int

    def of(self, code: str) -> str:
        """Change the module; return it as it is where the operator fails on what it found."""
        with suppress(AttributeError):
            return str(mutate_code(code, self.operator, self.occurrence))
        return code


def mutants(code: str) -> list[Mutant]:
    """Find every mutant of a module, in the order of its lines."""
    found, nodes = [], list(ast_nodes(get_ast(code)))
    operators = [get_operator(f"core/{name}")() for name in NAMES.split()]
    for operator in (*operators, DeleteStatement(), SwapFunction()):
        changed = [node for node in nodes for _ in operator.mutation_positions(node)]
        found += [
            Mutant(node.start_pos[0], operator, occurrence)
            for occurrence, node in enumerate(changed)
            if not _is_inert(node)
        ]
    return sorted(found, key=lambda each: each.line)


def _is_inert(node: Node | None) -> bool:
    """Whether a node is part of an annotation or a decorator, such as `dataclass(frozen=True)`.

    Nothing looks at an annotation, and no request sees whether a class has slots.
    """
    while node is not None and node.parent is not None:
        parent = node.parent
        if parent.type == "decorator" or (parent.type == "annassign" and node is parent.children[1]):
            return True
        if parent.type == "tfpdef" or (parent.type == "funcdef" and node is parent.annotation):
            return True
        node = parent
    return False


class Trial:
    """A plugin of pytest that runs the tests it has collected on each mutant of a module.

    Each run is a fork of this process, in which the functions that differ get the mutant's code. A change
    outside of functions takes a new process, which imports everything anew.
    """

    def __init__(self, path: Path, lines: str, every: int, *, is_quick: bool) -> None:
        """`path` is the module's, in a copy of the project."""
        self.is_quick = is_quick
        self.path = path
        self.seconds: dict[str, float] = {}
        self.limit = 0
        self.wall = WALL_SECONDS
        self.noted = path.with_suffix(".noted")
        self.functions: list[FunctionType] = []
        self.code = path.read_text(encoding="utf-8")
        self.mutants = [
            each for each in mutants(self.code) if not lines or str(each.line) in lines.split(",")
        ]
        self.tried = self.mutants[::every]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests as often as there are mutants, and print which of these survive."""
        self.functions = [each for each in gc.get_objects() if isinstance(each, FunctionType)]
        gc.freeze()  # or each fork would copy nearly all
        self._choose(session)
        survivors = left_out = 0
        for mutant in self.tried:
            code = mutant.of(self.code)
            if self.is_quick and self._changed(code) is None:
                left_out += 1
            elif code != self.code and self._survives(session, code):
                survivors += 1
                lines = difflib.unified_diff(self.code.splitlines(), code.splitlines(), lineterm="", n=0)
                print("\n".join([f"{self.path.name}:{mutant.line}", *list(lines)[3:]]), flush=True)  # noqa: T201
        total = f"{survivors} of {len(self.tried) - left_out} survived, of {len(self.mutants)}"
        print(f"{self.path.name}: {total}", flush=True)  # noqa: T201
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note how long each test keeps the processor busy."""
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which test has failed, for the process that this one is a fork of."""
        if report.failed:
            self.noted.write_text(report.nodeid)

    def _choose(self, session: pytest.Session) -> None:
        """Run the tests on the module as it is, and go on with those that are quick, the quickest first."""
        session.items = [each for each in session.items if not needs_server(each)]
        began = time.monotonic()
        first = _fork(session, [], {}, 0, lambda: self.noted.write_text(json.dumps(self.seconds)))
        if not _passes(first, WALL_SECONDS):
            raise SystemExit(f"the tests of {self.path.name} fail without any change")
        self.wall = 30 + 5 * (time.monotonic() - began)
        self.seconds = json.loads(self.noted.read_text())
        number = len(session.items)
        session.items = [each for each in session.items if self.seconds[each.nodeid] <= LONGEST]
        print(f"{self.path.name}: {len(session.items)} of {number} tests are quick", flush=True)  # noqa: T201
        session.items.sort(key=lambda each: self.seconds[each.nodeid])
        self.limit = 5 + round(4 * sum(self.seconds[each.nodeid] for each in session.items))

    def _survives(self, session: pytest.Session, code: str) -> bool:
        """Whether all tests pass on a mutant. A run that takes much longer than it should has failed."""
        changed = self._changed(code)
        if changed is not None:
            self.noted.write_text("")
            passed = _passes(_fork(session, self.functions, changed, self.limit), self.wall)
            # What has noticed this change may notice the next.
            failed = self.noted.read_text()
            session.items.sort(key=lambda each: each.nodeid != failed)
            return passed
        self.path.write_text(code, encoding="utf-8")
        try:
            command = [*COMMAND, *[each.nodeid for each in session.items]]
            return _passes(_spawn(command, 2 * self.limit), WALL_SECONDS)
        finally:
            self.path.write_text(self.code, encoding="utf-8")

    def _changed(self, code: str) -> dict[CodeType, CodeType] | None:
        """The functions that a mutant changes; None where it changes anything else, or can't be compiled."""
        try:
            return changed_functions(self.code, code, str(self.path))
        except SyntaxError:
            return None


def changed_functions(before: str, after: str, path: str) -> dict[CodeType, CodeType] | None:
    """The code of each function that differs, before and after; None where anything else differs."""
    changed: dict[CodeType, CodeType] = {}
    pairs = [(compile(before, path, "exec"), compile(after, path, "exec"))]
    for old, new in pairs:
        if old == new:
            continue
        parts = [[each for each in code.co_consts if isinstance(each, CodeType)] for code in (old, new)]
        if old.co_flags & inspect.CO_NEWLOCALS:
            changed[old] = new
        elif (
            old.co_code != new.co_code or len(parts[0]) != len(parts[1]) or _constants(old) != _constants(new)
        ):
            return None
        else:
            pairs += zip(*parts, strict=True)
    return changed


def _constants(code: CodeType) -> list[object]:
    return [(type(each), each) for each in code.co_consts if not isinstance(each, CodeType)]


def needs_server(item: pytest.Item) -> bool:
    """Whether a test starts a server, or looks at real time for long."""
    values = (
        item.callspec.params.values()
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else ()
    )
    fixtures = set(getattr(item, "fixturenames", ()))
    servers = any(isinstance(each, str) and each in {"redis", "valkey", "cluster"} for each in values)
    return servers or bool(fixtures & SERVERS) or item.get_closest_marker("slow") is not None


def _fork(
    session: pytest.Session,
    functions: list[FunctionType],
    changed: dict[CodeType, CodeType],
    seconds: int,
    at_end: Callable[[], object] = lambda: None,
) -> int:
    """Run the tests with the changed functions, in a process of their own; its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    passed = False
    try:
        _limit(seconds)
        for function in functions:
            function.__code__ = changed.get(function.__code__, function.__code__)
        with suppress(session.Failed):
            pytest_runtestloop(session)
        at_end()
        passed = not session.testsfailed
    finally:
        os._exit(0 if passed else 1)


def _spawn(command: list[str], seconds: int) -> int:
    """Run the tests in a new process; its id."""
    return os.fork() or _become(command, seconds)


def _become(command: list[str], seconds: int) -> NoReturn:
    _limit(seconds)
    os.execv(command[0], command)


def _limit(seconds: int) -> None:
    """Be quiet, in a group of processes of its own, and end after so many seconds of work; 0 for never."""
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    if seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _passes(pid: int, seconds: float) -> bool:
    """Whether the process ends well, and in so many seconds; what it started ends with it."""
    end, status = time.monotonic() + seconds, 0
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = ended[1] if ended[0] else os.waitpid(pid, 0)[1]
    return status == 0


def main() -> None:
    """Parse the command line, and try the mutants of the modules one after the other."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="all, where none is named; money:40,41: lines of one")
    parser.add_argument("--every", type=int, default=1, help="try only each so-manieth mutant")
    parser.add_argument("--quick", action="store_true", help="leave out what is changed outside of functions")
    asked = parser.parse_args()
    wanted = {name: lines for name, _, lines in (each.partition(":") for each in asked.modules)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in OWN:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for module, tests in MODULES.items():
            lines = [lines for name, lines in wanted.items() if f"/{module}".endswith(f"/{name}")]
            if lines or not wanted:
                each = Process(target=_try, args=(folder, module, tests, "".join(lines), asked))
                each.start()
                each.join()


def _try(folder: Path, module: str, tests: str, lines: str, asked: argparse.Namespace) -> None:
    """Try the mutants of one module, in a process of its own that imports the copy."""
    os.chdir(folder)
    os.environ["RATELIMIT_PURE_PYTHON"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(each for each in sys.path if each not in {"", str(ROOT)})]
    for name in [each for each in sys.modules if each.partition(".")[0] in OWN]:
        del sys.modules[name]
    path = folder / "ratelimit_mw" / "_internal" / f"{module}.py"
    trial = Trial(path, lines, asked.every, is_quick=asked.quick)
    found = [list(folder.glob(f"tests/*/test_{each}.py")) for each in tests.split()]
    if not all(found):
        raise SystemExit(f"{module}: not all of these tests are there: {tests}")
    files = [str(file) for each in found for file in each]
    if pytest.main([*OPTIONS, "-s", *files], plugins=[trial]):
        raise SystemExit(f"the tests of {module} could not be run")


if __name__ == "__main__":
    main()
