"""Under a real server: stock clients recover by themselves, and a refusal breaks no connection."""

import re
import socket
import time
from pathlib import Path

import httpx
import pytest
import urllib3
from urllib3.util import Retry

from tests.conftest import StartApp
from tests.support.apps import ROOT, AppServer
from tests.support.pages import modules_of
from tests.support.processes import HOST

pytestmark = [pytest.mark.rerun, pytest.mark.once]

PAGE = (ROOT / "docs" / "wire-format.md").read_text("utf-8")
TWO_A_SECOND = 'plans.anonymous.requests = ["2/second"]'


@pytest.fixture
def server(start_app: StartApp, tmp_path: Path) -> AppServer:
    """An app that admits two requests a second for each address."""
    file = tmp_path / "ratelimit.toml"
    file.write_text(TWO_A_SECOND)
    return start_app("tests.support.served:app", environment={"RATELIMIT_SETTINGS": str(file)})


def test_urllib3_waits_as_told(server: AppServer) -> None:
    """`Retry`, which requests uses too, reads the wait and succeeds at the first repetition."""
    retry = Retry(total=None, status=1, status_forcelist=[429], respect_retry_after_header=True)
    with urllib3.PoolManager(retries=retry) as pool:
        assert [pool.request("GET", server.url).status for _ in range(5)] == [200] * 5


def test_loop_over_httpx_waits_as_told(server: AppServer) -> None:
    """A loop that sleeps as long as `retry-after-ms` says never needs a second repetition."""
    repeated = 0
    with httpx.Client(base_url=server.url) as client:
        for _ in range(5):
            response = client.get("/")
            if response.status_code == 429:
                repeated += 1
                time.sleep(int(response.headers["retry-after-ms"]) / 1_000)
                response = client.get("/")
            assert response.status_code == 200
    assert repeated >= 2


def test_urllib3_as_the_page_says(server: AppServer) -> None:
    """The options of docs/wire-format.md wait for a POST too, and for no more than a minute."""
    (text,) = re.findall(r"`Retry\((total=.*?)\)`", PAGE)
    options = dict(re.findall(r"(\w+)=(\w+)", text))
    assert options == {"total": "3", "allowed_methods": "None", "retry_after_max": "60"}
    retry = Retry(total=3, allowed_methods=None, retry_after_max=60)
    with urllib3.PoolManager(retries=retry) as pool:
        assert [pool.request("POST", server.url).status for _ in range(5)] == [200] * 5


def test_the_loop_of_the_page(start_app: StartApp, tmp_path: Path) -> None:
    """The loop of docs/wire-format.md waits where that helps, and asks once where it doesn't."""
    file = tmp_path / "ratelimit.toml"
    file.write_text(
        'plans.anonymous.requests = ["2/second"]\nplans.default.requests = ["1/hour"]\n'
        '[[routes]]\npath = "/never"\ncost = 5'
    )
    server = start_app("tests.support.served:app", environment={"RATELIMIT_SETTINGS": str(file)})
    asked: list[int] = []
    count = {"response": [lambda response: asked.append(response.status_code)]}
    with modules_of(PAGE) as module, httpx.Client(base_url=server.url, event_hooks=count) as client:
        send = module("waiting").send
        assert [send(client, "POST", "/").status_code for _ in range(5)] == [200] * 5
        assert 1 <= asked.count(429) <= 2
        asked.clear()
        assert send(client, "GET", "/never").json()["error"]["code"] == "COST_EXCEEDS_LIMIT"
        assert asked == [429]
        asked.clear()
        client.headers["x-api-key"] = "hourly"
        assert [send(client, "GET", "/").status_code for _ in range(2)] == [200, 429]
        assert asked == [200, 429]


@pytest.mark.parametrize("implementation", ["h11", "httptools"])
def test_refused_upload_is_answered(start_app: StartApp, tmp_path: Path, implementation: str) -> None:
    """A large upload that is refused gets its 429, not a broken connection, and the next request works."""
    file = tmp_path / "ratelimit.toml"
    file.write_text('plans.anonymous.requests = ["1/2 seconds"]')
    environment = {"RATELIMIT_SETTINGS": str(file)}
    server = start_app("tests.support.served:app", "--http", implementation, environment=environment)
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/", content=b"x" * 1_000_000).status_code == 200
        refused = client.post("/", content=b"x" * 1_000_000)
        assert refused.status_code == 429
        time.sleep(int(refused.headers["retry-after-ms"]) / 1_000)
        assert client.get("/").status_code == 200
    assert "Traceback" not in server.log


def test_refused_head_has_no_body(server: AppServer) -> None:
    """A refused HEAD tells the body's length and sends none, so that the connection goes on."""
    with httpx.Client(base_url=server.url) as client:
        assert [client.head("/").status_code for _ in range(2)] == [200, 200]
        refused = client.head("/")
        assert (refused.status_code, refused.content) == (429, b"")
        assert int(refused.headers["content-length"]) > 0
        assert client.get("/").status_code == 429


def test_strange_headers_over_a_socket(server: AppServer) -> None:
    """Bytes that no client library would send are answered as what they are, never with a 500."""
    for line in (b"x-api-key: \xff\xfe{}*:", b"x-api-key: ", b"authorization: Basic \xff"):
        request = b"GET / HTTP/1.1\r\nhost: app\r\nconnection: close\r\n" + line + b"\r\n\r\n"
        with socket.create_connection((HOST, server.port), timeout=5) as connection:
            connection.sendall(request)
            answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200 ") or b"\r\nretry-after: 1\r\n" in answer
        assert b"\r\nx-ratelimit-remaining: " in answer
