"""Drills: a fault of the backend while two workers are under load, and what their callers saw of it."""

import asyncio
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.apps import AppServer
from tests.support.conformance import Waits
from tests.support.drill_faults import DURING, Drill, Stage
from tests.support.load import Caller, Entry, load, over_limit
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer

TIMEOUT = 0.1
LIMIT, SECONDS = 20, 1
CENT = 10_000
WORKERS = 2
BEFORE, AFTER = 1.2, 3.0
"""Seconds of load before and after something is wrong."""
AT_REST = 15.0
"""Seconds for the last releases and settles to be written, by workers that may be starved: half a lease."""

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


@dataclass
class Report:
    """Results of a drill: answers to the callers, and the books afterwards."""

    drill: Drill
    entries: list[Entry]
    began: float
    ended: float
    """Time when the fault was over, by `time.monotonic`."""
    log: str
    spent: int
    held: int
    slots: int
    """Slots in the books at the end, when nobody asks any more; `spent` and `held` are from then, too."""
    late: float
    """Seconds in all that the process of the callers, and so others too, waited for their turn on the CPU."""
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
    def is_starved(self) -> bool:
        """Whether the machine was so busy that a worker may have taken its own pauses for outages."""
        return self.late > TIMEOUT

    @property
    def returned(self) -> float:
        """Seconds from the end of the fault to the first shared decision that was asked for after it."""
        after = [e.sent for e in self.entries if e.sent >= self.ended and e.decided_by == "shared"]
        return min(after, default=math.inf) - self.ended

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
        """Units over the limit in intervals in and before which the shared backend decided everything."""
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
        """Amount that the callers were sold, in micro-units."""
        return CENT * sum(e.status == 200 and e.caller == "paid" for e in self.entries)


async def run(drill: Drill, server: StoreServer, folder: Path) -> Report:
    """Run a drill on a server of its own. It leaves the server running and the app stopped."""
    async with Proxy(server.port) as proxy:
        path = folder / "ratelimit.toml"
        path.write_text(SETTINGS.replace("URL", proxy.url))
        app = AppServer(
            "tests.support.drill_app:app",
            folder / "app",
            workers=WORKERS,
            environment={"RATELIMIT_SETTINGS": str(path)},
        )
        await asyncio.to_thread(app.start)
        try:
            with server.client() as client:
                stage = Stage(server, proxy, client)
                waits = Waits()
                async with load(app.port, CALLERS, pause=0.02) as ledger, waits.measured():
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
        return Report(drill, ledger, began, ended, app.log, spent, held, slots, waits.late)


def _books_at_rest(server: StoreServer) -> tuple[int, int, int]:
    """The books once all is given back, or after so long: less than a slot that leaked is kept."""
    give_up = time.monotonic() + AT_REST
    while True:
        time.sleep(0.3)
        books = _books(server)
        if not (books[0] or books[2]) or time.monotonic() > give_up:
            return books


def _books(server: StoreServer) -> tuple[int, int, int]:
    """Slots taken, money spent and money held, of all callers together."""
    with server.client() as client:
        now = time.time() * 1e6
        slots = sum(client.zcount(key, now, "+inf") for key in client.scan_iter("*:s:*"))
        books = [struct.unpack("<dd", client.get(key)) for key in client.scan_iter("*:b:*")]
        return slots, int(sum(spent for spent, _ in books)), int(sum(held for _, held in books))
