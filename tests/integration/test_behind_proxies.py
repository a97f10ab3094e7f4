"""Behind the shipped nginx configuration, and its likes: a forged header never chooses an address."""

import http.client
import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import h2.config
import h2.connection
import pytest

from tests.integration.test_deploy import DEPLOY
from tests.support.apps import AppServer
from tests.support.nginx import NginxServer
from tests.support.processes import HOST, ServerProcess, free_port
from tests.support.raw import RawConnection, head
from tests.support.slots import until

pytestmark = [pytest.mark.rerun, pytest.mark.once]

SLOTS = 3
SETTINGS = f"""
[identity]
trusted_proxies = ["127.0.0.1/32", "unix"]

[plans.anonymous]
requests = ["1000/hour"]

[plans.default]
requests = ["1000/hour"]
concurrent = {SLOTS}

[[routes]]
path = "/peak"
exempt = true

[[routes]]
path = "/health"
exempt = true
"""

OVERWRITES = "proxy_set_header X-Forwarded-For $remote_addr;"
APPENDS = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
UPSTREAMS = ("app-1:8000", "app-2:8000")

FORGED: list[dict[str, str]] = [
    {},
    {"X-Forwarded-For": "203.0.113.9"},
    {"X-Forwarded-For": "203.0.113.10, 127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1, 127.0.0.1, 127.0.0.1"},
    {"X-Forwarded-For": "unknown"},
    {"X-Forwarded-For": "[2001:db8::1]:80"},
    {"X-Forwarded-For": "," * 100},
    {"X-Forwarded-For": "203.0.113.1, " * 300},
    {"x-forwarded-for": "203.0.113.11", "X-FORWARDED-FOR": "203.0.113.12"},
    {"Forwarded": "for=203.0.113.13"},
    {"Forwarded": 'for="[2001:db8::1]:1", for=127.0.0.1'},
    {"X-Real-IP": "203.0.113.14", "True-Client-IP": "203.0.113.14", "CF-Connecting-IP": "203.0.113.14"},
    {"X-Client-IP": "203.0.113.15", "Client-IP": "203.0.113.15", "X-Originating-IP": "203.0.113.15"},
    {"X_Forwarded_For": "203.0.113.16"},
]

Server = TypeVar("Server", bound=ServerProcess)

_clients = (f"127.0.1.{number}" for number in itertools.count(1))


class SocketServer(AppServer):
    """uvicorn on a Unix socket."""

    @property
    def path(self) -> Path:
        """The socket."""
        return self.folder / "app.sock"

    def command(self) -> list[str]:
        """Return the server's command with a Unix socket in place of a port."""
        return [*super().command(), "--uds", str(self.path)]

    def answers(self) -> bool:
        """Whether it has said that it serves."""
        return "Uvicorn running on" in self.log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the settings."""
    folder = tmp_path_factory.mktemp("proxies")
    (folder / "ratelimit.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    """Yield an exit stack that ends with the module."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module", params=["--no-proxy-headers", "--proxy-headers"])
def app(request: pytest.FixtureRequest, folder: Path, stack: ExitStack) -> AppServer:
    """The app, with a server that leaves the header alone and with one that reads it too."""
    return started(
        stack,
        AppServer("tests.support.attack_app:app", folder / "app", request.param, environment=at(folder)),
    )


def at(folder: Path, **more: str) -> dict[str, str]:
    """The environment that names the settings."""
    return {"RATELIMIT_SETTINGS": str(folder / "ratelimit.toml"), **more}


def started(stack: ExitStack, server: Server) -> Server:
    """A server that runs until the end of the module."""
    server.start()
    stack.callback(server.stop)
    return server


def nginx(stack: ExitStack, folder: Path, app: str, **replace: str) -> NginxServer:
    """The shipped configuration before an app, with some of its text replaced."""
    folder = folder / f"nginx-{free_port()}"
    texts = {**dict.fromkeys(UPSTREAMS, app), **replace}
    return started(stack, NginxServer(DEPLOY / "nginx.conf", folder, texts))


def left(port: int, client: str, headers: dict[str, str]) -> int:
    """Return the quota that is left for a client at an address of this machine."""
    connection = http.client.HTTPConnection(HOST, port, source_address=(client, 0), timeout=10)
    connection.request("GET", "/", headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.status == 200
    return int(response.headers["X-RateLimit-Remaining"])


def assert_one_caller(port: int) -> None:
    """Assert that a client is counted as itself, whatever it claims, and another client as another."""
    client, other = next(_clients), next(_clients)
    assert [left(port, client, headers) for headers in FORGED] == [999 - n for n in range(len(FORGED))]
    assert left(port, other, {}) == 999


@pytest.mark.parametrize("says", [OVERWRITES, APPENDS])
def test_forged_headers_choose_nothing_behind_nginx(
    app: AppServer, folder: Path, stack: ExitStack, says: str
) -> None:
    """With nginx overwriting or appending, and the server reading the header too or not: one count."""
    balancer = nginx(stack, folder, f"127.0.0.1:{app.port}", **{OVERWRITES: says})
    assert_one_caller(balancer.port)


def test_forged_headers_choose_nothing_without_a_proxy(app: AppServer) -> None:
    """A peer that is not a trusted proxy is itself."""
    assert_one_caller(app.port)


def test_forwarded_is_read_in_place_of_x_forwarded_for(folder: Path, stack: ExitStack) -> None:
    """The proxy's `Forwarded` header counts, and nothing else does, if the settings name it."""
    environment = at(folder, RATELIMIT_IDENTITY__FORWARDED_HEADER="Forwarded")
    app = AppServer("tests.support.attack_app:app", folder / "forwarded", environment=environment)
    for says in ("for=$remote_addr", '"$http_forwarded, for=$remote_addr;proto=http"'):
        replace = {'proxy_set_header Forwarded "";': f"proxy_set_header Forwarded {says};"}
        if not app.alive:
            started(stack, app)
        balancer = nginx(stack, folder, f"127.0.0.1:{app.port}", **replace)
        assert_one_caller(balancer.port)


def test_clients_behind_a_unix_socket_are_told_apart(folder: Path, stack: ExitStack) -> None:
    """A peer without an address is the proxy, where "unix" is trusted."""
    app = started(stack, SocketServer("tests.support.attack_app:app", folder / "uds", environment=at(folder)))
    balancer = nginx(stack, folder, f"unix:{app.path}")
    assert_one_caller(balancer.port)


def test_clients_behind_the_proxy_protocol_are_told_apart(
    app: AppServer, folder: Path, stack: ExitStack
) -> None:
    """A balancer of connections says who called before the request: nginx passes that on, not the header."""
    port = free_port()
    replace = {
        "client_max_body_size 10m;": f"client_max_body_size 10m; listen {HOST}:{port} proxy_protocol;",
        OVERWRITES: "proxy_set_header X-Forwarded-For $proxy_protocol_addr;",
    }
    nginx(stack, folder, f"127.0.0.1:{app.port}", **replace)
    seen = []
    for client, claim in (
        ("198.51.100.1", "203.0.113.1"),
        ("198.51.100.1", "203.0.113.2"),
        ("198.51.100.2", ""),
    ):
        with RawConnection(port) as connection:
            connection.send(f"PROXY TCP4 {client} 127.0.0.1 5000 80\r\n".encode())
            connection.send(head("/", f"X-Forwarded-For: {claim}".encode(), b"Connection: close"))
            answer = connection.answer()
            assert answer is not None
            seen.append(answer.remaining)
    assert seen == [999, 998, 999]


# HTTP/2 -----------------------------------------------------------------------------------------


class Http2Client:
    """A client that opens streams and resets them, without asking for TLS first."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=10)
        self._protocol = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._protocol.initiate_connection()
        self._send()
        self._socket.recv(65_536)

    def open(self, path: str) -> int:
        """Start a request; its stream."""
        stream = self._protocol.get_next_available_stream_id()
        pseudo = [(":method", "GET"), (":scheme", "http"), (":authority", "app"), (":path", path)]
        self._protocol.send_headers(stream, [*pseudo, ("x-api-key", "resetter")], end_stream=True)
        self._send()
        return stream

    def reset(self, stream: int) -> None:
        """Give a request up."""
        self._protocol.reset_stream(stream)
        self._send()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _send(self) -> None:
        self._socket.sendall(self._protocol.data_to_send())


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_http2_resets_never_run_more_than_the_slots(
    app: AppServer, folder: Path, stack: ExitStack, pause: float
) -> None:
    """Streams that are reset at once give no more work at once than slots, and their slots come back."""
    balancer = nginx(stack, folder, f"127.0.0.1:{app.port}", **{"server_tokens off;": "http2 on;"})

    def running() -> list[int]:
        with RawConnection(app.port) as connection:
            connection.send(head("/peak"))
            answer = connection.answer()
            assert answer is not None
            return [int(number) for number in answer.body.split()]

    client = Http2Client(balancer.port)
    for _ in range(60):
        stream = client.open("/v1/slow/0.5")
        time.sleep(pause)
        client.reset(stream)
    client.close()
    until(lambda: running()[1] == 0)
    assert running()[0] <= SLOTS
    assert pause == 0 or running()[0] > 0
