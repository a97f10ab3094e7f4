"""Fixtures for every test: real servers, and how hard Hypothesis tries."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import settings

from ratelimit_mw._internal.policy.code_limits import declared
from ratelimit_mw._internal.settings import findings
from tests.support.apps import AppServer
from tests.support.servers import StoreServer, server_binaries
from tests.support.topologies import Cluster

if TYPE_CHECKING:
    from tests.support.certificates import Certificates
    from tests.support.commands import Commands

# Real servers answer when they answer.
settings.register_profile("ratelimit_mw", deadline=None)
settings.load_profile("ratelimit_mw")


REAL_TIME = re.compile(
    "_(browser|connections|drills|faults|network|night|outages|pictures|processes|recovery|sentinel|several"
    "|soak|stream|workers)$"
)
"""Modules whose tests wait for the clock on the wall, by name."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the tests begin first that wait.

    In CI, whose machine is shared, a test marked `rerun` gets a second try, which the summary tells as a
    rerun. Whoever works on the project sees a first failure: some have been faults that show seldom. Each of
    the processes that run tests begins with its share of those that go by the clock: while they wait, others
    use the CPU.
    """
    waiting = {item for item in items if REAL_TIME.search(item.path.stem)}
    for item in items:
        if "CI" in os.environ and item.get_closest_marker("rerun"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        first = [item for item in items if item in waiting]
        items[:] = _dealt(first, [item for item in items if item not in waiting], processes)


def _dealt(waiting: list[pytest.Item], others: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Order the tests so that each of the equal parts that pytest-xdist makes of them begins with some that
    wait; the others stay together by module.
    """
    dealt: list[pytest.Item] = []
    total, rest = len(waiting) + len(others), iter(others)
    for number in range(processes):
        dealt += waiting[number::processes]
        dealt += islice(rest, max(total * (number + 1) // processes - len(dealt), 0))
    return [*dealt, *rest]


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test sees a process that has told no finding yet."""
    monkeypatch.setattr(findings, "_said", set())


@pytest.fixture(autouse=True)
def _limits_of_this_test() -> None:
    """Forget limits in code that other modules of tests have declared, as an app of another process would."""
    declared.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Collect what a test leaves open while it is the one that is told of it, and not a later one."""
    gc.collect()
    gc.freeze()  # what is left now is looked at no more, which makes the next time quick


class StartServer(Protocol):
    """Starts a Redis or Valkey for one test."""

    def __call__(self, kind: str, *arguments: str, password: str = "") -> StoreServer:
        """Start a server of this kind; arguments and password as of `StoreServer`."""
        ...


class StartApp(Protocol):
    """Starts uvicorn for one test."""

    def __call__(
        self, app: str, *arguments: str, workers: int = 1, environment: dict[str, str] | None = None
    ) -> AppServer:
        """Start `module:app`; the rest as of `AppServer`."""
        ...


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], StoreServer]]:
    """The one server of a kind that tests share: started when first asked for, emptied each time."""
    servers: dict[str, StoreServer] = {}
    with ExitStack() as stack:

        def shared(kind: str) -> StoreServer:
            if kind not in servers:
                servers[kind] = StoreServer(kind, tmp_path_factory.mktemp(kind))
                stack.callback(servers[kind].stop)
                servers[kind].start()
            servers[kind].empty()
            return servers[kind]

        yield shared


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Cluster]]:
    """The one cluster of a kind that tests share: started when first asked for, emptied each time."""
    clusters: dict[str, Cluster] = {}
    with ExitStack() as stack:

        def shared(kind: str) -> Cluster:
            if kind not in clusters:
                clusters[kind] = Cluster(kind, tmp_path_factory.mktemp(f"{kind}-cluster"))
                stack.callback(clusters[kind].stop)
                clusters[kind].start()
            clusters[kind].empty()
            return clusters[kind]

        yield shared


@pytest.fixture(params=sorted(server_binaries()))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server in turn: `redis`, `valkey`, and `installed` where there is one."""
    return str(request.param)


@pytest.fixture
def server(kind: str, shared_server: Callable[[str], StoreServer]) -> StoreServer:
    """A running, empty server of each kind, shared with other tests: don't configure it, don't kill it."""
    return shared_server(kind)


@pytest.fixture
def cluster(kind: str, shared_cluster: Callable[[str], Cluster]) -> Cluster:
    """A running, empty cluster of each kind: three primaries, shared with other tests. Slots may be moved."""
    return shared_cluster(kind)


@pytest.fixture
def server_url(server: StoreServer) -> str:
    """The address of `server`."""
    return server.url


@pytest.fixture
def redis_server(shared_server: Callable[[str], StoreServer]) -> StoreServer:
    """A running, empty Redis 6.2, shared with other tests."""
    return shared_server("redis")


@pytest.fixture
def valkey_server(shared_server: Callable[[str], StoreServer]) -> StoreServer:
    """A running, empty Valkey 9.1, shared with other tests."""
    return shared_server("valkey")


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers of the test's own, to configure, pause, kill and restart as it likes."""
    with ExitStack() as stack:

        def start(kind: str, *arguments: str, password: str = "") -> StoreServer:
            folder = tmp_path / f"server-{len(list(tmp_path.iterdir()))}"
            server = StoreServer(kind, folder, *arguments, password=password)
            stack.callback(_end, server)
            server.start()
            return server

        yield start


@pytest.fixture
def start_app(tmp_path: Path) -> Iterator[StartApp]:
    """Start uvicorn on `module:app`, importable from the project's root, with workers and environment."""
    with ExitStack() as stack:

        def start(
            app: str, *arguments: str, workers: int = 1, environment: dict[str, str] | None = None
        ) -> AppServer:
            folder = tmp_path / f"app-{len(list(tmp_path.iterdir()))}"
            served = AppServer(app, folder, *arguments, workers=workers, environment=environment)
            stack.callback(_end, served)
            served.start()
            return served

        yield start


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "Commands":
    """Commands, away from the settings of whoever runs the tests."""
    from tests.support.commands import Commands  # noqa: PLC0415 - needs the extra `cli`

    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    return Commands(capsys)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> "Certificates":
    """Certificates of an authority of the module's own."""
    from tests.support.certificates import Certificates  # noqa: PLC0415 - few tests need it

    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the variables of whoever runs the tests that are settings."""
    for variable in [name for name in os.environ if name.startswith("RATELIMIT_")]:
        monkeypatch.delenv(variable)


def _end(server: StoreServer | AppServer) -> None:
    """Stop it and print what it wrote, which pytest shows where the test failed."""
    server.stop()
    print(f"--- {server.name} on port {server.port} wrote:\n{server.log}")  # noqa: T201
