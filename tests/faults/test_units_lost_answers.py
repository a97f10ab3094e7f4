"""Settles of metered units whose answers are lost: what was used counts, and once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.backend import BackendError, EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.conformance import Clock, eventually, metered, new_id, slots
from tests.support.proxy import Proxy
from tests.support.servers import StoreServer
from tests.support.statuses import peeked

pytestmark = pytest.mark.rerun

CHARGE = Charge([metered(1_000), slots(5)], estimates={"tokens": 100})
TIMEOUT = 0.3
SETTLED, REPEATED = Settlement.SETTLED, Settlement.REPEATED


class Scene:
    """A backend behind a proxy, a second one beside it, and the clock of both."""

    def __init__(self, server: StoreServer, proxy: Proxy, name: str) -> None:
        self.proxy, self.server, self.name = proxy, server, name
        self.clock = Clock()
        self.backend = RedisBackend(proxy.url, namespace=name, timeout=TIMEOUT, clock=self.clock)
        self.other = RedisBackend(server.url, namespace=name, timeout=5, clock=self.clock)

    async def reserve(self) -> Reservation:
        """Charge an estimate of 100 tokens."""
        return (await self.backend.acquire(CHARGE, new_id())).reservation

    async def used(self) -> int:
        """Tokens that count, as another process sees it."""
        return (await peeked(self.other, CHARGE)).used(0)

    async def is_closed(self) -> bool:
        """Whether no estimate is open any more."""
        with self.server.client() as client:
            found: list[bytes] = client.zrange(f"{self.name}:{{caller}}:e:p:tokens:60", 0, -1)
            return found == [b""]

    def mend(self) -> None:
        """Have all pass again, over new connections."""
        self.proxy.fault = "none"
        self.proxy.reset()


@asynccontextmanager
async def scene_on(server: StoreServer, name: str) -> AsyncIterator[Scene]:
    """A scene under a namespace of its own."""
    async with Proxy(server.port) as proxy:
        scene = Scene(server, proxy, name)
        yield scene
        scene.mend()
        await scene.backend.close()
        await scene.other.close()


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("used", [0, 40, 100])
async def test_a_settle_whose_answer_was_lost_counts_once(
    server: StoreServer, used: int, is_first: bool
) -> None:
    """It is sent again, finds the estimate closed, and takes that for its own work: nothing is charged."""
    async with scene_on(server, f"lost-{used}-{is_first}") as scene:
        if not is_first:
            await scene.backend.settle_units(await scene.reserve(), {"tokens": 0})
        held = await scene.reserve()
        scene.proxy.fault = "drop_replies"
        settling = asyncio.ensure_future(_settled(scene, held, used))
        await eventually(scene.is_closed)
        scene.mend()
        assert await settling is SETTLED
        assert await scene.used() == used
        assert await scene.backend.settle_units(held, {"tokens": used}) is REPEATED
        assert await scene.backend.settle_units(held, {"tokens": 7}) is Settlement.DIFFERENT
        assert await scene.used() == used


@pytest.mark.parametrize("used", [40, 100])
async def test_a_settle_that_never_came_counts_in_full_once_the_estimate_has_lapsed(
    server: StoreServer, used: int
) -> None:
    """It may have been done for all that its sender knows: the note that the estimate lapsed decides."""
    async with scene_on(server, f"never-{used}") as scene:
        held = await scene.reserve()
        scene.proxy.fault = "blackhole"
        settling = asyncio.ensure_future(_settled(scene, held, used))
        await asyncio.sleep(2 * TIMEOUT)
        scene.clock.now += 31_000_000
        assert await scene.used() == 0
        scene.mend()
        assert await settling is SETTLED
        assert await scene.used() == used


@pytest.mark.parametrize(("action", "left"), [(EstimateAction.KEEP, 100), (EstimateAction.GIVE_BACK, 0)])
async def test_an_end_whose_answer_was_lost_ends_once(
    server: StoreServer, action: EstimateAction, left: int
) -> None:
    """An estimate that is kept stays counted, and one that is given back is so once."""
    async with scene_on(server, f"end-{left}") as scene:
        others = await scene.reserve()
        await scene.backend.hold_estimate(others)
        held = await scene.reserve()
        scene.proxy.fault = "drop_replies"
        scene.backend.finish(held, action)
        await eventually(scene.is_closed)
        scene.mend()

        async def nothing_is_owed() -> bool:
            return not scene.backend.load.owed

        await eventually(nothing_is_owed)
        assert await scene.used() == 100 + left


async def _settled(scene: Scene, held: Reservation, used: int) -> Settlement:
    return await scene.backend.settle_units(held, {"tokens": used})


async def test_a_settle_for_more_waits_for_the_server_before_its_end(server: StoreServer) -> None:
    """The request ends while its settle waits: the end comes after it, and adds nothing."""
    async with scene_on(server, "waits") as scene:
        held = await scene.reserve()
        scene.proxy.fault = "blackhole"
        settling = asyncio.ensure_future(_settled(scene, held, 150))
        await asyncio.sleep(1.5 * TIMEOUT)
        scene.backend.finish(held, EstimateAction.KEEP)
        scene.mend()
        assert await settling is SETTLED

        async def nothing_is_owed() -> bool:
            return not scene.backend.load.owed

        await eventually(nothing_is_owed)
        assert await scene.used() == 150


async def test_a_settle_that_failed_is_settled_again(server: StoreServer) -> None:
    """A closed backend sends nothing more: to settle again charges what was used, and once."""
    async with scene_on(server, "failed") as scene:
        held = await scene.reserve()
        scene.proxy.fault = "blackhole"
        settling = asyncio.ensure_future(_settled(scene, held, 40))
        await asyncio.sleep(TIMEOUT / 3)
        await scene.backend.close()
        with pytest.raises(BackendError):
            await settling
        scene.mend()
        assert await scene.backend.settle_units(held, {"tokens": 40}) is SETTLED
        await scene.backend.finish(held, EstimateAction.KEEP)
        assert await scene.used() == 40


async def test_the_note_of_one_unit_says_nothing_of_another(server: StoreServer) -> None:
    """One of two estimates was closed, its answer lost; that the other has lapsed charges nothing more."""
    async with scene_on(server, "two") as scene:
        output = metered(1_000, counts="output")
        charge = Charge([*CHARGE.counters, output], estimates={"tokens": 100, "output": 50})
        held = (await scene.backend.acquire(charge, new_id())).reservation
        scene.proxy.fault = "drop_replies"
        settling = asyncio.ensure_future(_settled(scene, held, 40))
        await eventually(scene.is_closed)
        scene.clock.now += 31_000_000
        assert (await peeked(scene.other, Charge([output]))).used(0) == 0
        scene.mend()
        assert await settling is SETTLED
        assert await scene.used() == 40
