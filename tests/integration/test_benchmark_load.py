"""The built-in generator of load counts every request once, whatever a server does to its connections."""

import re
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import socket

import pytest

from benchmarks.load import Load, Sample, generate
from benchmarks.open_loop import Generator, Schedule
from tests.support.processes import HOST, free_port

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: text/plain\r\ncontent-length:3\r\n\r\nno!"
EMPTY = b"HTTP/1.1 204 No Content\r\nserver: test\r\n\r\n"
CONNECTIONS = 4
"""Requests that may be without an answer at the end of a load."""
Answer = Callable[[socket, int], None]
"""Answers a request of this number. It raises ConnectionError to close the connection."""


class Server(socketserver.ThreadingTCPServer):
    """Server that remembers the heads of its requests, and has a function answer them."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, answer: Answer) -> None:
        super().__init__((HOST, 0), Connection)
        self.answer = answer
        self.heads: list[bytes] = []
        self.lock = threading.Lock()
        self.port: int = self.server_address[1]

    def number(self, head: bytes) -> int:
        """Remember a request, and return its number, from 1 on."""
        with self.lock:
            self.heads.append(head)
            return len(self.heads)


class Connection(socketserver.BaseRequestHandler):
    """Connection to the server, with one request after the other."""

    request: socket
    server: Server

    def handle(self) -> None:
        """Answer until either side closes the connection."""
        with suppress(ConnectionError):
            while head := self.request.recv(1000):
                self.server.answer(self.request, self.server.number(head))


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """Server that answers so; all of its connections are closed at the end."""
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def load(server: Server, callers: int = 1, seconds: float = 0.3) -> Sample:
    """Put a short load on the server."""
    return generate(server.port, Load(CONNECTIONS, callers, seconds))


@pytest.mark.parametrize("size", [1, 9, 17, 38, 40, len(GOOD)])
def test_an_answer_in_pieces_is_one_answer(size: int) -> None:
    """An answer counts when all of it is there, wherever it is cut."""

    def answer(connection: socket, _: int) -> None:
        for place in range(0, len(GOOD), size):
            connection.send(GOOD[place : place + size])
            time.sleep(0.0005)

    with serving(answer) as server:
        sample = load(server)
    assert (sample.failed, sample.refused) == (0, 0)
    assert sample.requests > CONNECTIONS
    assert 0 <= len(server.heads) - sample.requests <= CONNECTIONS
    assert 0 < sample.p50 <= sample.p99


def test_an_answer_larger_than_a_read_is_one_answer() -> None:
    """A body of many kilobytes counts once, even if it looks like heads, and the connection serves on."""
    body = b"\r\ncontent-length: 1\r\n\r\n" * 1000
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    with serving(lambda connection, _: connection.sendall(whole)) as server:
        sample = load(server)
    assert sample.requests > CONNECTIONS
    assert 0 <= len(server.heads) - sample.requests <= CONNECTIONS


def test_refusals_are_counted_among_the_requests() -> None:
    """Answers of status 400 and above are requests, and are told apart as refused."""
    answers = (GOOD, REFUSED, EMPTY)
    with serving(lambda connection, number: connection.sendall(answers[number % 3])) as server:
        sample = load(server)
    assert 0 <= len(server.heads) - sample.requests <= CONNECTIONS
    assert abs(sample.requests / 3 - sample.refused) <= CONNECTIONS
    assert sample.refused > 0


def test_callers_come_in_turn() -> None:
    """Every caller sends as many requests as any other, over whatever connection is free."""
    with serving(lambda connection, _: connection.sendall(GOOD)) as server:
        load(server, callers=7)
    callers = Counter(re.findall(r"X-API-Key: (key-\d+)\r\n", b"".join(server.heads).decode()))
    assert set(callers) == {f"key-{number}" for number in range(7)}
    assert max(callers.values()) - min(callers.values()) <= 1


@pytest.mark.parametrize("last", [GOOD, GOOD[:-1], b""], ids=["answered", "in part", "unanswered"])
def test_a_closed_connection_is_replaced(last: bytes) -> None:
    """A server that closes its connections loses the requests that it leaves without a whole answer."""

    def answer(connection: socket, number: int) -> None:
        connection.sendall(GOOD if number % 5 else last)
        if number % 5 == 0:
            raise ConnectionError

    with serving(answer) as server:
        sample = load(server)
    closed = len(server.heads) // 5
    whole = len(server.heads) - (0 if last == GOOD else closed)
    assert closed > CONNECTIONS
    assert 0 <= whole - sample.requests <= CONNECTIONS
    if last == GOOD:  # at most the next request is lost, sent before the end of the connection came
        assert sample.failed <= closed
    else:
        assert 0 <= closed - sample.failed <= CONNECTIONS


def test_latencies_are_those_of_the_server() -> None:
    """The latency of a request is the time until its answer."""

    def answer(connection: socket, _: int) -> None:
        time.sleep(0.05)
        connection.sendall(GOOD)

    with serving(answer) as server:
        sample = load(server, seconds=0.5)
    assert sample.p50 >= 50_000
    assert 0 < sample.requests <= CONNECTIONS * sample.seconds / 0.05


@pytest.mark.parametrize("connections", [1, 32])
def test_a_load_without_answers_sleeps(connections: int) -> None:
    """A load that waits for its server takes no CPU, and ends in time."""
    with serving(lambda *_: None) as server:
        begin = time.thread_time()
        sample = generate(server.port, Load(connections, seconds=1.0))
        used = time.thread_time() - begin
    assert (sample.requests, sample.p50, sample.failed) == (0, 0.0, 0)
    assert used < 0.2


def test_a_server_that_is_gone_is_an_error() -> None:
    """A load on no server fails; it is not a result of no requests."""
    with pytest.raises(ConnectionRefusedError):
        generate(free_port(), Load(connections=1, seconds=0.1))


def test_a_server_that_goes_away_is_an_error() -> None:
    """A load fails if nobody listens any more while it runs."""

    def answer(connection: socket, number: int) -> None:
        connection.sendall(GOOD)
        if number > 10:
            server.socket.close()
            raise ConnectionError

    with serving(answer) as server, pytest.raises(ConnectionError):
        load(server, seconds=30)
    assert len(server.heads) > 10


def test_requests_at_a_constant_rate_are_all_sent() -> None:
    """All requests that are due are sent, and each is answered, refused or lost once."""

    def answer(connection: socket, number: int) -> None:
        if number % 4 == 0:
            raise ConnectionError
        connection.sendall(REFUSED if number % 4 == 1 else GOOD)

    with serving(answer) as server:
        generator = Generator(server.port, callers=3, connections=8)
        begin = time.perf_counter()
        generator.run(Schedule(rate=400, seconds=0.5))
        took = time.perf_counter() - begin
    found = generator.connections
    assert generator.asked == len(server.heads) == 200
    assert (len(found.latencies), len(found.refused), found.failed) == (100, 50, 50)
    assert took >= 0.499


def test_connections_that_close_while_they_are_free_lose_nothing() -> None:
    """A server may close connections that nobody uses: the next requests come over new ones."""

    def answer(connection: socket, _: int) -> None:
        connection.sendall(GOOD)
        time.sleep(0.005)
        raise ConnectionError

    with serving(answer) as server:
        generator = Generator(server.port, callers=1, connections=1)
        generator.run(Schedule(rate=10, seconds=0.5))
    assert (len(generator.connections.latencies), generator.connections.failed) == (5, 0)
