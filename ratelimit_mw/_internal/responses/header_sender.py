"""What an app sends, on its way to the server: the response gets our headers."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ratelimit_mw._internal.lease.lease_record import LeaseRecord
from ratelimit_mw._internal.responses.headers import HeaderWriter, add_headers

YIELD_EVERY = 16
"""Messages of a response after which others have a turn. To a client that is gone a server sends without
ever waiting: a stream that awaits nothing else would keep the whole worker for good, and its slot."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Sender:
    """Adds headers when the response starts, remembers its status, and lets others have a turn."""

    __slots__ = ("_lease", "_send", "_sent", "_writer", "status")

    def __init__(self, send: Send, writer: HeaderWriter, lease: LeaseRecord) -> None:
        self._send = send
        self._writer = writer
        self._lease = lease
        self._sent = 0
        self.status = 500
        """Status of the response; what a server answers where the app says nothing."""

    def __call__(self, message: Message) -> Awaitable[None]:
        """As `send`. Not a coroutine of its own: there are two messages or more to each response."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            message = self._with_headers(message)
        elif kind == "websocket.accept":
            self.status = 101
            message = self._with_headers(message)
        self._sent += 1
        return self._send(message) if self._sent % YIELD_EVERY else send_and_yield(self._send, message)

    def _with_headers(self, message: Message) -> Message:
        ours = self._writer.of_lease(self._lease)
        return {**message, "headers": add_headers(message.get("headers", ()), ours)} if ours else message


async def send_and_yield(send: Send, message: Message) -> None:
    """Send a message and let others have a turn."""
    await send(message)
    await asyncio.sleep(0)
