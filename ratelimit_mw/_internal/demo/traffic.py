"""The simulated callers of `ratelimit-mw demo`, so that its dashboard has something to show."""

import asyncio
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message


class SimulatedCaller(NamedTuple):
    """Somebody who asks for the same thing again and again."""

    name: str
    """Its API key; none where it is empty."""
    address: str
    method: str
    path: str
    seconds: float
    """From one time to the next, on average."""
    at_once: int = 1
    """Requests each time."""


CALLERS = (
    SimulatedCaller("scraper", "203.0.113.66", "GET", "/v1/models", 0.1),  # the abusive one
    SimulatedCaller("acme", "198.51.100.10", "POST", "/v1/predictions", 0.7),
    SimulatedCaller("globex", "198.51.100.20", "GET", "/v1/models", 0.25),
    SimulatedCaller("nightly-batch", "198.51.100.30", "POST", "/v1/predictions", 15.0, at_once=3),
    SimulatedCaller("", "203.0.113.7", "GET", "/v1/models", 14.0),
)
"""None of them has a key or an address that the printed hints use."""

SWING_SECONDS = 20.0
"""Seconds in which traffic grows and shrinks once."""


async def simulate(app: ASGIApp, is_over: Callable[[], bool]) -> None:
    """Send the requests of all callers to an app of this process, until told that it is over."""
    async with asyncio.TaskGroup() as group:
        for caller in CALLERS:
            group.create_task(_go_on(app, caller, is_over))


async def _go_on(app: ASGIApp, caller: SimulatedCaller, is_over: Callable[[], bool]) -> None:
    now = asyncio.get_running_loop().time
    async with asyncio.TaskGroup() as requests:
        while not is_over():
            for _ in range(caller.at_once):
                requests.create_task(_ask(app, caller))
            await asyncio.sleep(caller.seconds * (1 + 0.5 * math.sin(2 * math.pi * now() / SWING_SECONDS)))


async def _ask(app: ASGIApp, caller: SimulatedCaller) -> None:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": caller.method,
        "scheme": "http",
        "path": caller.path,
        "raw_path": caller.path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"x-api-key", caller.name.encode())] if caller.name else [],
        "client": (caller.address, 0),
        "server": ("127.0.0.1", 0),
    }
    await app(scope, _no_body, _ignore)


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(_message: Message) -> None:
    pass
