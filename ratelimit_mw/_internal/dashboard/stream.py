"""The figures as server-sent events: each snapshot is read and written once, however many pages are open."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ratelimit_mw._internal.fleet import FleetView, Snapshot
from ratelimit_mw._internal.runtime import threads

SECONDS = 1.0
"""Between two events."""
LOOK_SECONDS = 0.2
"""Between two looks at whether the server is stopping."""
STREAM_SECONDS = 60.0
"""After which a stream ends and the page opens another, so that no server waits for one for ever."""
NEWS = 4
"""Points of the charts in an event after the first, which has all of them. The last one is still growing."""

_RETRY = b"retry: 1000\n\n"
_HEARTBEAT = b": no news\n\n"


class Stream:
    """Server-sent events for open pages."""

    def __init__(self, view: FleetView) -> None:
        self._view = view
        self._last: tuple[Snapshot | None, dict[str, Any]] = (None, {})
        self._written: dict[str, bytes] = {}

    async def events(self, facts: Callable[[], dict[str, Any] | None]) -> AsyncIterator[bytes]:
        """An event a second, until the server stops or `facts`, which are added to each event, are None.

        The first event, `full`, has the whole history; each `news` has its end.
        """
        give_up = time.monotonic() + STREAM_SECONDS
        seen: Snapshot | None = None
        yield _RETRY
        while time.monotonic() < give_up and not server_is_stopping():
            snapshot = await self._view.read()
            extra = facts()
            if extra is None:
                return
            if snapshot is seen:
                yield _HEARTBEAT
            else:
                yield await self._event("full" if seen is None else "news", snapshot, extra)
            seen = snapshot
            await _pause()

    async def _event(self, name: str, snapshot: Snapshot, facts: dict[str, Any]) -> bytes:
        if self._last[0] is not snapshot or self._last[1] != facts:
            self._last, self._written = (snapshot, facts), {}
        known = self._written
        if name not in known:
            known[name] = await threads.call(partial(_written, name, snapshot, facts))
        return known[name]


def _written(name: str, snapshot: Snapshot, facts: dict[str, Any]) -> bytes:
    """Write an event, which takes a while with all its points and callers."""
    told = snapshot if name == "full" else replace(snapshot, series=snapshot.series[-NEWS:])
    # Names come from outside; JSON escapes their line breaks, which would end the event.
    values = json.dumps({**told.as_dict(), **facts}, separators=(",", ":"))
    return f"event: {name}\ndata: {values}\n\n".encode()


def server_is_stopping() -> bool:
    """Whether uvicorn was told to stop. It tells the app of it only after every response has ended.

    The signal's handler is a method of its server, in each worker; with other servers streams end in time.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return bool(getattr(server, "should_exit", False))


async def _pause() -> None:
    deadline = time.monotonic() + SECONDS
    while (left := deadline - time.monotonic()) > 0 and not server_is_stopping():
        await asyncio.sleep(min(left, LOOK_SECONDS))
