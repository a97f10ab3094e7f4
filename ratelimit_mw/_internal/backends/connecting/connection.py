"""Connections to a Redis or Valkey server. The only module that imports `redis`.

redis-py makes the one that requests wait for: address, TLS, authentication, database. Then this module
takes over its transport, since redis-py's path for a single command costs ten times what the server needs
to answer. Commands are written as they come, replies are handed back in their order; a connection on which
anything went wrong is closed, so that no caller ever gets another's answer. What no request waits for goes
through redis-py's own client.
"""

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Self

import hiredis
from redis.asyncio.connection import AbstractConnection

from ratelimit_mw._internal.backends.connecting.errors import ConnectionEndedError
from ratelimit_mw._internal.model.backend import BackendError

Reply = bytes | int | None | list[Any] | Exception
OnReply = Callable[[Reply], None]


def stay_cancelled() -> None:
    """Redis-py loses a cancellation that meets it at the wrong moment, so that it is asked for here."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Connection(asyncio.Protocol):
    """Commands out, replies back in the same order."""

    def __init__(self, connection: AbstractConnection, on_lost: Callable[[BackendError], None]) -> None:
        self._connection = connection  # keeps its stream writer, and so the transport, from being collected
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=BackendError, protocolError=BackendError)
        self._waiting: deque[OnReply] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self._watch: asyncio.Task[BackendError] | None = None
        self._asked: set[asyncio.Future[list[Reply]]] = set()
        self._unsent: list[tuple[bytes, list[OnReply]]] = []
        """Commands beside those of requests, of this turn of the event loop, and who takes the answers."""
        self.is_stuck = False
        """Whether answers to what was asked beside the requests are overdue."""

    @classmethod
    def take_over(cls, connection: AbstractConnection, on_lost: Callable[[BackendError], None]) -> Self:
        """Put this protocol in place of redis-py's streams."""
        writer = connection._writer
        if writer is None:
            raise BackendError("the connection was closed as soon as it was opened")
        protocol = cls(connection, on_lost)
        protocol._transport = writer.transport
        writer.transport.set_protocol(protocol)
        return protocol

    def send(self, commands: bytes, *on_replies: OnReply) -> None:
        """Write commands; each of `on_replies` is called with one answer, an exception if it is an error."""
        if self._transport is None:
            raise BackendError("the connection is closed")
        self._waiting.extend(on_replies)
        try:
            self._transport.write(commands)
        except RuntimeError as error:  # uvloop's, between the end of a connection and the news of it
            lost = BackendError(f"connection lost: {error}")
            asyncio.get_running_loop().call_soon(self.connection_lost, lost)

    def ask(self, commands: bytes, number: int) -> "asyncio.Future[list[Reply]]":
        """Send commands beside those of requests, with others of this turn of the event loop in one write.

        The answers to them, so many, or `BackendError`.
        """
        if self._transport is None:
            raise BackendError("the connection is closed")
        answered: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        answers: list[Reply] = []

        def take(reply: Reply) -> None:
            answers.append(reply)
            if len(answers) == number:
                self.is_stuck = False
                self._asked.discard(answered)
                if not answered.done():
                    answered.set_result(answers)

        if not self._unsent:
            answered.get_loop().call_soon(self._send_asked)
        self._unsent.append((commands, [take] * number))
        self._asked.add(answered)
        return answered

    def _send_asked(self) -> None:
        unsent, self._unsent = self._unsent, []
        if self._transport is not None:  # or whoever asked was told of the end
            self.send(
                b"".join([commands for commands, _ in unsent]), *[take for _, each in unsent for take in each]
            )

    def watch(self, reason: Coroutine[Any, Any, BackendError]) -> None:
        """End the connection for the reason that a coroutine returns, which runs no longer than it."""
        self._watch = asyncio.create_task(reason, name="ratelimit_mw watch")
        self._watch.add_done_callback(self._end)
        _watches.add(self._watch)

    def close(self, *, discard: bool = False) -> None:
        """Close at once; answers still to come are never read, and `on_lost` is not called.

        To `discard` is to have the kernel not send what it was given, and has not sent yet.
        """
        if self._watch is not None:
            self._watch.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            if discard:
                _forget_unsent(transport)
            transport.abort()
            self._connection._reader = self._connection._writer = None
        while self._asked:
            answered = self._asked.pop()
            if not answered.done():
                answered.set_exception(BackendError("the connection was closed"))

    def leave_to_parent(self) -> None:
        """Give up the connection in a process that was forked off; the parent goes on with it."""
        if self._transport is not None:
            silence(self._transport)

    def data_received(self, data: bytes) -> None:
        """Hand every complete reply to the command that it answers."""
        try:
            self._reader.feed(data)
            # Whoever gets a reply may close the connection over it: then the others are nobody's.
            while self._transport is not None:
                reply = self._reader.gets()
                if reply is False:
                    break
                if not self._waiting:
                    raise BackendError("the server sent an answer that belongs to no command")
                self._waiting.popleft()(reply)
        except BackendError as error:
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits for an answer has to be told
            self._lose(BackendError(f"an answer could not be read: {error!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        """The server or the network ended it."""
        if self._transport is not None:
            self._lose(ConnectionEndedError(f"connection lost: {error or 'closed by the server'}"))

    def _end(self, watch: "asyncio.Task[BackendError]") -> None:
        _watches.discard(watch)
        if not watch.cancelled() and self._transport is not None:
            self._lose(watch.result())

    def _lose(self, error: BackendError) -> None:
        self.close(discard=True)
        self._on_lost(error)


def silence(transport: asyncio.BaseTransport) -> None:
    """Put an empty file in the place of a socket that the parent process has, too.

    To close the transport would tell the event loop, whose part in the system is the parent's as well.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, sock.fileno(), inheritable=False)
        os.close(nothing)


def _forget_unsent(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or sock.family == socket.AF_UNIX:
        return
    # By the descriptor, since the socket that uvloop shows takes no options.
    real = socket.socket(fileno=sock.fileno())
    try:
        real.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it has just been closed
    finally:
        real.detach()


async def end_of_watches() -> None:
    """Wait until the watches of connections that were closed have closed what they opened themselves."""
    loop = asyncio.get_running_loop()
    ending = [watch for watch in list(_watches) if watch.get_loop() is loop and watch.cancelling()]
    if ending:
        await asyncio.wait(ending, timeout=1.0)


_watches: "set[asyncio.Task[BackendError]]" = set()
"""Running watch tasks. They are referenced here, since an event loop alone does not keep a task."""
