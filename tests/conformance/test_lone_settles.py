"""Settles of metered units, alone in a call and among others: what fails makes no room."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from tests.conftest import StartServer
from tests.support.conformance import TIMEOUT, Clock, metered, new_id, slots, window
from tests.support.servers import StoreServer

LIMITS = [window(500), metered(1_000), metered(9_000, 60), slots(50)]
ESTIMATE = 70
KEY = "ratelimit:{caller}:w:p:tokens:60"
SETTLED = Settlement.SETTLED


@pytest.fixture
async def own(start_server: StartServer, kind: str) -> AsyncIterator[tuple[StoreServer, RedisBackend]]:
    """A server of its own, and a backend on it that asks as a user whose rights a test changes."""
    server = start_server(kind)
    with server.client() as client:
        client.execute_command(*["ACL", "SETUSER", "limiter", "on", ">secret", "~*", "+@all"])
    url = server.url.replace("redis://", "redis://limiter:secret@")
    backend = RedisBackend(url, timeout=TIMEOUT, clock=Clock())
    await backend.open()
    yield server, backend
    await backend.close()


def charge_of(estimate: int) -> Charge:
    """A charge of two windows of tokens, a plain one and a slot."""
    return Charge(LIMITS, estimates={"tokens": estimate})


async def tokens_used(backend: RedisBackend) -> list[int]:
    """Tokens that both windows count."""
    looked = await backend.peek(charge_of(0))
    return [looked.used(1), looked.used(2)]


async def settle(backend: RedisBackend, outcome: Outcome, used: int, *, is_lone: bool) -> Settlement:
    """Settle alone in a call, or with another operation."""
    settled = backend.settle_units(outcome.reservation, {"tokens": used})
    if is_lone:
        return await settled
    met, _ = await asyncio.gather(_of(settled), backend.peek(Charge([window(1, of="another")])))
    return met


async def _of(settled: object) -> Settlement:
    met: Settlement = await settled  # type: ignore[misc]
    return met


@pytest.mark.parametrize("is_lone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize("used", [0, 30, ESTIMATE, 90])
@pytest.mark.parametrize("estimate", [0, ESTIMATE])
@pytest.mark.parametrize("later", [0, 3, 12])
async def test_a_settle_is_exact_without_memory(
    own: tuple[StoreServer, RedisBackend], is_lone: bool, used: int, estimate: int, later: int
) -> None:
    """However long ago the charge was, and wherever its entry is now: a settle needs no memory to begin."""
    server, backend = own
    held = await backend.acquire(charge_of(estimate), new_id())
    for _ in range(later):
        assert isinstance(backend._clock, Clock)
        backend._clock.now += 1_000
        await backend.hold_estimate((await backend.acquire(charge_of(1), new_id())).reservation)
    with server.client() as client:
        client.config_set("maxmemory", "1")
        assert await settle(backend, held, used, is_lone=is_lone) is SETTLED
        client.config_set("maxmemory", "0")
    assert await tokens_used(backend) == [used + later] * 2
    assert await settle(backend, held, used, is_lone=is_lone) is Settlement.REPEATED
    await backend.finish(held.reservation, EstimateAction.GIVE_BACK)
    assert await tokens_used(backend) == [used + later] * 2


@pytest.mark.parametrize("is_lone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize("used", [30, 90])
async def test_a_settle_whose_command_fails_makes_no_room(
    own: tuple[StoreServer, RedisBackend], is_lone: bool, used: int
) -> None:
    """Each command is forbidden in turn: who settles is told and settles again, and no less counts."""
    server, backend = own
    for command in ("get", "set", "zrem", "getrange", "setrange", "pexpire"):
        await backend.reset(charge_of(0))
        held = await backend.acquire(charge_of(ESTIMATE), new_id())
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "limiter", f"-{command}")
            fault = ""
            try:
                await settle(backend, held, used, is_lone=is_lone)
            except BackendError as error:
                fault = str(error)
            assert not fault or "permission" in fault or "can't run this command" in fault
            client.execute_command("ACL", "SETUSER", "limiter", f"+{command}")
        assert min(await tokens_used(backend)) >= min(used, ESTIMATE), command
        await settle(backend, held, used, is_lone=is_lone)
        assert min(await tokens_used(backend)) >= used, command
    assert backend.error is None


@pytest.mark.parametrize("stored", [b"x", b"\0" * 48, b"\xff" * 108, b"y" * 300, None])
async def test_a_settle_mends_a_damaged_window(
    own: tuple[StoreServer, RedisBackend], stored: bytes | None
) -> None:
    """A key that is not a window is mended when it is met, towards fewer admissions; the settle goes on."""
    server, backend = own
    held = await backend.acquire(charge_of(ESTIMATE), new_id())
    with server.client() as client:
        client.delete(KEY)
        if stored is None:
            client.rpush(KEY, "x")
        else:
            client.set(KEY, stored)
        assert await settle(backend, held, 30, is_lone=True) is SETTLED
    assert backend.load.failed == 0
    assert (await backend.peek(charge_of(0))).used(2) == 30


async def test_estimates_of_one_caller_share_a_set_that_stays(own: tuple[StoreServer, RedisBackend]) -> None:
    """The set of open estimates outlives its last one, for a window and an eighth, and is empty then."""
    server, backend = own
    for _ in range(3):
        held = await backend.acquire(charge_of(ESTIMATE), new_id())
        assert await settle(backend, held, 1, is_lone=True) is SETTLED
    assert await tokens_used(backend) == [3, 3]
    with server.client() as client:
        (found,) = client.keys("*:e:*")
        assert client.zrange(found, 0, -1) == [b""]
        assert 0 < client.pttl(found) <= 1.125 * 3_601_000
    assert await tokens_used(backend) == [3, 3]


async def test_what_an_open_estimate_needs_is_done_without_memory(
    own: tuple[StoreServer, RedisBackend],
) -> None:
    """A renewal and a settle that is repeated write first what takes no memory."""
    server, backend = own
    settled, running = [
        (await backend.acquire(Charge([metered(1_000)], estimates={"tokens": 70}), new_id())).reservation
        for _ in range(2)
    ]
    assert await backend.settle_units(settled, {"tokens": 30}) is SETTLED
    with server.client() as client:
        client.config_set("maxmemory", "1")
        assert await backend.settle_units(settled, {"tokens": 30}) is Settlement.REPEATED
        assert isinstance(backend._clock, Clock)
        for _ in range(2):
            backend._clock.now += 20_000_000
            assert await backend.renew(running, 30)
        client.config_set("maxmemory", "0")
    looked = await backend.peek(Charge([metered(1_000)]))
    assert looked.used(0) == 100
