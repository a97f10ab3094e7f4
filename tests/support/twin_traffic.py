"""Run in a process of its own: made-up traffic on a clock of its own, and every answer to it, printed.

What it prints must not depend on whether the package's compiled module is used.
"""

import asyncio
import json
import random
import sys
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from tests.support.asgi import FakeClock, limited

SETTINGS = """
identity.hash_secret = "of the traffic"
identity.trusted_proxies = ["10.0.0.0/8"]
[application]
concurrent = 5
[plans.default]
requests = ["7/second", "40/minute"]
concurrent = 3
[plans.anonymous]
requests = ["5/second"]
[plans.pro]
requests = ["1200/second"]
concurrent = 2
[plans.budget]
requests = ["50/minute"]
spending = { daily = "1.00", warn_at = 0.5 }
[plans.team]
requests = ["30/minute"]
share = "account"
[[keys]]
hash = "TWO"
plan = "pro"
[[keys]]
hash = "THREE"
plan = "budget"
[[keys]]
hash = "FIVE"
plan = "team"
account = "acme"
[[keys]]
hash = "SIX"
plan = "team"
account = "acme"
[[routes]]
path = "/free"
exempt = true
[[routes]]
path = "/dear"
methods = ["POST"]
cost = 3
requests = ["4/second"]
[[routes]]
path = "/priced"
price = "0.04"
[[routes]]
path = "/huge"
cost = 1000
[[routes]]
path = "/things/{id}"
total = ["9/second"]
slot = false
"""
KEYS = (b"one", b"two", b"three", b" two", b"four\t", b"five", b"six", b"")
NAMES = (b"x-api-key", b"X-Api-Key", b"authorization", b"x-other")
PATHS = ("/", "/", "/free", "/priced", "/dear", "/huge", "/things/1", "/things/1\n", "/elsewhere")
APP_HEADERS: tuple[list[tuple[bytes, bytes]], ...] = (
    [(b"content-type", b"text/plain")],
    [(b"X-RateLimit-Limit", b"3"), (b"content-length", b"0")],
    [(b"x-request-id", b"1"), (b"ratelimitless", b"1")],
    [],
)


class Traffic:
    """An app behind the middleware, and who asks it what."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = FakeClock()
        self.settings = SETTINGS
        for key in ("two", "three", "five", "six"):
            hashed = hash_api_key(key.encode(), "of the traffic")
            self.settings = self.settings.replace(f'"{key.upper()}"', f'"{hashed}"')
        if seed > 1:
            self.settings = f'identity.per_address = ["60/minute"]\n{self.settings}'
        if seed % 2:
            self.settings += '[response]\nheaders = ["x-ratelimit", "ietf"]\nreset = "seconds"\n'
        self.app = limited(self.settings, self.clock, self.answer)
        self.doors = [asyncio.Event() for _ in range(4)]
        self.said: list[Any] = []

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, some of it late, some of it with an error."""
        lease = scope["state"]["ratelimit"]
        if not isinstance(lease, Lease):
            raise TypeError("the request has no lease")
        how = scope["how"]
        if how["door"] is not None:
            await self.doors[how["door"]].wait()
        if how["fails"]:
            raise RuntimeError("the app failed")
        await send({"type": "http.response.start", "status": how["status"], "headers": iter(how["headers"])})
        for _ in range(how["parts"]):
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def request(self) -> dict[str, Any]:
        """The scope of some request."""
        pick = self.random.choice
        headers = [
            (pick(NAMES), pick((b"", b"Bearer ", b"bearer  ")) + pick(KEYS))
            for _ in range(pick((0, 1, 1, 1, 2)))
        ]
        if pick((False, False, True)):
            headers.append((b"x-forwarded-for", pick((b"198.51.100.7", b"nonsense", b"1.2.3.4, 10.0.0.9"))))
        how = {
            "door": pick((None, None, 0, 1, 2, 3)),
            "fails": pick((False,) * 9 + (True,)),
            "status": pick((200, 200, 404, 500)),
            "headers": pick(APP_HEADERS),
            "parts": pick((0, 1, 40)),
        }
        return {
            "type": "http",
            "method": pick(("GET", "POST", "HEAD")),
            "path": pick(PATHS),
            "root_path": pick(("", "", "/things")),
            "headers": headers,
            "client": pick((("192.0.2.1", 1), ("192.0.2.2", 1), ("10.0.0.1", 1), None)),
            "state": {},
            "how": how,
        }

    async def ask(self, number: int) -> None:
        """Send a request and note what it met."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append({**message, "headers": list(message.get("headers", ()))})

        async def receive() -> Message:
            return {"type": "http.request"}

        try:
            await self.app(self.request(), receive, send)
        except RuntimeError as error:
            sent.append({"type": str(error)})
        self.said.append((number, [sorted(message.items()) for message in sent]))

    async def run(self, steps: int) -> None:
        """Ask, move the clock, open doors."""
        asked: list[asyncio.Task[None]] = []
        for step in range(steps):
            asked.append(asyncio.create_task(self.ask(step)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            chance = self.random.random()
            if chance < 0.3:
                door = self.random.randrange(4)
                self.doors[door].set()
                self.doors[door] = asyncio.Event()
            elif chance < 0.7:
                self.clock.now += self.random.choice((1, 1000, 140_000, 500_000, 1_000_000))
            elif chance < 0.72:
                self.clock.now -= 300_000
        while not all(task.done() for task in asked):
            for event in self.doors:
                event.set()
            await asyncio.sleep(0)


async def main(seed: int, steps: int) -> None:
    """Print the answers of one run."""
    traffic = Traffic(seed)
    random.seed(seed)  # hints for slots are spread at random
    await traffic.run(steps)
    for said in traffic.said:
        sys.stdout.write(json.dumps(said, default=repr) + "\n")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
