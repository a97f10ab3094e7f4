"""Calls that are executed after they were given up: they charge nothing, however late they come."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Self

import pytest
import uvloop

from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.backends.connecting.connector import ServerConnector
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.backends.redis.batcher import Batcher
from ratelimit_mw._internal.backends.redis.server_clock import WITHOUT_END, ServerClock
from ratelimit_mw._internal.model.backend import BackendError, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus
from ratelimit_mw._internal.settings.backend import BackendSettings
from ratelimit_mw._internal.settings.url import SecretURL
from tests.support.conformance import daily, eventually, metered, monthly, new_id, slots, window
from tests.support.processes import HOST
from tests.support.servers import StoreServer
from tests.support.statuses import peeked

pytestmark = pytest.mark.rerun

TIMEOUT = 0.3


class Holding:
    """A proxy that can hold what clients have written, and deliver it though they are gone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._clients: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.holds = False
        self.holds_from = b""
        """Command with which it begins to hold; empty for none."""
        self.answers = 0
        """Pieces of answers that came from the server."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    @property
    def is_holding(self) -> bool:
        """Whether it holds anything."""
        return bool(self._held)

    @property
    def url(self) -> str:
        """URL at which it listens."""
        return f"redis://{HOST}:{self._server.sockets[0].getsockname()[1]}/0"

    def cut(self) -> None:
        """Cut the connections with clients; what the server was to get is held on."""
        for writer in self._clients:
            writer.transport.abort()

    async def deliver(self) -> None:
        """Deliver what was held, and wait until the server has answered it."""
        assert self._held, "there is something to deliver"
        answers = self.answers
        for writer, data in self._held:
            writer.write(data)

        async def answered() -> bool:
            return self.answers > answers

        await eventually(answered)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(HOST, self._port)
        self._writers += [writer, server_writer]
        self._clients.append(writer)
        task = asyncio.create_task(self._answer(server_reader, writer))
        self._tasks.add(task)
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.holds = self.holds or bool(self.holds_from and self.holds_from in data)
                if self.holds:
                    self._held.append((server_writer, data))
                else:
                    server_writer.write(data)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.answers += 1
                if not writer.is_closing():
                    writer.write(data)


@pytest.fixture
async def proxy(redis_server: StoreServer) -> AsyncIterator[Holding]:
    """Before a server without any counts."""
    async with Holding(redis_server.port) as proxy:
        yield proxy


COUNTERS = {
    "a rate": [window(9)],
    "a slot": [slots(9)],
    "an estimate": [daily(1_000), monthly(5_000)],
    "all": [window(9), slots(9), daily(1_000), monthly(5_000)],
}


@pytest.mark.parametrize("counters", COUNTERS.values(), ids=COUNTERS.keys())
async def test_a_charge_that_comes_after_it_was_given_up_charges_nothing(
    proxy: Holding, counters: list[Counter]
) -> None:
    """Its give-back may have been there before it: what it would take nobody would ever give back."""
    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    charge = Charge(counters)

    async def is_back() -> bool:
        with contextlib.suppress(BackendError):
            await backend.peek(charge)
            return backend.load.owed == 0
        return False

    assert (await backend.acquire(charge, new_id(), 0)).admitted
    before = [status[:2] for status in (await peeked(backend, charge)).statuses]
    proxy.holds = True
    with pytest.raises(BackendError):
        await backend.acquire(charge, new_id(), 100)
    proxy.holds = False
    await eventually(is_back)
    await proxy.deliver()
    after = [status[:2] for status in (await peeked(backend, charge)).statuses]
    assert [used for used, _ in after] == [used for used, _ in before]
    assert [held for _, held in after][-1:] == [0] or not charge.allowances
    await backend.close()


@pytest.mark.parametrize("closes", [False, True])
async def test_a_charge_that_outlives_its_connection_is_given_back_after_it(
    proxy: Holding, *, closes: bool
) -> None:
    """A proxy may deliver it when the next connection is there: a give-back sent at once would be first."""
    backend = RedisBackend(proxy.url, timeout=0.6)
    observer = RedisBackend(proxy.url, timeout=5)
    charge = Charge([slots(9), daily(1_000)])
    await backend.peek(charge)
    proxy.holds = True
    charged = asyncio.create_task(backend.acquire(charge, new_id(), 100))
    await asyncio.sleep(0.02)
    proxy.cut()
    with pytest.raises(BackendError):
        await charged
    proxy.holds = False
    await observer.open()
    assert backend.load.owed == 1
    closing = asyncio.create_task(backend.close()) if closes else None
    await asyncio.sleep(0.15)
    await proxy.deliver()
    answer = await peeked(observer, charge)
    assert (answer.counted, answer.held(1)) == ([1, 0], 100)

    async def is_undone() -> bool:
        answer = await peeked(observer, charge)
        return answer.counted == [0, 0] and not answer.held(1)

    await eventually(is_undone, 5)
    await (closing or backend.close())
    await observer.close()


async def test_closing_gives_back_what_it_cannot_wait_for(
    proxy: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends while a lost charge may still come leaves no slot, estimate or money behind."""
    monkeypatch.setattr("ratelimit_mw._internal.backends.redis.loops.CLOSE_TIMEOUT", 1.0)
    backend = RedisBackend(proxy.url, timeout=60)
    observer = RedisBackend(proxy.url, timeout=5)
    charge = Charge([slots(9), daily(1_000), metered(1_000)], estimates={"tokens": 300})
    await backend.peek(charge)
    proxy.holds = True
    charged = asyncio.create_task(backend.acquire(charge, new_id(), 100))
    await asyncio.sleep(0.02)
    proxy.cut()
    with pytest.raises(BackendError):
        await charged
    proxy.holds = False
    await proxy.deliver()
    await observer.open()
    answer = await peeked(observer, charge)
    assert (answer.counted, answer.held(1)) == ([1, 0, 300], 100)
    await backend.close()
    answer = await peeked(observer, charge)
    assert (answer.counted, answer.held(1)) == ([0, 0, 0], 0)
    await observer.close()


async def test_what_is_given_up_with_an_older_call_is_given_back_after_it(proxy: Holding) -> None:
    """A time-out ends calls that were sent later, too: one that still comes in time is undone after that."""
    backend = RedisBackend(proxy.url, timeout=0.6)
    charge = Charge([slots(9), daily(1_000)])
    await backend.peek(charge)
    proxy.holds = True
    older = asyncio.create_task(backend.peek(charge))
    await asyncio.sleep(0.5)
    younger = asyncio.create_task(backend.acquire(charge, new_id(), 100))
    await asyncio.gather(older, younger, return_exceptions=True)
    assert isinstance(older.exception(), BackendError)
    assert isinstance(younger.exception(), BackendError)
    proxy.holds = False
    await asyncio.sleep(0.15)  # for its give-back, were that sent at once
    await proxy.deliver()

    async def is_undone() -> bool:
        with contextlib.suppress(BackendError):
            return (await peeked(backend, charge)).statuses == [
                SlotStatus(0, is_full=False),
                BudgetStatus(0, 0, is_short=False),
            ]
        return False

    await eventually(is_undone, 5)
    await backend.close()


@pytest.mark.parametrize("end", ["silence", "cut"])
async def test_a_renewal_that_comes_after_it_was_given_up_shortens_nothing(proxy: Holding, end: str) -> None:
    """A job may have been detached since, for longer than the lease of its request."""
    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    charge = Charge([slots(9, lease=30)])
    reservation = (await backend.acquire(charge, new_id())).reservation
    proxy.holds = True
    renewal = asyncio.ensure_future(backend.renew(reservation, 1))
    if end == "cut":
        await eventually(lambda: _is_held(proxy))
        proxy.cut()
        proxy.holds = False
    with pytest.raises(BackendError):
        await renewal
    proxy.holds = False

    async def is_renewed() -> bool:
        with contextlib.suppress(BackendError):
            return await backend.renew(reservation, 600)
        return False

    await eventually(is_renewed)
    await proxy.deliver()
    await asyncio.sleep(1.1)
    assert (await peeked(backend, charge)).used(0) == 1
    await backend.close()


@pytest.mark.parametrize("kind", ["money", "units"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("end", ["silence", "cut"])
async def test_an_amount_that_comes_again_replaces_no_newer_one(
    proxy: Holding, kind: str, end: str, *, joined: bool
) -> None:
    """A settle that was given up and sent again changes nothing once another has replaced it."""
    backend = RedisBackend(proxy.url, timeout=TIMEOUT)
    charge = Charge([daily(1_000)]) if kind == "money" else Charge([metered(1_000)], estimates={"tokens": 9})
    held, other = [(await backend.acquire(charge, new_id(), 9)).reservation for _ in range(2)]

    def settle(reservation: Reservation, amount: int) -> Awaitable[Settlement]:
        if kind == "money":
            return backend.settle(reservation, amount, replace=True)
        return backend.settle_units(reservation, {"tokens": amount}, replace=True)

    assert await settle(held, 5) is Settlement.SETTLED
    proxy.holds = True
    lost = [settle(each, 500) for each in ((held, other) if joined else (held,))]
    if end == "silence":
        await eventually(lambda: _is_away(backend))
    else:
        await eventually(lambda: _is_held(proxy))
        proxy.cut()
    proxy.holds = False
    for each in lost:
        assert await each is Settlement.SETTLED
    assert await settle(held, 7) is Settlement.SETTLED
    before = (await peeked(backend, charge)).counted
    await proxy.deliver()
    assert (await peeked(backend, charge)).counted == before == [507 if joined else 7 + 9 * (kind == "units")]
    await backend.close()


async def _is_held(proxy: Holding) -> bool:
    return proxy.is_holding


async def _is_away(backend: RedisBackend) -> bool:
    return backend.error is not None


async def test_an_amount_that_came_late_is_sent_again(redis_server: StoreServer) -> None:
    """A settle that replaces an amount arrives, though the server's clock was set ahead meanwhile."""
    backend = RedisBackend(redis_server.url, timeout=TIMEOUT)
    charge = Charge([daily(1_000)])
    reservation = (await backend.acquire(charge, new_id(), 9)).reservation
    assert await backend.settle(reservation, 5) is Settlement.SETTLED
    batcher = backend.loops.senders[asyncio.get_running_loop()]
    assert isinstance(batcher, Batcher)
    clock = batcher._replies.server_clock
    assert clock._ahead is not None
    clock._ahead -= 1_000
    settled = backend.settle(reservation, 7, replace=True)
    for operation in batcher._backlog.queue:
        operation.since -= 2 * TIMEOUT  # it has waited for the server to be back
    assert await settled is Settlement.SETTLED
    assert (await peeked(backend, charge)).counted == [7]
    await backend.close()


async def test_a_charge_in_time_is_not_late_by_clocks_that_differ(redis_server: StoreServer) -> None:
    """A loop that was away, and reads its answers late, takes the server's clock for one that is behind."""
    backend = RedisBackend(redis_server.url, timeout=TIMEOUT)
    charge = Charge([window(1_000)])
    for ahead in (0.0, -1_000.0, 1_000.0):
        assert (await backend.acquire(charge, new_id())).admitted
        batcher = backend.loops.senders[asyncio.get_running_loop()]
        assert isinstance(batcher, Batcher)
        clock = batcher._replies.server_clock
        assert clock._ahead is not None
        clock._ahead += ahead
    assert (await peeked(backend, charge)).used(0) == 3
    assert (await backend.acquire(charge, new_id())).admitted
    assert not backend.is_away
    await backend.close()


def _shown(clock: ServerClock) -> float:
    """Return the time in microseconds that a call names which is waited for another second."""
    (time,) = struct.unpack("<d", clock.in_(1.0))
    return float(time)


def test_the_clock_of_a_server_is_the_latest_that_answers_show() -> None:
    """Answers are late, never early: what one shows bounds the clock from below."""
    clock = ServerClock()
    assert clock.in_(1.0) == WITHOUT_END
    clock.show(5_000_000_000)
    first = _shown(clock)
    assert 5_000_900_000 < first < 5_002_000_000
    clock.show(4_000_000_000)
    assert _shown(clock) >= first - 1_000
    clock.show(6_000_000_000)
    assert _shown(clock) > 6_000_900_000
    clock.forget()
    assert clock.in_(1.0) == WITHOUT_END


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop of each kind."""
    new_loop: Callable[[], asyncio.AbstractEventLoop] = request.param
    loop = new_loop()
    yield loop
    loop.close()


def test_what_was_not_sent_yet_is_not_sent_any_more(
    redis_server: StoreServer, loop: asyncio.AbstractEventLoop
) -> None:
    """A connection that is given up is reset: the kernel delivers nothing of what it still has."""

    async def try_it() -> int:
        met: list[str] = []
        over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.read(10):
                    pass
                met.append("end")
            except ConnectionResetError:
                met.append("reset")
            writer.close()
            over.set()

        async with await asyncio.start_server(serve, HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            connection = await ServerConnector(redis_server.url, timeout=5).connect(lambda _: None)
            connection.close()
            for discard in (False, True):
                over.clear()
                _, writer = await asyncio.open_connection(HOST, port)
                connection._transport = writer.transport
                writer.write(b"x")
                await asyncio.sleep(0.05)
                connection.close(discard=discard)
                await asyncio.wait_for(over.wait(), 10)
        assert met == ["end", "reset"]
        return len(met)

    assert loop.run_until_complete(try_it()) == 2


async def test_live_keys_that_come_after_they_were_given_up_replace_no_newer_ones(
    proxy: Holding, redis_server: StoreServer
) -> None:
    """A write that an operator was told has failed undoes nothing of the next one, however late it comes."""
    store = open_key_store(BackendSettings(url=SecretURL(proxy.url)), timeout=TIMEOUT)
    direct = open_key_store(BackendSettings(url=SecretURL(redis_server.url)))
    await store.write({"a": b"first"})
    proxy.holds_from = b"MULTI"
    with pytest.raises(BackendError):
        await store.write({"a": b"lost"})
    proxy.holds, proxy.holds_from = False, b""
    await direct.write({"a": b"newer"})
    await proxy.deliver()
    assert await direct.entries() == {"a": b"newer"}
    await store.write({"b": b"later"})
    assert await direct.entries() == {"a": b"newer", "b": b"later"}
    for each in (store, direct):
        await each.close()


async def test_live_keys_that_are_written_at_once_are_all_written(redis_server: StoreServer) -> None:
    """A write that another one overtakes is sent again."""
    stores = [open_key_store(BackendSettings(url=SecretURL(redis_server.url))) for _ in range(8)]
    await asyncio.gather(*[each.write({f"{place}": b"-"}) for place, each in enumerate(stores)])
    assert await stores[0].entries() == {f"{place}": b"-" for place in range(8)}
    for each in stores:
        await each.close()
