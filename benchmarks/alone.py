"""Instructions of Redis for operations alone in a call, or among few: `python -m benchmarks.alone`.

Counted by callgrind, which has to be installed (valgrind), for so many callers in turn, each with a charge or
a release in a call of its own. `redis` is Redis 6.2, and `valkey` Valkey 9.1. With `--one-caller` it is the
same caller's, who asks so many times at once.
"""

import argparse
import asyncio
import re
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.instructions import CALLGRIND
from benchmarks.stored import PATIENCE
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome
from tests.support.conformance import new_id
from tests.support.servers import StoreServer, server_binaries

LARGE = 1_000_000
ESTIMATE = 100
USED = (100, 60, 130)
"""Tokens that are settled of it: as many, fewer, more."""
ROUNDS = 20
"""Times that one caller asks."""
Ask = Callable[[], Awaitable[object]]


class CountedStore(StoreServer):
    """A server under callgrind that does nothing by itself meanwhile."""

    def command(self) -> list[str]:
        """Return the server's command, under the tool that counts its instructions."""
        out = f"--callgrind-out-file={self.folder}/out"
        return [*CALLGRIND, out, *super().command(), "--hz", "1", "--activerehashing", "no"]

    async def count(self, asked: Sequence[Ask], together: int = 1) -> float:
        """Instructions for each of so many questions, one after the other, or so many at once."""
        self.begin()
        for place in range(0, len(asked), together):
            await asyncio.gather(*[ask() for ask in asked[place : place + together]])
        return self.end() / len(asked)

    def begin(self) -> None:
        """Count from now on."""
        self._control("-i", "on")
        self._control("-z")

    def end(self) -> int:
        """Count no more; the instructions since the beginning."""
        self._control("-d")
        self._control("-i", "off")
        newest = max(self.folder.glob("out.*"), key=lambda path: int(path.suffix[1:]))
        return int(re.findall(r"^(?:totals|summary): (\d+)", newest.read_text(), re.MULTILINE)[-1])

    def _control(self, *setting: str) -> None:
        subprocess.run(["callgrind_control", *setting, str(self.pid)], check=True, capture_output=True)


def limits_of(caller: str, quota: int, *, slots: bool, tokens: bool = False) -> list[Counter]:
    """An hour's window of a caller, or two windows and slots; and tokens an hour, if they are metered."""
    found = [Counter(caller, "p", Window(quota, 1, "hour"))]
    if slots:
        found += [Counter(caller, "p", Window(LARGE, 1, "day")), Counter(caller, "p", Slots(1_000))]
    if tokens:
        found.append(Counter(caller, "p:tokens", Window(LARGE, 1, "hour", "tokens")))
    return found


async def measure(server: CountedStore, callers: int, together: int) -> None:
    """Print the instructions of each kind of operation, so many of which share a call."""
    backend = RedisBackend(server.url, timeout=PATIENCE)
    await backend.open()

    async def charge(charge: Charge, held: list[Outcome]) -> None:
        held.append(await backend.acquire(charge, new_id()))

    async def row(name: str, asked: Sequence[Ask]) -> None:
        print(f"{name:<60}{await server.count(asked, together):>10,.0f}", flush=True)

    for name, slots in (("one window", False), ("two windows and a slot", True)):
        charges = [Charge(limits_of(f"{name} {i}", LARGE, slots=slots)) for i in range(callers)]
        for turn in ("the first charge of a caller", "a charge"):
            held: list[Outcome] = []
            await row(f"{turn}, {name}", [partial(charge, each, held) for each in charges])
            ends = [partial(backend.finish, each.reservation, EstimateAction.UNTOUCHED) for each in held]
            if slots:
                await row(f"the release of its slot after {turn}", ends)
        full = [Charge(limits_of(f"full {name} {i}", 1, slots=slots)) for i in range(callers)]
        for each in full:
            await charge(each, [])
        await row(f"a refusal, {name}", [partial(charge, each, []) for each in full])
        metered = [
            Charge(
                limits_of(f"units {name} {i}", LARGE, slots=slots, tokens=True),
                estimates={"tokens": ESTIMATE},
            )
            for i in range(callers)
        ]
        for used in (None, *USED):
            held = []
            await row(f"a charge, {name} and tokens", [partial(charge, each, held) for each in metered])
            if used is None:
                continue
            units = {"tokens": used}
            await row(
                f"its settle, {used} of {ESTIMATE}",
                [partial(backend.settle_units, each.reservation, units) for each in held],
            )
            for outcome in held:
                await backend.finish(outcome.reservation.without_meters(), EstimateAction.KEEP)
    await backend.close()


async def measure_one(server: CountedStore, together: int) -> None:
    """Print the instructions of each request of one caller, which asks so many times at once."""
    backend = RedisBackend(server.url, timeout=PATIENCE)
    await backend.open()
    for tokens in (False, True):
        estimates = {"tokens": ESTIMATE} if tokens else None
        charge = Charge(limits_of("one", LARGE, slots=True, tokens=tokens), estimates=estimates)
        counts = dict.fromkeys(("charge", "settle", "release"), 0.0)
        for turn in range(ROUNDS + 1):
            held: list[Outcome] = []

            async def ask(charge: Charge = charge, held: list[Outcome] = held) -> None:
                held.append(await backend.acquire(charge, new_id()))

            counted = {"charge": await server.count([ask] * together, together)}
            if tokens:
                used = {"tokens": USED[1]}
                settles = [partial(backend.settle_units, each.reservation, used) for each in held]
                counted["settle"] = await server.count(settles, together)
            left = [each.reservation.without_meters() for each in held]
            ends = [partial(backend.finish, each, EstimateAction.UNTOUCHED) for each in left]
            counted["release"] = await server.count(ends, together)
            for name, number in counted.items() if turn else ():  # the first one makes the windows
                counts[name] += number / ROUNDS
        limits = "two windows, a slot and tokens" if tokens else "two windows and a slot"
        row = ", ".join([f"{name} {number:,.0f}" for name, number in counts.items()])
        print(f"{limits:<40}{row}; all {sum(counts.values()):,.0f}", flush=True)
    await backend.close()


def main() -> None:
    """Parse the command line, and count."""
    parser = argparse.ArgumentParser(prog="benchmarks.alone", description=__doc__)
    parser.add_argument("--server", choices=sorted(server_binaries()), default="redis")
    parser.add_argument("--callers", type=int, default=500, metavar="N")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="operations in a call")
    parser.add_argument("--one-caller", action="store_true", help="all of one caller")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = CountedStore(arguments.server, Path(folder))
        server.start()
        try:
            if arguments.one_caller:
                asyncio.run(measure_one(server, arguments.together))
            else:
                asyncio.run(measure(server, arguments.callers, arguments.together))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
