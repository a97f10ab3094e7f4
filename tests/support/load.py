"""Load on an app over plain connections, with a ledger of its own of what came back."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from tests.support.processes import HOST

REQUESTS_PER_CONNECTION = 25
"""So that each worker gets its part, whichever of them accepted first."""


class Entry(NamedTuple):
    """One request as its client saw it; times are by `time.monotonic`."""

    caller: str
    sent: float
    answered: float
    status: int
    """0 where no answer came."""
    decided_by: str

    @property
    def seconds(self) -> float:
        """Seconds that its client waited."""
        return self.answered - self.sent


class Caller(NamedTuple):
    """An API key, the path it asks for, and over how many connections."""

    name: str
    path: str = "/"
    connections: int = 2


@asynccontextmanager
async def load(port: int, callers: Sequence[Caller], *, pause: float) -> AsyncIterator[list[Entry]]:
    """Callers that ask again and again, `pause` seconds after each answer; yields the growing ledger."""
    ledger: list[Entry] = []
    over = asyncio.Event()
    tasks = [
        asyncio.create_task(_ask(port, caller, pause, ledger, over))
        for caller in callers
        for _ in range(caller.connections)
    ]
    try:
        yield ledger
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def _ask(port: int, caller: Caller, pause: float, ledger: list[Entry], over: asyncio.Event) -> None:
    request = f"GET {caller.path} HTTP/1.1\r\nHost: app\r\nX-API-Key: {caller.name}\r\n\r\n".encode()
    while not over.is_set():
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            for _ in range(REQUESTS_PER_CONNECTION):
                if over.is_set():
                    break
                sent = time.monotonic()
                writer.write(request)
                try:
                    async with asyncio.timeout(10):
                        status, decided_by = await _answer(reader)
                except (OSError, EOFError, TimeoutError):
                    ledger.append(Entry(caller.name, sent, time.monotonic(), 0, ""))
                    break
                ledger.append(Entry(caller.name, sent, time.monotonic(), status, decided_by))
                await asyncio.sleep(pause)
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    """The status of one answer, and who decided it as the app says."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[9:12]), headers.get("x-decided-by", "")


def over_limit(entries: Sequence[Entry], limit: int, seconds: float, others: Sequence[float] = ()) -> int:
    """By how many units the fullest interval of this length is over; 0 where none is.

    Only requests that were sent and answered within the interval count: they were decided in it for sure.
    Intervals are left out in which, or in the length of one before which, a time of `others` lies.
    """
    admitted = sorted(entry for entry in entries if entry.status == 200)
    worst = 0
    for first in sorted({entry.sent for entry in admitted}):
        if any(first - seconds <= time <= first + seconds for time in others):
            continue
        inside = [e for e in admitted if e.sent >= first and e.answered <= first + seconds]
        worst = max(worst, len(inside) - limit)
    return worst
