"""Attacks by framing, slowness and what is written: over real HTTP, as bytes."""

import time
from collections.abc import Iterator

import pytest

from tests.support.apps import AppServer
from tests.support.attacks import asked, assert_not_free, header, new_api_key, serve, used
from tests.support.raw import RawConnection, exchange, head
from tests.support.slots import until

pytestmark = pytest.mark.rerun


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """The app on each of uvicorn's parsers."""
    yield from serve(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def api_key() -> bytes:
    """A key that no other test has."""
    return new_api_key()


# bodies -----------------------------------------------------------------------------------------

CHUNKED = [
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;x=y\r\nhello\r\n0\r\n\r\n",
    b"0005\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nX-API-Key: trailer\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"-5\r\nhello\r\n0\r\n\r\n",
    b"zz\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: app\r\n\r\n",
    b"0\r\n\r\nGET /v1/predictions HTTP/1.1\r\nHost: app\r\n\r\n",
]
FRAMINGS = [
    (b"Transfer-Encoding: chunked",),
    (b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    (b"Transfer-Encoding: xchunked",),
    (b"Transfer-Encoding: chunked, identity",),
    (b"Transfer-Encoding : chunked",),
    (b"Content-Length: 5", b"Content-Length: 6"),
]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_odd_framing_makes_nothing_free(
    server: AppServer, api_key: bytes, framing: tuple[bytes, ...]
) -> None:
    """Anything that the server takes for a request is counted; a key in a trailer is none."""
    for body in (each.replace(b"trailer", api_key) for each in CHUNKED):
        key = new_api_key()
        with RawConnection(server.port) as connection:
            connection.send(head("/v1/upload", header(key), *framing, method="POST") + body)
            connection.send(head("/", header(key), b"Connection: close"))
            connection.socket.settimeout(0.5)  # what waits for more of a body is answered nothing
            try:
                while (answer := connection.answer()) is not None:
                    assert_not_free(answer)
            except TimeoutError:
                pass
    assert used(server, api_key) == 0


def test_slow_heads_hold_no_slot(server: AppServer) -> None:
    """A request that has not said all of its headers is none yet."""
    with RawConnection(server.port) as one, RawConnection(server.port) as two, RawConnection(server.port):
        for connection in (one, two):
            connection.send(b"GET /v1/slow/1 HTTP/1.1\r\nHost: app\r\nX-API-Key: beginner\r\n")
        assert asked(server, header(b"beginner")).status == 200


def test_slow_senders_hold_their_own_slots_only(server: AppServer) -> None:
    """A sender of a body byte by byte fills its own slots only; hanging up frees them."""
    line = header(b"uploader")
    data = head("/v1/upload", line, b"Content-Length: 1000", method="POST") + b"some of it"
    with RawConnection(server.port) as one, RawConnection(server.port) as two:
        one.send(data)
        two.send(data)
        until(lambda: asked(server, line).status == 429)
        refused = asked(server, line)
        assert b"CONCURRENT_LIMIT_EXCEEDED" in refused.body
        assert asked(server, header(b"somebody")).status == 200
    until(lambda: asked(server, line).status == 200)


def test_slow_readers_hold_their_own_slots_only(server: AppServer) -> None:
    """A client that doesn't read a long answer fills its own slots only, until it hangs up."""
    line = header(b"downloader")
    with (
        RawConnection(server.port, receive_buffer=4_096) as one,
        RawConnection(server.port, receive_buffer=4_096) as two,
    ):
        for connection in (one, two):
            connection.send(head("/v1/download", line))
            assert connection.socket.recv(100)
        time.sleep(0.2)
        assert asked(server, line).status == 429
        assert asked(server, header(b"somebody")).status == 200
    until(lambda: asked(server, line).status == 200)


# what is seen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [(), (b"Authorization: Bearer",), (b"Authorization: Bearer wrong",), (b"Cookie: token=open-sesame",)],
)
def test_dashboard_is_closed_without_its_token(server: AppServer, lines: tuple[bytes, ...]) -> None:
    """No spelling of its path, or of anything under it, answers without the right token."""
    for target in ["/ops", "/ops/", "//ops", "/OPS", "/%6fps", "/ops/%2e", "/ops/../ops", "/ops/api/callers"]:
        assert asked(server, *lines, target=target).status in {401, 404}, target


def test_no_key_injects_into_the_log(server: AppServer) -> None:
    """Keys, paths and forged addresses can't write lines or colours; no key is in the log at all."""
    evil = b"evil%0aWARNING forged\x85\xe2\x80\xa8line"
    lines = [header(evil), b"X-Forwarded-For: evil\x85forged", b"User-Agent: evil"]
    for target in ("/", "/evil%0Aforged", "/evil%1b[31m", "/v1/predictions%0Aevil"):
        exchange(server.port, head(target, *lines))
    assert "evil" not in server.log
    assert "\x1b[31m" not in server.log
