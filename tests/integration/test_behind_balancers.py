"""Behind the shipped configurations of HAProxy, Envoy, Caddy and Traefik, where these are installed."""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from tests.integration.test_behind_proxies import SETTINGS, assert_one_caller, at
from tests.support.apps import AppServer
from tests.support.balancers import KINDS, Balancer, Kind
from tests.support.processes import HOST
from tests.support.slots import until

pytestmark = [pytest.mark.rerun, pytest.mark.once]

TELLS = "tests.integration.test_deploy:app"
FORGED = "203.0.113.9, 127.0.0.1"
# Envoy names itself in place of a client at 127.0.0.1.
CLIENT = "127.0.1.9"

APPENDS = {
    "haproxy": {"http-request set-header X-Forwarded-For %[src]": "option forwardfor"},
    "envoy": {"- remove: x-forwarded-for": "- remove: x-unknown"},
    "caddy": {"admin off\n}": "admin off\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t}\n}"},
}
"""Changes by which a balancer adds to what its client says, as one has to that is not at the edge."""

APPENDED = {
    "haproxy": [FORGED, CLIENT],
    "envoy": [f"{FORGED},{CLIENT}"],
    "caddy": [f"{FORGED}, {CLIENT}"],
}
"""Lines of X-Forwarded-For that then reach the app."""

PATHS = {
    "/a//b/c%2Fd/e;x=1": "/a/b/c%2Fd/e;x=1",
    "/a/../b": "/b",
    "/a/%2e%2e/b": "/b",
    "/A/%70/": "/A/p/",
    "/a/b%20c?d=e%26f": "/a/b%20c",
}
"""Paths as they are sent, and as Traefik hands them on, which tidies them."""


@dataclass(slots=True)
class Deployment:
    """A balancer before two replicas."""

    balancer: Balancer
    replicas: list[AppServer] = field(default_factory=list)

    @property
    def url(self) -> str:
        """URL of the balancer."""
        return self.balancer.url

    def hits(self) -> list[int]:
        """Return the number of requests that each replica has counted."""
        return [int(httpx.get(f"{replica.url}/hits").text) for replica in self.replicas]

    def wait(self) -> None:
        """Wait until the balancer sends requests to both replicas."""
        seen: set[int] = set()

        def both() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}/anything")
                seen.update({answer.json()["pid"]} if answer.status_code == 200 else ())
            return all(seen & set(replica.worker_pids()) for replica in self.replicas)

        until(both)


def told(balancer: Balancer, path: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what reached the app of a request from the client's address."""
    connection = http.client.HTTPConnection(HOST, balancer.port, source_address=(CLIENT, 0), timeout=10)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        seen: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return seen


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    """Yield an exit stack that ends with the module."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """A balancer that is installed."""
    kind = KINDS[request.param]
    if kind.binary is None:
        pytest.skip(f"{kind.name} is not installed")
    return kind


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, stack: ExitStack) -> list[AppServer]:
    """Two replicas of an app that tells what reached it."""
    started = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("replica")
        hits = {"HITS": str(folder / "hits")}
        replica = AppServer(TELLS, folder, "--no-proxy-headers", workers=2, environment=hits)
        stack.callback(replica.stop)
        replica.start()
        started.append(replica)
    return started


@pytest.fixture(scope="module")
def deployment(
    kind: Kind, replicas: list[AppServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """The shipped configuration before two replicas."""
    first, second = replicas
    balancer = Balancer(kind, tmp_path_factory.mktemp(kind.name), (first.port, second.port))
    balancer.start()
    deployment = Deployment(balancer, replicas)
    deployment.wait()
    yield deployment
    balancer.stop()


@pytest.fixture(scope="module", params=["--no-proxy-headers", "--proxy-headers"])
def limited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stack: ExitStack
) -> AppServer:
    """A limited app, with a server that leaves the header alone and with one that reads it too."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "ratelimit.toml").write_text(SETTINGS)
    app = AppServer("tests.support.attack_app:app", folder, request.param, environment=at(folder))
    stack.callback(app.stop)
    app.start()
    return app


@pytest.mark.parametrize("says", ["overwrites", "appends"])
def test_forged_headers_choose_nothing(kind: Kind, limited: AppServer, says: str, tmp_path: Path) -> None:
    """A client is counted as itself, whatever it claims, whether its claims are overwritten or added to."""
    if says == "appends" and kind.name not in APPENDS:
        pytest.skip(f"{kind.name} trusts a client or overwrites what it says")
    replace = APPENDS[kind.name] if says == "appends" else {}
    balancer = Balancer(kind, tmp_path, (limited.port, limited.port), replace)
    balancer.start()
    try:
        until(lambda: httpx.get(f"{balancer.url}/health").status_code == 200)
        assert_one_caller(balancer.port)
    finally:
        balancer.stop()


def test_what_a_client_says_of_its_address_is_overwritten(deployment: Deployment) -> None:
    """A forged X-Forwarded-For or Forwarded never reaches the app, and Host does."""
    forged = {"X-Forwarded-For": FORGED, "Forwarded": "for=203.0.113.9", "Host": "api.example.com"}
    seen = told(deployment.balancer, "/anything", forged)
    assert seen["forwarded_for"] == [CLIENT]
    assert "forwarded" not in seen["headers"]
    assert seen["headers"]["host"] == "api.example.com"


@pytest.mark.parametrize("name", APPENDS)
def test_an_inner_balancer_adds_to_what_reached_it(
    name: str, replicas: list[AppServer], tmp_path: Path
) -> None:
    """The address that the balancer saw is the last, on the same line or on a line of its own."""
    if KINDS[name].binary is None:
        pytest.skip(f"{name} is not installed")
    first, second = replicas
    balancer = Balancer(KINDS[name], tmp_path, (first.port, second.port), APPENDS[name])
    balancer.start()
    try:
        Deployment(balancer, replicas).wait()
        seen = told(balancer, "/anything", {"X-Forwarded-For": FORGED})
        assert seen["forwarded_for"] == APPENDED[name]
    finally:
        balancer.stop()


@pytest.mark.parametrize("path", PATHS)
def test_the_path_is_passed_as_it_was_sent(deployment: Deployment, path: str) -> None:
    """The app and its limiter match the very path of the client, or both the same tidied one."""
    seen = told(deployment.balancer, path)
    is_tidied = deployment.balancer.kind.name == "traefik"
    assert seen["raw_path"] == (PATHS[path] if is_tidied else path.partition("?")[0])


async def test_websockets_are_passed(deployment: Deployment) -> None:
    """A WebSocket handshake goes through, and so do messages."""
    async with websockets.connect(f"ws://{HOST}:{deployment.balancer.port}/socket") as socket:
        await socket.send("hello")
        assert await socket.recv() == "hello"


@pytest.mark.parametrize("status", [429, 503])
def test_a_refused_request_is_never_tried_again(deployment: Deployment, status: int) -> None:
    """A refusal is the answer, however many there are: no replica is taken out for it."""
    before = sum(deployment.hits())
    for _ in range(10):
        assert httpx.get(f"{deployment.url}/status/{status}").status_code == status
    assert sum(deployment.hits()) == before + 10
    assert httpx.get(f"{deployment.url}/anything").status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_request_runs_twice(deployment: Deployment, method: str) -> None:
    """A worker that dies of a request costs an error: no second charge, no other replica."""
    deployment.wait()
    before = deployment.hits()
    with httpx.Client() as client:
        for _ in range(4):
            client.get(f"{deployment.url}/anything")
        try:
            assert client.request(method, f"{deployment.url}/crash").status_code in {502, 503}
        except httpx.RemoteProtocolError:
            # HAProxy's way to say that the client may try again, on a connection that it used before.
            assert deployment.balancer.kind.name == "haproxy"
    time.sleep(0.5)
    after = deployment.hits()
    assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 1]
    deployment.wait()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_other_replica_answers_where_one_is_down(deployment: Deployment, method: str) -> None:
    """A replica that takes no connections costs nobody a request: nothing was sent, so another is tried."""
    deployment.wait()
    down = deployment.replicas[0]
    down.stop()
    try:
        for _ in range(40):
            answer = httpx.request(method, f"{deployment.url}/anything", content=b"body")
            assert answer.status_code == 200
            time.sleep(0.05)
    finally:
        down.restart()
        deployment.wait()
