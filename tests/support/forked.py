"""A limiter that is used before its process forks, as by a health check at import under `gunicorn --preload`.

Each worker prints one line of JSON: what it sees of changes that the parent makes after the fork.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ratelimit_mw import Limiter
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from tests.support.live import replace_file

WORKERS = 2
HASH = f"sha256:{'0' * 64}"
"""The key that is set live once the workers run."""
QUOTA = 7
"""Requests an hour after the change of the file."""
LOCKS = (type(threading.Lock()), type(threading.RLock()))
PATIENCE = 20.0
"""Seconds that a worker waits for the changes."""


def main() -> None:
    """Use a limiter on the settings file of the first argument in the way of the second, and fork."""
    file, way = sys.argv[1:]
    limiter = Limiter.from_settings(file, resolve=lambda _: None)
    with WAYS[way](limiter):
        children = [_fork(limiter) for _ in range(WORKERS)]
    time.sleep(0.5)
    asyncio.run(_set_key(limiter))
    replace_file(Path(file), Path(file).read_text("utf-8").replace("5/hour", f"{QUOTA}/hour"))
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


async def _use(limiter: Limiter) -> None:
    await limiter.open()
    async with await limiter.acquire(api_key="a"):
        pass


@contextlib.contextmanager
def _ended(limiter: Limiter) -> Iterator[None]:
    """The event loop has ended, and the limiter was not closed."""
    asyncio.run(_use(limiter))
    yield


@contextlib.contextmanager
def _closed(limiter: Limiter) -> Iterator[None]:
    """The limiter was closed, too."""

    async def use() -> None:
        await _use(limiter)
        await limiter.close()

    asyncio.run(use())
    yield


@contextlib.contextmanager
def _running(limiter: Limiter) -> Iterator[None]:
    """The event loop goes on in another thread, and holds a slot."""
    used, over = threading.Event(), threading.Event()

    async def go_on() -> None:
        async with limiter, await limiter.acquire(api_key="a"):
            used.set()
            while not over.is_set():
                await asyncio.sleep(0.01)
            async with await limiter.acquire(api_key="a") as lease:
                assert lease.decision.policy == "shared", "the parent's connection is broken"

    thread = threading.Thread(target=asyncio.run, args=(go_on(),))
    thread.start()
    used.wait()
    yield
    over.set()
    thread.join()


@contextlib.contextmanager
def _locked(limiter: Limiter) -> Iterator[None]:
    """Another thread holds every lock while the process is forked."""
    asyncio.run(_use(limiter))
    locks = list(_locks_of(limiter))
    assert len(locks) >= 6, locks
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        over.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    yield
    over.set()
    thread.join()


WAYS: dict[str, Callable[[Limiter], contextlib.AbstractContextManager[None]]] = {
    "ended": _ended,
    "closed": _closed,
    "running": _running,
    "locked": _locked,
}


def _locks_of(limiter: Limiter) -> Iterator[Any]:
    """Find every lock of a limiter, whichever of its parts has it."""
    seen: set[int] = set()
    waiting: list[object] = [limiter]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, LOCKS):
            yield each
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple | set):
            waiting += each
        elif type(each).__module__.startswith("ratelimit_mw"):
            waiting += gc.get_referents(each)  # those of compiled objects, too, which have no names


def _fork(limiter: Limiter) -> int:
    child = os.fork()
    if child:
        return child
    taken = [lock for lock in _locks_of(limiter) if not lock.acquire(blocking=False)]
    if taken:
        sys.stderr.write(f"a thread of the parent holds {taken}\n")
        os._exit(1)
    for lock in _locks_of(limiter):
        lock.release()
    stats = limiter.stats()
    seen = {"leases": stats.leases, "decisions": len(stats.totals), "batches": stats.load.batches}
    seen |= asyncio.run(_see(limiter))
    sys.stdout.write(f"{json.dumps(seen)}\n")
    sys.stdout.flush()
    os._exit(0)


async def _see(limiter: Limiter) -> dict[str, Any]:
    ids: list[str] = []
    policy = ""
    deadline = time.monotonic() + PATIENCE
    async with limiter:
        while time.monotonic() < deadline:
            lease = await limiter.acquire(api_key="a", path=f"/{os.getpid()}")
            ids.append(lease.id)
            policy = lease.decision.policy
            await lease.release()
            if HASH in limiter.engine.live.rules.registered and _quota(limiter) == QUOTA:
                break
            await asyncio.sleep(0.02)
        stats = limiter.stats()
        return {
            "ids": ids,
            "key": HASH in limiter.engine.live.rules.registered,
            "quota": _quota(limiter),
            "policy": policy,
            "counted": sum(stats.totals.values()) == len(ids),
            "backend_up": stats.backend_up,
        }


def _quota(limiter: Limiter) -> int:
    return limiter.settings.plans["pro"].requests[0].quota


async def _set_key(limiter: Limiter) -> None:
    other = Limiter(limiter.settings.model_copy(update={"shadow": False}))
    async with other:
        await other.engine.live.set_keys({HASH: KeyEntry("pro")})


if __name__ == "__main__":
    main()
