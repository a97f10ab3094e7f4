"""Helpers for tests of slots: a look at the slots in a server, a ledger, and clients that hang up."""

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from tests.support.processes import HOST
from tests.support.servers import StoreServer


def held(server: StoreServer) -> int:
    """Return the number of slots that are held right now, by that server's clock."""
    return sum(held_by_caller(server))


def held_by_caller(server: StoreServer) -> list[int]:
    """Return the number of slots that each caller, and the application, holds right now."""
    with server.client() as client:
        seconds, microseconds = client.time()
        now = seconds * 1_000_000 + microseconds
        return [client.zcount(key, f"({now}", "+inf") for key in client.scan_iter("ratelimit:*:s:*")]


def expiries(server: StoreServer) -> list[float]:
    """In how many seconds the slots held right now would end without another renewal, the next one first."""
    with server.client() as client:
        scores = [
            score
            for key in client.scan_iter("ratelimit:*:s:*")
            for _, score in client.zrange(key, 0, -1, withscores=True)
        ]
        seconds, microseconds = client.time()  # last, so that none seems to last longer than it does
        now = seconds * 1_000_000 + microseconds
    return sorted((score - now) / 1_000_000 for score in scores if score > now)


def slots_on_server(server: StoreServer) -> int:
    """Return the number of slots on the server: expired ones, too, but none that was released."""
    with server.client() as client:
        return sum([client.zcard(key) for key in client.scan_iter("ratelimit:*:s:*")])


def until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Wait until a condition holds; how many seconds that took. Fails where it never does."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so within {seconds:g} s"
        time.sleep(0.01)
    return time.monotonic() - start


async def until_async(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Like `until`, with the event loop running on."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so within {seconds:g} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


class Ledger:
    """Ledger of handlers: lines that they append to a file, in the order the kernel took them.

    It knows nothing of the limiter. A handler enters after its slot was taken and leaves before it is freed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def enter(self, name: str) -> None:
        """Note that a handler has begun."""
        self._append(f"+{name}")

    def leave(self, name: str) -> None:
        """Note that it has ended."""
        self._append(f"-{name}")

    def lines(self) -> list[str]:
        """Everything noted."""
        return self.path.read_text().split()

    def entered(self) -> int:
        """Return the number of handlers that have begun."""
        return sum(line.startswith("+") for line in self.lines())

    def inside(self) -> int:
        """Return the number of handlers that are inside."""
        return self.entered() - sum(line.startswith("-") for line in self.lines())

    def detach(self) -> None:
        """Note that a job was detached."""
        self._append("=job")

    def detached(self) -> int:
        """Return the number of jobs that were detached."""
        return self.lines().count("=job")

    def peak(self, dead: Iterable[str] = ()) -> int:
        """The most that were ever inside at the same time, those left out that died there."""
        gone = set(dead)
        inside = most = 0
        for line in self.lines():
            if line[0] != "=" and line[1:] not in gone:
                inside += 1 if line[0] == "+" else -1
                most = max(most, inside)
        return most

    def _append(self, line: str) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, f"{line}\n".encode())  # one write, so that lines of processes don't mix
        finally:
            os.close(file)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One kept-alive connection that can be cut at any moment."""

    _open: ClassVar[list["Client"]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._open.append(self)

    @classmethod
    async def connect(cls, port: int, *, buffer: int | None = None) -> Self:
        """Connect; `buffer` is how many bytes may wait to be read on this side."""
        sock = socket.socket()
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
        except BaseException:
            sock.close()
            raise
        return cls(*await asyncio.open_connection(sock=sock, limit=buffer or 65_536))

    def send(self, method: str, path: str, api_key: str = "a") -> None:
        """Send a request."""
        head = f"{method} {path} HTTP/1.1\r\nHost: app\r\nX-API-Key: {api_key}\r\nContent-Length: 0\r\n\r\n"
        self.writer.write(head.encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read status and headers."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:-2])
        return int(lines[0].split()[1]), headers

    async def answer(self) -> Answer:
        """Read an answer whose length is told."""
        status, headers = await self.head()
        body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(status, headers, body)

    async def ask(self, method: str, path: str, api_key: str = "a") -> Answer:
        """Send a request and read its answer."""
        self.send(method, path, api_key)
        return await self.answer()

    @classmethod
    def close_all(cls) -> None:
        """Cut every connection that was not closed, at the end of a test."""
        for client in cls._open:
            client.writer.transport.abort()
        cls._open.clear()

    def reset(self) -> None:
        """Cut the connection with a TCP reset."""
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the server may have been quicker
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        """End the connection in order."""
        self.writer.close()


async def ask(port: int, method: str, path: str, api_key: str = "a") -> Answer:
    """One request on a connection of its own."""
    client = await Client.connect(port)
    try:
        return await client.ask(method, path, api_key)
    finally:
        client.close()
