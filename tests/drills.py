"""Drills: a fault of the backend while two workers are under load, and what their callers saw of it."""

import asyncio
import contextlib
import math
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import redis

from tests.apps import AppServer
from tests.load import Caller, Entry, load, over_limit
from tests.proxy import Fault, Proxy
from tests.servers import StoreServer

TIMEOUT = 0.1
LIMIT, SECONDS = 20, 1
CENT = 10_000
WORKERS = 2
BEFORE, DURING, AFTER = 1.2, 1.5, 3.0
"""Seconds of load before, while and after something is wrong."""

SETTINGS = f"""
routes = [{{path = "/paid", price = "0.02"}}]
[backend]
url = "URL"
timeout = {TIMEOUT}
local_share = 0.5
[plans.default]
requests = ["{LIMIT}/{SECONDS} second"]
concurrent = 5
[plans.allow]
requests = ["{LIMIT}/{SECONDS} second"]
on_failure = "allow"
[plans.deny]
requests = ["{LIMIT}/{SECONDS} second"]
on_failure = "deny"
[plans.paid]
requests = ["9999/second"]
concurrent = 5
on_failure = "deny"
[plans.paid.spending]
daily = "9999.00"
on_failure = "local"
[[keys]]
key = "allow"
plan = "allow"
[[keys]]
key = "deny"
plan = "deny"
[[keys]]
key = "paid"
plan = "paid"
"""
CALLERS = (Caller("local"), Caller("allow"), Caller("deny"), Caller("paid", "/paid"))


class Stage(NamedTuple):
    """What a fault can be done to."""

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
    """Whether the shared books can't be used meanwhile."""


@dataclass
class Report:
    """What callers saw, and what is in the books afterwards."""

    drill: Drill
    entries: list[Entry]
    began: float
    ended: float
    """When the fault was over, by `time.monotonic`."""
    log: str
    spent: int
    held: int
    slots: int
    """What the books say in the end, when nobody asks any more."""
    policies: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.policies = {e.decided_by for e in self._between(self.began, self.ended) if e.decided_by}

    def _between(self, start: float, end: float) -> list[Entry]:
        return [entry for entry in self.entries if start <= entry.sent < end]

    @property
    def added(self) -> float:
        """The longest wait while something was wrong, in seconds, less a usual one."""
        usual = sorted(e.seconds for e in self._between(0, self.began))
        meanwhile = self._between(self.began, self.ended + SECONDS)
        return max(e.seconds for e in meanwhile) - usual[len(usual) // 2]

    @property
    def lost(self) -> int:
        """Requests without an answer, or with one that no policy gives."""
        fine = {200, 429}
        return sum(e.status not in (fine | {503} if e.caller == "deny" else fine) for e in self.entries)

    @property
    def recovered(self) -> float:
        """Seconds from the end of the fault to the first shared decision after the last other one."""
        last = max((e.sent for e in self.entries if e.decided_by not in {"", "shared"}), default=0.0)
        refused = max((e.sent for e in self.entries if e.status == 503), default=0.0)
        first = min(
            (e.sent for e in self.entries if e.sent > last and e.decided_by == "shared"), default=math.inf
        )
        return max(first, refused, self.ended) - self.ended

    @property
    def over(self) -> int:
        """Units over the limit in any interval, the outage and its edges included, but under `allow`."""
        return self._over([entry for entry in self.entries if entry.caller != "allow"])

    @property
    def over_when_healthy(self) -> int:
        """Units over the limit in intervals in and before which the shared books decided everything."""
        entries = self.entries
        if not self.drill.keeps_data:
            entries = [e for e in entries if e.answered < self.began or e.sent > self.ended + self.recovered]
        others = sorted(e.sent for e in self.entries if e.decided_by not in {"", "shared"} or e.status == 503)
        return self._over(entries, others)

    def _over(self, entries: Sequence[Entry], others: Sequence[float] = ()) -> int:
        names = [caller.name for caller in CALLERS if caller.path == "/"]
        return max(
            over_limit([e for e in entries if e.caller == name], LIMIT, SECONDS, others) for name in names
        )

    @property
    def sold(self) -> int:
        """What the callers were sold, in micro-units."""
        return CENT * sum(e.status == 200 and e.caller == "paid" for e in self.entries)


async def run(drill: Drill, server: StoreServer, folder: Path) -> Report:
    """Run a drill on a server of its own. It leaves the server running and the app stopped."""
    async with Proxy(server.port) as proxy:
        path = folder / "ratelimit.toml"
        path.write_text(SETTINGS.replace("URL", proxy.url))
        app = AppServer(
            "tests.drill_app:app",
            folder / "app",
            workers=WORKERS,
            environment={"RATELIMIT_SETTINGS": str(path)},
        )
        await asyncio.to_thread(app.start)
        try:
            with server.client() as client:
                stage = Stage(server, proxy, client)
                async with load(app.port, CALLERS, pause=0.02) as ledger:
                    await asyncio.sleep(BEFORE)
                    began = time.monotonic()
                    await drill.begin(stage)
                    await asyncio.sleep(DURING)
                    await drill.end(stage)
                    ended = time.monotonic()
                    await asyncio.sleep(AFTER)
                slots, spent, held = await asyncio.to_thread(_books_at_rest, server)
        finally:
            await asyncio.to_thread(app.stop)
        return Report(drill, ledger, began, ended, app.log, spent, held, slots)


def _books_at_rest(server: StoreServer) -> tuple[int, int, int]:
    """The books once all is given back, or after two seconds: far less than a slot that leaked is kept."""
    give_up = time.monotonic() + 2
    while True:
        time.sleep(0.3)
        books = _books(server)
        if (books[0], books[2]) == (0, 0) or time.monotonic() > give_up:
            return books


def _books(server: StoreServer) -> tuple[int, int, int]:
    """Slots taken, money spent and money held, of all callers together."""
    with server.client() as client:
        now = time.time() * 1e6
        slots = sum(client.zcount(key, now, "+inf") for key in client.scan_iter("*:s:*"))
        books = [struct.unpack("<dd", client.get(key)) for key in client.scan_iter("*:b:*")]
        return slots, int(sum(spent for spent, _ in books)), int(sum(held for _, held in books))


# what can go wrong -----------------------------------------------------------------------------------


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
        stage.client.save()
        stage.server.kill()
        threading.Thread(target=stage.server.restart).start()

    await asyncio.to_thread(crash)


async def _loaded(stage: Stage) -> None:
    while True:
        with contextlib.suppress(redis.RedisError), stage.server.client() as client:
            if not client.info("persistence")["loading"]:
                return
        await asyncio.sleep(0.02)


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
