"""Sender of an app's messages to the server, which adds our headers to the response."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.responses.headers import HeaderWriter, add_headers

YIELD_EVERY = 16
"""Messages of a response after which others have a turn. To a client that is gone a server sends without
ever waiting: a stream that awaits nothing else would keep the whole worker for good, and its slot."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Sender:
    """Adds headers when the response starts, remembers its status, and lets others have a turn."""

    __slots__ = ("_has_started", "_lease", "_left", "_send", "_writer", "status")

    def __init__(self, send: Send, writer: HeaderWriter, lease: Lease) -> None:
        self._send = send
        self._writer = writer
        self._lease = lease
        self._has_started = False
        self._left = YIELD_EVERY
        """Messages until others have a turn."""
        self.status = 500
        """Status of the response; what a server answers where the app says nothing."""

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message, as `send` does.

        Not a coroutine of its own: each response has two messages or more.
        """
        if not self._has_started:
            message = self._started(message)
        self._left -= 1
        if self._left > 0:
            return self._send(message)
        self._left = YIELD_EVERY
        return send_and_yield(self._send, message)

    def _started(self, message: Message) -> Message:
        """Add our headers where the response starts with this message."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
        elif kind == "websocket.accept":
            self.status = 101
        else:
            return message  # another comes before it, such as early hints
        self._has_started = True
        ours = self._writer.of_lease(self._lease)
        if not ours:
            return message
        changed = {**message}
        changed["headers"] = add_headers(changed.get("headers", ()), ours)
        return changed


async def send_and_yield(send: Send, message: Message) -> None:
    """Send a message and let others have a turn."""
    await send(message)
    await asyncio.sleep(0)
