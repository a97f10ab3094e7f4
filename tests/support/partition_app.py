"""A worker under load that is cut off from its server meanwhile. Prints what it admitted, and what is left.

It runs on the worker's side of `tests.support.namespaces`. Lines on its input say when to go on.
"""

import asyncio
import json
import random
import sys
import time
from typing import Any

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.model.limits import DEFAULT_LEASE
from ratelimit_mw._internal.settings import Settings
from tests.support.asgi import scope_of, settings_of
from tests.support.slots import until_async
from tests.support.statuses import budget_status, counted

CENT = 10_000
CALLERS = 25
TEXT = """
[backend]
url = "{url}"
timeout = 0.1
local_share = 1.0
[plans.default]
requests = ["1000000/hour"]
{slots}
spending = {{ daily = "10000.00" }}
[[routes]]
path = "/{{rest:path}}"
price = "0.10"
"""
SLOTS = "concurrent = { limit = 1000, lease = 2 }"


class Ledger:
    """Money that the app has spent by its own account, and who decided about its requests."""

    def __init__(self) -> None:
        self.spent = 0
        self.by: dict[str, int] = {}


def _app(ledger: Ledger) -> Any:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        lease = scope["state"]["ratelimit"]
        policy = lease.decision.policy
        ledger.by[policy] = ledger.by.get(policy, 0) + 1
        await asyncio.sleep(random.random() * 0.05)
        kind = random.randrange(4)
        if kind == 0:
            await lease.settle("0.03")
            ledger.spent += 3 * CENT
        elif kind == 1:
            await lease.settle("0.17")
            ledger.spent += 17 * CENT
        elif kind == 2:
            ledger.spent += 10 * CENT
        status = 500 if kind in (1, 3) else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


async def _ask(app: Any, over: asyncio.Event) -> None:
    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(_message: Any) -> None:
        pass

    while not over.is_set():
        task = asyncio.ensure_future(app(scope_of(b"a"), receive, send))
        if random.randrange(20) == 0:
            await asyncio.sleep(0)
            task.cancel()  # before anything was decided
        await asyncio.wait([task])
        await asyncio.sleep(random.random() * 0.02)


def _settings() -> Settings:
    url, slots = sys.argv[1:]
    return settings_of(TEXT.format(url=url, slots=SLOTS if slots == "slots" else ""))


async def main() -> None:
    """Serve until the input says that the network is whole again, then settle all and tell."""
    ledger, over = Ledger(), asyncio.Event()
    limiter = Limiter(_settings())
    app = RateLimitMiddleware(_app(ledger), limiter=limiter)
    async with limiter:
        callers = [asyncio.create_task(_ask(app, over)) for _ in range(CALLERS)]
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        over.set()
        await asyncio.gather(*callers)

        def is_told() -> bool:
            stats = limiter.stats()
            return stats.backend_up and not stats.unsynced and not stats.load.owed

        await until_async(is_told)
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")

        async def counts() -> tuple[int, int, int]:
            """Spent, held, and slots in use."""
            statuses = [each.status for each in (await limiter.engine.peek(policy)).limits]
            budget = budget_status(statuses[-1])
            return budget.spent, budget.held, counted(statuses[1]) if len(statuses) > 2 else 0

        give_up = time.monotonic() + 2 * DEFAULT_LEASE
        while (await counts())[1:] != (0, 0) and time.monotonic() < give_up:
            await asyncio.sleep(0.05)
        spent, held, slots = await counts()
        told = {
            "ledger": ledger.spent,
            "spent": spent,
            "held": held,
            "slots": slots,
            "by": ledger.by,
            "leases": limiter.engine.leases.number,
            "lost": [
                limiter.stats().slots_lost,
                limiter.stats().unsynced_lost,
                limiter.stats().settles_ignored,
            ],
        }
        sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
