"""The deployment in docker-compose.yml: its nginx and Redis configurations under the real servers."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tests.conftest import StartServer
from tests.support.apps import ROOT, AppServer
from tests.support.nginx import NginxServer

pytestmark = [pytest.mark.rerun, pytest.mark.once]

DEPLOY = ROOT / "examples" / "deploy"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A balancer and its two replicas."""

    balancer: NginxServer
    replicas: list[AppServer]

    def hits(self) -> list[int]:
        """Return the number of requests that each replica has seen, these questions left out."""
        return [int(httpx.get(f"{replica.url}/hits").text) for replica in self.replicas]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The shipped nginx.conf before two replicas of an app that tells what reached it."""
    with ExitStack() as stack:
        replicas = []
        for name in ("app-1", "app-2"):
            folder = tmp_path_factory.mktemp(name)
            replica = AppServer(
                "tests.integration.test_deploy:app",
                folder,
                "--no-proxy-headers",
                workers=2,
                environment={"HITS": str(folder / "hits")},
            )
            stack.callback(replica.stop)
            replica.start()
            replicas.append(replica)
        upstreams = {f"app-{n}:8000": f"127.0.0.1:{replica.port}" for n, replica in enumerate(replicas, 1)}
        balancer = NginxServer(DEPLOY / "nginx.conf", tmp_path_factory.mktemp("nginx"), upstreams)
        stack.callback(balancer.stop)
        balancer.start()
        yield Deployment(balancer, replicas)


def test_nginx_overwrites_what_a_client_says_of_its_address(deployment: Deployment) -> None:
    """A forged X-Forwarded-For or Forwarded never reaches the app, and Host does."""
    forged = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "Host": "api.example.com"}
    seen = httpx.get(f"{deployment.balancer.url}/anything", headers=forged).json()["headers"]
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert "forwarded" not in seen
    assert seen["host"] == "api.example.com"


def test_nginx_passes_the_path_as_it_was_sent(deployment: Deployment) -> None:
    """The app and its limiter match the very path of the client, not a tidied one."""
    path = "/a//b/%2e%2e/c%2Fd/../e;x=1"
    connection = http.client.HTTPConnection("127.0.0.1", deployment.balancer.port, timeout=10)
    connection.putrequest("GET", path)
    connection.endheaders()
    seen = json.loads(connection.getresponse().read())
    connection.close()
    assert seen["raw_path"] == path


async def test_nginx_passes_websockets(deployment: Deployment) -> None:
    """A WebSocket handshake goes through, and so do messages."""
    async with websockets.connect(f"ws://127.0.0.1:{deployment.balancer.port}/socket") as socket:
        await socket.send("hello")
        assert await socket.recv() == "hello"


def test_nginx_spreads_requests_over_the_replicas(deployment: Deployment) -> None:
    """Both replicas serve."""
    with httpx.Client(base_url=deployment.balancer.url) as client:
        pids = {client.get("/anything").json()["pid"] for _ in range(20)}
    for replica in deployment.replicas:
        assert pids & set(replica.worker_pids())


@pytest.mark.parametrize("status", [429, 503])
def test_nginx_never_tries_a_refused_request_again(deployment: Deployment, status: int) -> None:
    """A refusal is the answer: another replica would charge, or refuse, the same request again."""
    before = sum(deployment.hits())
    assert httpx.get(f"{deployment.balancer.url}/status/{status}").status_code == status
    assert sum(deployment.hits()) == before + 1


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_nginx_never_runs_a_request_twice(deployment: Deployment, method: str) -> None:
    """A worker that dies of a request costs a 502: no second charge, and no worker of the other replica."""
    wait_for_replicas(deployment)
    before = deployment.hits()
    with httpx.Client() as client:
        client.get(f"{deployment.balancer.url}/anything")
        assert client.request(method, f"{deployment.balancer.url}/crash").status_code == 502
    time.sleep(0.5)
    after = deployment.hits()
    assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 1]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nginx_goes_to_the_other_replica_where_one_is_down(deployment: Deployment, method: str) -> None:
    """A replica that takes no connections costs nobody a request: nothing was sent, so another is tried."""
    wait_for_replicas(deployment)
    down = deployment.replicas[0]
    down.stop()
    try:
        for _ in range(40):
            answer = httpx.request(method, f"{deployment.balancer.url}/anything", content=b"body")
            assert answer.status_code == 200
            time.sleep(0.05)
    finally:
        down.restart()


def test_nginx_answers_where_all_replicas_are_down(deployment: Deployment) -> None:
    """With nobody to send it to, a request gets a 502; requests are served again when replicas are back."""
    for replica in deployment.replicas:
        replica.stop()
    try:
        for _ in range(3):
            assert httpx.get(f"{deployment.balancer.url}/anything").status_code == 502
    finally:
        for replica in deployment.replicas:
            replica.restart()
    wait_for_replicas(deployment)


def wait_for_replicas(deployment: Deployment) -> None:
    """Wait until the balancer sends requests to both."""
    seen: set[int] = set()
    until = time.monotonic() + 30
    while not all(seen & set(replica.worker_pids()) for replica in deployment.replicas):
        assert time.monotonic() < until
        answer = httpx.get(f"{deployment.balancer.url}/anything")
        seen |= {answer.json()["pid"]} if answer.status_code == 200 else set()
        time.sleep(0.05)


def test_redis_configuration_starts_each_server(kind: str, start_server: StartServer, tmp_path: Path) -> None:
    """The shipped redis.conf is understood by Redis and Valkey, evicts nothing and writes a log."""
    lines = (DEPLOY / "redis.conf").read_text().splitlines(keepends=True)
    configuration = tmp_path / "redis.conf"
    configuration.write_text("".join(line for line in lines if not line.startswith(("port ", "dir "))))
    server = start_server(kind, "--include", str(configuration), password="secret")
    with server.client() as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_compose_publishes_the_balancer_alone() -> None:
    """Compose publishes the balancer alone: past it, anybody could forge addresses, or counts."""
    services = _compose()["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["balancer"]
    assert set(services) == {"balancer", "app-1", "app-2", "redis"}


def test_compose_checks_the_health_of_every_service() -> None:
    """A service that is up but does not work is seen."""
    for service in _compose()["services"].values():
        built = service.get("build", {}).get("dockerfile", "")
        assert "healthcheck" in service or "\nHEALTHCHECK " in (ROOT / built).read_text()


def test_compose_follows_its_specification() -> None:
    """Docker reads the file as it is meant: each name in it is one of the Compose specification's."""
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "docker-compose.yml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_trusts_the_network_of_the_balancer_alone() -> None:
    """X-Forwarded-For is believed where the balancer writes it, and where nothing else can."""
    compose = _compose()
    (front,) = compose["networks"]["front"]["ipam"]["config"]
    trusted = compose["services"]["app-1"]["environment"]["RATELIMIT_IDENTITY__TRUSTED_PROXIES"]
    assert json.loads(trusted) == [front["subnet"]]
    assert compose["networks"]["front"]["internal"]
    assert compose["networks"]["store"]["internal"]


def test_compose_ships_no_secret() -> None:
    """The password and the hash secret come from outside, and there is no start without them."""
    environment = _compose()["services"]["app-1"]["environment"]
    assert "${REDIS_PASSWORD:?" in environment["RATELIMIT_BACKEND__URL"]
    assert environment["RATELIMIT_IDENTITY__HASH_SECRET"].startswith("${RATELIMIT_HASH_SECRET:?")


def _compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


HITS = Path(os.environ.get("HITS", os.devnull))


async def tell(request: Request) -> Response:
    """Answer with the parts of the request that reached the app."""
    raw_path = request.scope["raw_path"].decode()
    seen = {"headers": dict(request.headers), "raw_path": raw_path, "pid": os.getpid()}
    return JSONResponse({**seen, "forwarded_for": request.headers.getlist("x-forwarded-for")})


async def refuse(request: Request) -> Response:
    """Answer with the status of the path, and count."""
    _count()
    return Response(status_code=request.path_params["status"])


async def crash(_request: Request) -> Response:
    """End the worker as a fatal signal would, and count."""
    _count()
    os._exit(1)


def hits(_request: Request) -> Response:
    """Answer with the number of requests that all workers of this replica counted.

    A thread runs it, since it reads a file.
    """
    return Response(str(HITS.stat().st_size if HITS.exists() else 0))


async def echo(socket: WebSocket) -> None:
    """Send back one message."""
    await socket.accept()
    await socket.send_text(await socket.receive_text())
    await socket.close()


def _count() -> None:
    with HITS.open("ab", buffering=0) as file:
        file.write(b"x")


app = Starlette(
    routes=[
        Route("/status/{status:int}", refuse),
        Route("/crash", crash, methods=["GET", "POST", "PUT", "DELETE"]),
        Route("/hits", hits),
        WebSocketRoute("/socket", echo),
        Route("/{rest:path}", tell, methods=["GET", "POST"]),
    ]
)
