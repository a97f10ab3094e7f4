"""Sender of an app's messages to the server, which adds our headers to the response."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.policy.rate_limited import RateLimited, refusal_being_handled
from ratelimit_mw._internal.responses.headers import HeaderWriter, add_headers

YIELD_EVERY = 16
"""Messages of a response after which others have a turn. To a client that is gone a server sends without
ever waiting: a stream that awaits nothing else would keep the whole worker for good, and its slot."""

ACCEPTED = 101
"""Status of a WebSocket that the app has accepted."""
SERVER_ERROR = 500
"""Status that frameworks answer an exception with for which an app has no handler."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class HeaderSender:
    """Adds headers when the response starts, remembers its status, and lets others have a turn."""

    __slots__ = ("_lease", "_left", "_send", "_writer", "has_started", "refused", "status")

    def __init__(self, send: Send, writer: HeaderWriter, lease: Lease) -> None:
        self._send = send
        self._writer = writer
        self._lease = lease
        self.has_started = False
        """Whether the response has started, and cannot become another one any more."""
        self.refused: RateLimited | None = None
        """Refusal that the app met with an error of its own, which is dropped: it has to be answered."""
        self._left = YIELD_EVERY
        """Messages until others have a turn."""
        self.status = SERVER_ERROR
        """Status of the response; what a server answers where the app says nothing."""

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message, as `send` does.

        Not a coroutine of its own: each response has two messages or more.
        """
        if not self.has_started:
            message = self._started(message)
            if self.refused is not None:
                return nothing()
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
            if self.status >= 400:
                handled = refusal_being_handled()
                if self.status == SERVER_ERROR:
                    # What sends it, such as Starlette's `ServerErrorMiddleware`, does so for any exception.
                    self.refused = self.refused or handled
                    if self.refused is not None:
                        return message
                elif handled is not None and not self._lease.is_ended:  # the app's own handler answers it
                    self._lease.give_back()
        elif kind == "websocket.accept":
            self.status = ACCEPTED
        else:
            return message  # another comes before it, such as early hints
        self.has_started = True
        ours = self._writer.of_admitted(self._lease)
        if not ours:
            return message
        changed = {**message}
        changed["headers"] = add_headers(changed.get("headers", ()), ours)
        return changed


async def nothing() -> None:
    """Send nothing."""


async def send_and_yield(send: Send, message: Message) -> None:
    """Send a message and let others have a turn."""
    await send(message)
    await asyncio.sleep(0)
