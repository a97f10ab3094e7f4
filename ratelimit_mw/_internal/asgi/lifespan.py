"""Starting and stopping with the server, where it speaks the lifespan protocol."""

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_mw._internal.limiter.limiter import Limiter

logger = logging.getLogger("ratelimit_mw")

LAST_REQUESTS_TIMEOUT = 2.0
"""Seconds that shutdown waits for requests that were just cancelled to give back what they hold."""


class Lifespan:
    """Opens the limiter before the app starts and closes it after the last request."""

    def __init__(self, limiter: Limiter, on_started: Callable[[], object]) -> None:
        """`on_started` is called when the app has started, before its first request."""
        self.active = 0
        """Number of requests inside the middleware and the app."""
        self._limiter = limiter
        self._on_started = on_started
        self._reported = False

    def report_once(self, error: Exception | None) -> None:
        """Log why nothing can be served, the first time that somebody asks."""
        if error is not None and not self._reported:
            self._reported = True
            logger.error("the settings can't be used, so every request is answered 503: %s", error)

    async def __call__(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, error: Exception | None
    ) -> None:
        """Serve the lifespan scope; `error` is why nothing can be served."""
        if error is not None:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await self._limiter.open()
        asked = False

        async def receive_and_close() -> Message:
            nonlocal asked
            asked = True
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._close()
            return message

        async def close_and_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._on_started()
            if message["type"].startswith("lifespan.shutdown."):
                # What the app itself ended in its shutdown, such as jobs, has slots to give back, too.
                await self._limiter.close()
            await send(message)

        try:
            await app(scope, receive_and_close, close_and_send)
        except Exception:
            if asked:
                raise
            # As servers do: an app without lifespan raises at once. The reason may be another one, though.
            logger.debug(
                "the app raised before it took the start-up event: "
                "it has no lifespan, or its start-up failed",
                exc_info=True,
            )
        if not asked:
            await self._serve_alone(receive, send)

    async def _serve_alone(self, receive: Receive, send: Send) -> None:
        """For an app that knows no lifespan. The server would leave it at that; we still have to close."""
        await receive()
        self._on_started()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _close(self) -> None:
        """Before the app closes what it needs itself: wait for the requests that end just now."""
        deadline = asyncio.get_running_loop().time() + LAST_REQUESTS_TIMEOUT
        while self.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await self._limiter.close()
