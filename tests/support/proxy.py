"""A TCP proxy between this process and a server, to lose, delay and cut what passes."""

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from tests.support.processes import HOST

if TYPE_CHECKING:
    from collections.abc import Callable

Fault = Literal["none", "drop_replies", "half", "blackhole", "refuse"]
"""Fate of traffic.

It passes (`none`); requests pass and replies are lost (`drop_replies`); only half of each reply passes
(`half`); nothing passes (`blackhole`); connections, old and new, are reset (`refuse`)."""


class Proxy:
    """Forwards connections to a port of this machine. Faults apply to connections old and new."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """With `tls` it is what clients meet; the server behind speaks plainly."""
        self.server_port = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.fault: Fault = "none"
        self.delay = 0.0
        """Seconds that every reply takes longer."""
        self.first_delay = 0.0
        """Seconds that the first reply on each connection takes longer still."""
        self.change: Callable[[bytes], bytes] | None = None
        """Makes other bytes of those that the server has sent."""
        self.lost = 0
        """Replies that were dropped."""
        self.accepted: list[float] = []
        """Times of connections, by `time.monotonic`; refused ones are included."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, ssl=self._tls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        while self._writers:
            await asyncio.sleep(0)

    @property
    def port(self) -> int:
        """Port at which it listens."""
        if self._server is None:
            raise RuntimeError("the proxy is not open")
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """URL at which it listens, as the settings write a server."""
        scheme = "redis" if self._tls is None else "rediss"
        return f"{scheme}://{HOST}:{self.port}/0"

    def reset(self) -> None:
        """Cut every connection with a TCP reset."""
        for writer in list(self._writers):
            # One that has just been closed has no socket, and over TLS nothing to be asked for it.
            with contextlib.suppress(OSError, AttributeError):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        """End every connection as one that was idle for too long."""
        for writer in list(self._writers):
            writer.close()

    def refuse(self) -> None:
        """Reset every connection there is and every one that comes."""
        self.fault = "refuse"
        self.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.accepted.append(time.monotonic())
        try:
            if self.fault == "refuse":
                self.reset()
                return
            server_reader, server_writer = await asyncio.open_connection(HOST, self.server_port)
            self._writers.add(server_writer)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._requests(reader, server_writer))
                    tasks.create_task(self._replies(server_reader, writer))
            finally:
                self._writers.discard(server_writer)
                server_writer.close()
        except* OSError:
            pass  # one side has cut it, which is what it is for
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if self.fault != "blackhole":
                writer.write(data)
        if self.fault != "blackhole":
            writer.close()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.first_delay)
        while data := await reader.read(65_536):
            await asyncio.sleep(self.delay)
            if self.fault == "none":
                writer.write(data if self.change is None else self.change(data))
            else:
                self.lost += 1
                if self.fault == "half":
                    writer.write(data[: len(data) // 2])
        writer.close()
