"""Faults of the drills: how each is brought about and how it ends."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import redis

from tests.support.proxy import Fault, Proxy
from tests.support.servers import StoreServer

DURING = 1.5
"""Seconds that something is wrong."""


class Stage(NamedTuple):
    """Server, proxy and client that a fault is done to."""

    server: StoreServer
    proxy: Proxy
    client: redis.Redis


Act = Callable[[Stage], Awaitable[object]]


@dataclass(frozen=True)
class Drill:
    """A fault: how it is brought about, how it ends, and what it may cost."""

    name: str
    begin: Act
    end: Act
    arguments: tuple[str, ...] = ()
    keeps_data: bool = True
    is_outage: bool = True
    """Whether the shared backend can't be used meanwhile."""


def _command(*words: str | int) -> Act:
    async def act(stage: Stage) -> None:
        await asyncio.to_thread(stage.client.execute_command, *words)

    return act


def _commands(*lines: str) -> Act:
    async def act(stage: Stage) -> None:
        for line in lines:
            await asyncio.to_thread(stage.client.execute_command, *line.split())

    return act


async def _nothing(stage: Stage) -> None:
    """It ends on its own."""


async def _kill(stage: Stage) -> None:
    await asyncio.to_thread(stage.server.kill)


async def _restart(stage: Stage) -> None:
    await asyncio.to_thread(stage.server.restart)


async def _stop(stage: Stage) -> None:
    await asyncio.to_thread(stage.server.stop_signal)


async def _continue(stage: Stage) -> None:
    stage.server.continue_signal()


async def _sleep(stage: Stage) -> None:
    def sleep() -> None:
        with stage.server.client() as client, contextlib.suppress(redis.RedisError):
            client.execute_command("DEBUG", "SLEEP", DURING)

    threading.Thread(target=sleep).start()


async def _endless_script(stage: Stage) -> None:
    def run_script() -> None:
        with stage.server.client() as client, contextlib.suppress(redis.RedisError):
            client.eval("while true do end", 0)

    threading.Thread(target=run_script).start()


async def _kill_script(stage: Stage) -> None:
    with stage.server.client() as client:
        await asyncio.to_thread(client.script_kill)


async def _flush_scripts(stage: Stage) -> None:
    for _ in range(10):
        await asyncio.to_thread(stage.client.script_flush)
        await asyncio.sleep(0.1)


async def _evict(stage: Stage) -> None:
    def fill() -> None:
        stage.client.config_set("maxmemory-policy", "allkeys-lru")
        stage.client.config_set("maxmemory", stage.client.info("memory")["used_memory"] + 200_000)
        for number in range(300):
            stage.client.set(f"filler:{number}", b"x" * 10_000)

    await asyncio.to_thread(fill)


async def _load_slowly(stage: Stage) -> None:
    """Die with data on disk of which every key takes a millisecond to load."""

    def crash() -> None:
        with stage.client.pipeline() as pipeline:
            for number in range(1500):
                pipeline.set(f"filler:{number}", b"x" * 16_000)
            pipeline.execute()
        # In one go: what others free in between would be lost, and held until its lease ends.
        with contextlib.suppress(redis.ConnectionError), stage.client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("SAVE")  # type: ignore[no-untyped-call]
            pipeline.execute_command("SHUTDOWN", "NOSAVE")  # type: ignore[no-untyped-call]
            pipeline.execute()
        stage.server.kill()
        threading.Thread(target=stage.server.restart).start()

    await asyncio.to_thread(crash)


async def _loaded(stage: Stage) -> None:
    while True:
        with contextlib.suppress(redis.RedisError), stage.server.client() as client:
            if not client.info("persistence")["loading"]:
                return
        await asyncio.sleep(0.02)


async def _fill_disk(stage: Stage) -> None:
    """Let a snapshot fail: a folder lies where the server wants to put it."""

    def fail() -> None:
        (stage.server.folder / "dump.rdb").mkdir()
        stage.client.config_set("save", "3600 1")
        stage.client.bgsave()
        while stage.client.info("persistence")["rdb_last_bgsave_status"] != "err":
            time.sleep(0.01)

    await asyncio.to_thread(fail)


async def _free_disk(stage: Stage) -> None:
    (stage.server.folder / "dump.rdb").rmdir()
    await asyncio.to_thread(stage.client.config_set, "stop-writes-on-bgsave-error", "no")


def _proxy(fault: Fault, *, reset: bool = False) -> Act:
    async def act(stage: Stage) -> None:
        stage.proxy.fault = fault
        if reset:
            stage.proxy.reset()

    return act


def _delay(seconds: float) -> Act:
    async def act(stage: Stage) -> None:
        stage.proxy.delay = seconds

    return act


async def _reset_often(stage: Stage) -> None:
    for _ in range(10):
        stage.proxy.reset()
        await asyncio.sleep(0.1)


DRILLS = {
    drill.name: drill
    for drill in (
        Drill("killed, restarted empty (kill -9)", _kill, _restart, keeps_data=False),
        Drill("hangs (SIGSTOP)", _stop, _continue),
        Drill("CLIENT PAUSE", _command("CLIENT", "PAUSE", int(DURING * 1000), "ALL"), _nothing),
        Drill("DEBUG SLEEP", _sleep, _nothing),
        Drill("busy script", _endless_script, _kill_script, ("--lua-time-limit", "20")),
        Drill(
            "loading its data",
            _load_slowly,
            _loaded,
            ("--key-load-delay", "1000", "--rdbcompression", "no"),
            keeps_data=False,
        ),
        Drill("FLUSHALL", _command("FLUSHALL"), _nothing, keeps_data=False, is_outage=False),
        Drill("SCRIPT FLUSH, ten times a second", _flush_scripts, _nothing, is_outage=False),
        Drill(
            "memory full (noeviction)",
            _commands("CONFIG SET maxmemory 1"),
            _commands("CONFIG SET maxmemory 0"),
        ),
        Drill("disk full (MISCONF)", _fill_disk, _free_disk),
        Drill("memory full (allkeys-lru)", _evict, _nothing, keeps_data=False, is_outage=False),
        Drill(
            "password changed",
            _commands("CONFIG SET requirepass other", "CLIENT KILL TYPE normal"),
            _command("CONFIG", "SET", "requirepass", ""),
        ),
        Drill(
            "too many clients (maxclients)",
            _commands("CONFIG SET maxclients 1", "CLIENT KILL TYPE normal"),
            _commands("CONFIG SET maxclients 1000"),
        ),
        Drill("read-only replica", _commands("REPLICAOF 127.0.0.1 1"), _commands("REPLICAOF NO ONE")),
        Drill("answers 30 ms late", _delay(0.03), _delay(0), is_outage=False),
        Drill("answers 500 ms late", _delay(0.5), _delay(0)),
        Drill("answers lost", _proxy("drop_replies"), _proxy("none", reset=True)),
        Drill("half an answer", _proxy("half"), _proxy("none", reset=True)),
        Drill("nothing passes", _proxy("blackhole"), _proxy("none", reset=True)),
        Drill("connections refused", _proxy("refuse", reset=True), _proxy("none")),
        Drill("connections reset, ten times a second", _reset_often, _nothing),
    )
}
