"""Properties of the servers that the other tests rely on."""

import os
import signal

import httpx
import pytest
import redis
import redis.asyncio
from starlette.types import Receive, Scope, Send

from tests.conftest import StartApp, StartServer
from tests.support.processes import ServerError
from tests.support.servers import NEVER, StoreServer

pytestmark = pytest.mark.rerun


async def test_every_kind_of_server_answers(server_url: str) -> None:
    """Tests on `server_url` talk to a real server, of each kind."""
    async with redis.asyncio.Redis.from_url(server_url) as client:
        assert await client.ping()


@pytest.mark.parametrize("run", [1, 2])
def test_a_shared_server_is_handed_out_empty(server: StoreServer, run: int) -> None:
    """No test sees what another one wrote."""
    with server.client() as client:
        assert client.dbsize() == 0
        client.set("left by", run)


def test_a_restarted_server_has_lost_its_data(kind: str, start_server: StartServer) -> None:
    """A restart keeps the address and loses the data, as a server without persistence does."""
    server = start_server(kind)
    url = server.url
    with server.client() as client:
        client.set("key", "value")
    server.restart()
    assert server.url == url
    with server.client() as client:
        assert client.get("key") is None


def test_a_killed_server_refuses_connections(kind: str, start_server: StartServer) -> None:
    """After `kill` the port is closed."""
    server = start_server(kind)
    server.kill()
    assert not server.alive
    with server.client() as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_a_paused_server_answers_once_it_goes_on(kind: str, start_server: StartServer) -> None:
    """`stop_signal` keeps connections waiting until `continue_signal`."""
    server = start_server(kind)
    with redis.Redis.from_url(server.url, socket_timeout=0.1, retry=NEVER) as client:
        client.ping()
        server.stop_signal()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.continue_signal()
        assert client.ping()


def test_a_server_takes_arguments_and_a_password(kind: str, start_server: StartServer) -> None:
    """A test configures its own server, which the others never see."""
    server = start_server(kind, "--maxmemory", "2mb", password="secret")
    with server.client() as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(2 * 1024 * 1024)}
    with redis.Redis(port=server.port, retry=NEVER) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_a_server_whose_port_is_taken_moves_to_another(
    redis_server: StoreServer, kind: str, start_server: StartServer
) -> None:
    """Losing the race for a port costs another attempt, and is never mistaken for a start."""
    server = start_server(kind)
    server.stop()
    server.port = redis_server.port
    server.start()
    assert server.port != redis_server.port
    assert server.answers()


def test_a_server_that_cannot_start_says_why(start_server: StartServer) -> None:
    """A server that cannot start raises an error with its own output."""
    with pytest.raises(ServerError, match="no-such-setting"):
        start_server("redis", "--no-such-setting", "1")


def test_an_app_is_served_by_its_workers(start_app: StartApp) -> None:
    """Workers share the port, get the environment, and end with their parent."""
    served = start_app(
        "tests.integration.test_servers:environment_app", workers=2, environment={"GREETING": "hello"}
    )
    workers = served.worker_pids()
    assert len(workers) == 2
    greeting, pid = httpx.get(served.url).text.split()
    assert greeting == "hello"
    assert int(pid) in workers
    served.stop(signal.SIGTERM)
    assert served.worker_pids() == []


async def environment_app(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer with a variable of the environment and the id of the process."""
    if scope["type"] != "http":
        raise NotImplementedError
    body = f"{os.environ.get('GREETING')} {os.getpid()}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
