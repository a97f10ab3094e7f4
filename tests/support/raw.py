"""Requests as bytes on a socket, for what no HTTP client would send."""

import itertools
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.support.processes import HOST

PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One response, its header names in lower case."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    raw_head: bytes = b""

    @property
    def limit(self) -> int | None:
        """Value of `X-RateLimit-Limit`; None if the request wasn't counted."""
        value = self.headers.get("x-ratelimit-limit")
        return None if value is None else int(value)

    @property
    def remaining(self) -> int:
        """Value of `X-RateLimit-Remaining`."""
        return int(self.headers["x-ratelimit-remaining"])


class RawConnection:
    """A connection to a port of this machine that sends what it is told and reads answers in order."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect((HOST, port))
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Write bytes as they are; a server that has hung up by then is not an error."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def answer(self, *, method: str = "GET") -> Answer | None:
        """The next response, read to its end; None where the server hangs up instead."""
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split(" ")[1])
        if method == "HEAD" or status in (204, 304) or 100 <= status < 200:
            return Answer(status, headers, b"", head)
        if "content-length" in headers:
            return Answer(status, headers, self._exactly(int(headers["content-length"])), head)
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self._chunks(), head)
        return Answer(status, headers, self._rest(), head)

    def _until(self, end: bytes) -> bytes | None:
        while end not in self._read:
            if not self._more():
                return None
        found, _, self._read = self._read.partition(end)
        return found + end

    def _exactly(self, size: int) -> bytes:
        while len(self._read) < size and self._more():
            pass
        found, self._read = self._read[:size], self._read[size:]
        return found

    def _chunks(self) -> bytes:
        body = b""
        while line := self._until(b"\r\n"):
            size = int(line, 16)
            body += self._exactly(size)
            self._until(b"\r\n")
            if not size:
                break
        return body

    def _rest(self) -> bytes:
        while self._more():
            pass
        found, self._read = self._read, b""
        return found

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65_536)
        except ConnectionResetError:
            return False
        self._read += data
        return bool(data)


def head(target: str = "/", *lines: bytes, method: str = "GET", version: str = "1.1") -> bytes:
    """A request's head; a Host unless the version is 1.0, and header lines as they are."""
    host = [] if version == "1.0" else [b"Host: app"]
    first = f"{method} {target} HTTP/{version}".encode("latin-1")
    return b"\r\n".join([first, *host, *lines, b"", b""])


def exchange(port: int, data: bytes, *, method: str = "GET") -> Answer | None:
    """The first answer to these bytes, on a connection of their own."""
    with RawConnection(port) as connection:
        connection.send(data)
        return connection.answer(method=method)


def pipelined(port: int, requests: Iterable[bytes], *, at_once: int = 100) -> list[Answer]:
    """The answers to requests on one connection, so many written without waiting; as far as they come."""
    answers: list[Answer] = []
    waiting = iter(requests)
    with RawConnection(port) as connection:
        while batch := list(itertools.islice(waiting, at_once)):
            connection.send(b"".join(batch))
            for _ in batch:
                answer = connection.answer()
                if answer is None:
                    return answers
                answers.append(answer)
    return answers
