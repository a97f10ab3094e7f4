"""Calls of the script that bring one operation: decided by the same rules as among others, and as safely."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import redis

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.outcome import Outcome
from tests.conftest import StartServer
from tests.support.conformance import TIMEOUT, Clock, daily, metered, new_id, slots, window
from tests.support.servers import StoreServer

CALLERS = ("ann", "bob", "cid")
QUOTAS = (1, 3, 10, 40, 2_000)


class Side:
    """One backend, whose operations leave alone or with others in a call."""

    def __init__(self, server: StoreServer, clock: Clock, name: str, *, is_lone: bool) -> None:
        self.backend = RedisBackend(server.url, namespace=name, timeout=TIMEOUT, clock=clock)
        self._is_lone = is_lone

    async def charge(
        self, charges: list[Charge], ids: list[bytes], price: int, *, looks: bool
    ) -> list[Outcome]:
        """Send equal charges, or looks, in one call; with an operation of somebody else where that is due."""
        asked = [
            self.backend.peek(charge, price) if looks else self.backend.acquire(charge, lease_id, price)
            for charge, lease_id in zip(charges, ids, strict=True)
        ]
        if self._is_lone:
            return await asyncio.gather(*asked)
        *outcomes, _ = await asyncio.gather(*asked, self._another(charges[0]))
        return outcomes

    async def _another(self, charge: Charge) -> Outcome:
        """Ask for something else in the same call: half of the time for the same keys."""
        shares = charge.cost % 2 == 1 and not charge.meters  # a look gives back estimates that have lapsed
        counters = list(charge.counters) if shares else [window(1, of="another")]
        return await self.backend.peek(Charge(counters))

    async def finish(self, outcome: Outcome, action: EstimateAction) -> None:
        """End a charge, alone or with another operation in the call."""
        ended = self.backend.finish(outcome.reservation, action)
        if not self._is_lone:
            await self.backend.peek(Charge([window(1, of="another")]))
        await ended


def limits_of(caller: str, rng: random.Random) -> list[Counter]:
    """One to four limits of a caller: windows, slots, a budget, tokens."""
    found = [window(rng.choice(QUOTAS), of=caller)]
    if rng.random() < 0.5:
        found.append(window(rng.choice(QUOTAS), 1, "hour", of=caller))
    if rng.random() < 0.5:
        found.append(slots(rng.choice((1, 3, 9)), of=caller))
    if rng.random() < 0.2:
        found.append(daily(rng.choice((10, 500)), of=caller))
    if rng.random() < 0.2:
        found.append(metered(rng.choice((10, 3_000)), of=caller))
    rng.shuffle(found)
    return found


def told(charge: Charge, outcomes: list[Outcome]) -> list[object]:
    """All that outcomes of a charge say."""
    return [(each.admitted, each.now, charge.statuses(each)) for each in outcomes]


@pytest.mark.parametrize(
    ("seed", "operations"), [(1, 2_000), pytest.param(2, 12_000, marks=pytest.mark.slow)], ids=str
)
async def test_alone_and_among_others_an_operation_does_the_same(
    server: StoreServer, seed: int, operations: int
) -> None:
    """Random operations get the same answers, whether each has a call of its own or shares one."""
    rng, clock = random.Random(seed), Clock()
    sides = [Side(server, clock, f"{name}-{seed}", is_lone=name == "lone") for name in ("lone", "batch")]
    live: list[list[Outcome]] = []
    admitted = refused = 0
    for number in range(operations):
        clock.now += rng.choice((0, 0, 1, 1_000, 200_000, 3_000_000, 30_000_000))
        if live and rng.random() < 0.3:
            ended, action = live.pop(rng.randrange(len(live))), rng.choice(list(EstimateAction))
            for side, outcome in zip(sides, ended, strict=True):
                await side.finish(outcome, action)
            continue
        counters = limits_of(rng.choice(CALLERS), rng)
        tokens, many = {"tokens": rng.choice((0, 1, 7))}, rng.choice((1, 1, 1, 4))
        cost, price, looks = rng.choice((1, 1, 2, 5)), rng.choice((0, 0, 7)), rng.random() < 0.1
        charges = [Charge(counters, cost, estimates=tokens)] * many
        ids = [new_id() for _ in range(many)]
        answers = [await side.charge(charges, ids, price, looks=looks) for side in sides]
        said = [told(charges[0], each) for each in answers]
        assert said[0] == said[1], f"operation {number} on {counters}"
        for pair in zip(*answers, strict=True):
            admitted, refused = admitted + pair[0].admitted, refused + (not pair[0].admitted)
            if pair[0].reservation.id:
                live.append(list(pair))
    assert min(admitted, refused) > operations / 10
    assert [side.backend.load.failed for side in sides] == [0, 0]
    for side in sides:
        await side.backend.close()


# what fails ---------------------------------------------------------------------------------------

CHARGES = {
    "one window": [window(5)],
    "two windows and a slot": [window(5), window(9, 1, "hour"), slots(5)],
    "a slot": [slots(5)],
    "money": [window(5), daily(90)],
    "tokens": [window(5), metered(900), slots(5)],
}


def charge_of(counters: list[Counter]) -> Charge:
    """A charge whose metered units, if any, are estimated at 7."""
    return Charge(counters, estimates={"tokens": 7})


def dump(client: redis.Redis) -> dict[bytes, object]:
    """All that a server stores, but for lives."""
    return {key: client.dump(key) for key in client.scan_iter()}


@pytest.fixture
async def own(start_server: StartServer, kind: str) -> AsyncIterator[tuple[StoreServer, RedisBackend]]:
    """A server of its own, and a backend on it that asks as a user whose rights a test changes."""
    server = start_server(kind)
    with server.client() as client:
        client.execute_command(*["ACL", "SETUSER", "limiter", "on", ">secret", "~*", "+@all"])
    backend = RedisBackend(server.url.replace("redis://", "redis://limiter:secret@"), timeout=TIMEOUT)
    await backend.open()
    yield server, backend
    await backend.close()


@pytest.mark.parametrize("held", [0, 1, 7])
@pytest.mark.parametrize("counters", CHARGES.values(), ids=CHARGES)
async def test_without_memory_a_lone_charge_changes_nothing(
    own: tuple[StoreServer, RedisBackend], counters: list[Counter], held: int
) -> None:
    """All or nothing where memory is full: for a first charge, a usual one, and where the ring is written."""
    server, backend = own
    charge = charge_of(counters)
    for _ in range(min(held, 4)):
        await backend.acquire(charge, new_id(), 3)
    with server.client() as client:
        before = dump(client)
        client.config_set("maxmemory", "1")
        with pytest.raises(BackendError, match="OOM"):
            await backend.acquire(charge, new_id(), 3)
        client.config_set("maxmemory", "0")
        assert dump(client) == before
    assert (await backend.acquire(charge, new_id(), 3)).admitted
    assert backend.error is None


COMMANDS = ("getrange", "setrange", "set", "zadd", "zcard", "zcount", "pexpire", "pttl", "get")


@pytest.mark.parametrize("counters", CHARGES.values(), ids=CHARGES)
async def test_a_lone_charge_whose_command_fails_errs_towards_fewer_admissions(
    own: tuple[StoreServer, RedisBackend], counters: list[Counter]
) -> None:
    """Each command is forbidden in turn: who asks is told, and no limit has more room afterwards."""
    server, backend = own
    charge = charge_of(counters)
    await backend.acquire(charge, new_id(), 3)
    with server.client() as client:
        for command in COMMANDS:
            before = [(await backend.peek(charge, 3)).used(place) for place in range(len(counters))]
            client.execute_command("ACL", "SETUSER", "limiter", f"-{command}")
            fault = ""
            try:
                await backend.acquire(charge, new_id(), 3)
            except BackendError as error:
                fault = str(error)
            assert not fault or "permission" in fault or "can't run this command" in fault
            client.execute_command("ACL", "SETUSER", "limiter", f"+{command}")
            after = [(await backend.peek(charge, 3)).used(place) for place in range(len(counters))]
            assert all(now >= then for now, then in zip(after, before, strict=True)), command
            await backend.reset(charge)
            await backend.acquire(charge, new_id(), 3)
    assert backend.error is None


async def test_a_lone_release_is_a_plain_command(server: StoreServer) -> None:
    """Slots of one set are freed without the script, one request's or several at once."""
    backend = RedisBackend(server.url, timeout=TIMEOUT)
    charge = Charge([slots(9, of="plain")])
    with server.client() as client:
        for number in (1, 3):
            held = await asyncio.gather(*[backend.acquire(charge, new_id()) for _ in range(number)])
            client.config_resetstat()
            await asyncio.gather(
                *[backend.finish(each.reservation, EstimateAction.UNTOUCHED) for each in held]
            )
            stats = client.info("commandstats")
            assert stats["cmdstat_zrem"]["calls"] == 1
            assert "cmdstat_evalsha" not in stats
            assert (await backend.peek(charge)).used(0) == 0
    await backend.close()


async def test_a_lone_release_mends_what_is_no_slot_set(server: StoreServer) -> None:
    """A key of another type, which the command refuses, is deleted by the script and counted."""
    backend = RedisBackend(server.url, timeout=TIMEOUT)
    charge = Charge([slots(2, of="foreign")])
    held = await backend.acquire(charge, new_id())
    with server.client() as client:
        client.set("ratelimit:{foreign}:s:p", "x")
        await backend.finish(held.reservation, EstimateAction.UNTOUCHED)
        assert client.exists("ratelimit:{foreign}:s:p") == 0
    assert backend.load.mended == 1
    assert backend.load.failed == 0
    await backend.close()


async def test_a_lone_release_works_without_memory(own: tuple[StoreServer, RedisBackend]) -> None:
    """A release, which frees memory, is done when there is none."""
    server, backend = own
    charge = Charge([slots(2)])
    held = await backend.acquire(charge, new_id())
    with server.client() as client:
        client.config_set("maxmemory", "1")
        await backend.finish(held.reservation, EstimateAction.UNTOUCHED)
        client.config_set("maxmemory", "0")
    assert (await backend.peek(charge)).used(0) == 0
