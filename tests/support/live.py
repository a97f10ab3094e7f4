"""Helpers for tests of live changes: steady traffic to several workers, its answers, and the stored keys."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from ratelimit_mw import KeyEntry
from ratelimit_mw._internal.live.key_entries import read_entry
from tests.support.servers import StoreServer

SEEN_WITHIN = 2.0
"""Seconds in which every worker goes by a change."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    at: float
    status: int
    worker: int
    version: str
    limit: str | None
    seconds: float
    """Seconds that the answer took."""


def client_of_all_workers(url: str, key: str) -> httpx.AsyncClient:
    """A client with a key that opens a connection for each request, so that all workers get some."""
    each_its_own = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=30, limits=each_its_own)


@dataclass(slots=True)
class Traffic:
    """Requests one after the other, each on a connection of its own, so that all workers get some."""

    url: str
    key: str
    answers: list[Answer] = field(default_factory=list)

    async def run(self) -> None:
        """Go on until cancelled."""
        async with client_of_all_workers(self.url, self.key) as client:
            while True:
                sent = time.monotonic()
                response = await client.get("/")
                seconds = time.monotonic() - sent
                said = response.json()
                limit = response.headers.get("x-ratelimit-limit")
                worker, version = said.get("worker", 0), said.get("version", "")
                answer = Answer(time.monotonic(), response.status_code, worker, version, limit, seconds)
                self.answers.append(answer)
                await asyncio.sleep(0.02)

    async def until_limit(self, limit: str | None, workers: int) -> float:
        """Wait until so many workers answer with this limit and none with another; seconds it took.

        Less the longest that an answer took meanwhile: so long a worker of a busy machine did not run at all.
        """
        start = time.monotonic()
        while True:
            latest = {answer.worker: answer for answer in self.answers}
            if len(latest) == workers and all(
                answer.limit == limit and answer.at > start for answer in latest.values()
            ):
                break
            assert time.monotonic() - start < 60, f"not so within a minute: {latest}"
            await asyncio.sleep(0.01)
        since = [answer for answer in self.answers if answer.at > start]
        wrong = max([answer.at for answer in since if answer.limit != limit], default=start)
        return wrong - start - max(answer.seconds for answer in since)


@contextlib.asynccontextmanager
async def traffic(url: str, key: str) -> AsyncIterator[Traffic]:
    """Traffic with one key, for as long as the block lasts. Every request has to be answered 200."""
    flow = Traffic(url, key)
    task = asyncio.create_task(flow.run())
    try:
        yield flow
        assert not task.done() or task.exception() is None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert {answer.status for answer in flow.answers} == {200}


def replace_file(file: Path, text: str) -> None:
    """Put another file in place of this one, in one step."""
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def swap_link(link: Path, target: Path) -> None:
    """Point a symlink elsewhere, in one step."""
    new = link.with_name(f"{link.name}.new")
    new.symlink_to(target)
    new.replace(link)


def stored_keys(server: StoreServer) -> dict[str, KeyEntry]:
    """Return the live keys in a server."""
    with server.client() as client:
        entries = client.hgetall("ratelimit:{keys}")
    return {each.decode(): read_entry(entry) for each, entry in entries.items()}
