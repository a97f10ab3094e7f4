"""However a request ends, its slot is held until the app has returned, and is free then."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import websockets

from tests.support.apps import AppServer
from tests.support.servers import StoreServer
from tests.support.slots import Client, Ledger, ask, expiries, held, slots_on_server, until_async

pytestmark = pytest.mark.rerun

SETTINGS = """
[backend]
timeout = 5
[plans.default]
concurrent = { limit = 5, unit = "prediction", lease = 1 }
[[routes]]
path = "/who"
slot = false
"""


class Served:
    """An app under uvicorn, its server's slots and its ledger."""

    def __init__(self, app: AppServer, server: StoreServer, ledger: Ledger) -> None:
        self.app = app
        self.port = app.port
        self.server = server
        self.ledger = ledger

    def held(self) -> int:
        """Slots held right now."""
        return held(self.server)

    def has_entered(self, number: int) -> bool:
        """Whether so many handlers have begun."""
        return self.ledger.entered() == number

    async def connect(self, *, buffer: int | None = None) -> Client:
        """A connection to the app."""
        return await Client.connect(self.port, buffer=buffer)


@pytest.fixture(scope="module")
def app_server(
    shared_server: Callable[[str], StoreServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One worker on Redis for all tests here."""
    server = shared_server("redis")
    folder = tmp_path_factory.mktemp("slots")
    settings = folder / "ratelimit.toml"
    settings.write_text(SETTINGS)
    ledger = Ledger(folder / "ledger")
    environment = {
        "RATELIMIT_SETTINGS": str(settings),
        "RATELIMIT_BACKEND__URL": server.url,
        "LEDGER": str(ledger.path),
    }
    app = AppServer("tests.support.slot_app:app", folder, environment=environment)
    app.start()
    yield Served(app, server, ledger)
    app.stop()


@pytest.fixture
async def served(app_server: Served) -> AsyncIterator[Served]:
    """The app with no slot held, before and after."""
    app_server.ledger.path.write_text("")
    yield app_server
    Client.close_all()
    assert app_server.app.alive
    await freed(app_server)


async def freed(served: Served) -> None:
    """Wait until every slot was released: one that only expired would still be on the server."""
    await until_async(lambda: slots_on_server(served.server) == 0)


async def test_a_response_frees_its_slot(served: Served) -> None:
    """A slot is held while the handler works and free once it has answered."""
    client = await served.connect()
    client.send("GET", "/run/0.3")
    await until_async(lambda: served.held() == 1)
    assert (await client.answer()).status == 200
    await freed(served)


async def test_a_request_that_outlives_its_lease_keeps_its_slot(served: Served) -> None:
    """With a lease of 1 s a handler of 4 s holds its slot all the time, and the lease is renewed."""
    client = await served.connect()
    client.send("GET", "/run/4.0")
    await until_async(lambda: served.held() == 1)
    left: list[float] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            while True:
                left += expiries(served.server)
                assert served.held() == 1
                await asyncio.sleep(0.05)
    assert max(left) <= 1.0
    assert (await client.answer()).status == 200
    await freed(served)


@pytest.mark.parametrize("when", ["before", "middle", "background", "base", "cancelled"])
async def test_a_handler_that_raises_frees_its_slot(served: Served, when: str) -> None:
    """Before the response, in the middle of it, in a background task, or what is not an Exception."""
    client = await served.connect()
    client.send("GET", f"/fail/{when}")
    with contextlib.suppress(asyncio.IncompleteReadError):
        status, _ = await client.head()
        assert status == {"middle": 200, "background": 200}.get(when, 500)
    await freed(served)


async def test_a_background_task_keeps_the_slot(served: Served) -> None:
    """The answer is there at once, and the slot is free when the app has returned."""
    answer = await ask(served.port, "GET", "/background/2.0")
    assert answer.status == 200
    await until_async(lambda: served.ledger.entered() == 1)
    assert served.held() == 1
    await freed(served)
    assert served.ledger.inside() == 0


@pytest.mark.parametrize("cut", [Client.reset, Client.close], ids=["RST", "FIN"])
async def test_a_client_that_hangs_up_frees_nothing_while_the_handler_works(
    served: Served, cut: Callable[[Client], None]
) -> None:
    """Freeing on disconnect would let a caller run any number of jobs: connect, reset, repeat."""
    for number in range(5):
        client = await served.connect()
        client.send("GET", "/run/4.0")
        await until_async(partial(served.has_entered, number + 1))
        cut(client)
    for _ in range(5):
        assert (await ask(served.port, "GET", "/run/1.5")).status == 429
    assert served.ledger.inside() == served.held() == 5
    await until_async(lambda: served.ledger.inside() == 0)
    await freed(served)
    assert served.ledger.peak() == 5


@pytest.mark.parametrize("cut", [Client.reset, Client.close], ids=["RST", "FIN"])
async def test_a_client_that_hangs_up_on_a_stream_frees_its_slot(
    served: Served, cut: Callable[[Client], None]
) -> None:
    """A stream of 100 s is over for the app when its client is gone, and so is its slot."""
    client = await served.connect()
    client.send("GET", "/stream?number=1000&size=10&pause=0.1")
    await client.head()
    await client.reader.readuntil(b"data: ")
    assert served.held() == 1
    cut(client)
    await freed(served)
    assert served.ledger.inside() == 0


async def test_a_stream_holds_its_slot_to_the_last_chunk(served: Served) -> None:
    """Server-sent events, longer than the lease, hold one slot from the first event to the last."""
    client = await served.connect()
    client.send("GET", "/stream?number=15&size=10&pause=0.1")
    await client.head()
    for _ in range(15):
        await client.reader.readuntil(b"data: ")
        assert served.held() == 1
    await client.reader.readuntil(b"0\r\n\r\n")
    await freed(served)


async def test_a_slow_reader_keeps_its_slot(served: Served) -> None:
    """While a client doesn't read, the app waits and its lease is renewed; it ends with the client."""
    client = await served.connect(buffer=4096)
    client.send("GET", "/stream?number=400&size=100000&pause=0")
    await client.head()
    for _ in range(15):
        await asyncio.sleep(0.1)
        assert served.held() == 1
    client.reset()
    await freed(served)


async def test_a_generator_that_never_awaits_ends_with_its_client(served: Served) -> None:
    """It would turn for ever once the client is gone, and the worker with it: our send lets the loop turn."""
    client = await served.connect()
    client.send("GET", "/spin")
    await client.head()
    client.reset()
    async with asyncio.timeout(5):
        assert (await ask(served.port, "GET", "/who")).status == 200
    await freed(served)
    assert served.ledger.inside() == 0


async def test_a_websocket_holds_a_slot_as_long_as_it_is_open(served: Served) -> None:
    """A connection holds one slot beyond its lease, whatever it sends, and frees it when it is closed."""
    async with websockets.connect(f"ws://127.0.0.1:{served.port}/socket") as socket:
        for _ in range(13):
            await socket.send("hello")
            assert await socket.recv() == "hello"
            assert served.held() == 1
            await asyncio.sleep(0.1)
    await freed(served)


async def test_a_websocket_whose_handler_raises_frees_its_slot(served: Served) -> None:
    """An error after the handshake ends the connection and the slot."""
    async with websockets.connect(f"ws://127.0.0.1:{served.port}/socket") as socket:
        await socket.send("boom")
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
    await freed(served)


async def test_a_websocket_cut_without_a_word_frees_its_slot(served: Served) -> None:
    """The connection is reset in the middle of it."""
    socket = await websockets.connect(f"ws://127.0.0.1:{served.port}/socket")
    await until_async(lambda: served.held() == 1)
    socket.transport.abort()
    await freed(served)


async def test_a_websocket_without_a_free_slot_is_refused_with_429(served: Served) -> None:
    """The refusal comes as an answer to the handshake, with its body and when to come back."""
    url = f"ws://127.0.0.1:{served.port}/socket"
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(websockets.connect(url, additional_headers={"X-API-Key": "a"}))
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(url, additional_headers={"X-API-Key": "a"})
        assert refused.value.response.status_code == 429
        assert b"CONCURRENT_LIMIT_EXCEEDED" in refused.value.response.body
        assert int(refused.value.response.headers["Retry-After"]) in (1, 2, 3)
        assert served.held() == 5
    await freed(served)


async def test_random_hang_ups_leave_nothing_behind(served: Served, tmp_path: Path) -> None:
    """200 requests cut at any moment, by FIN and RST: no slot stays and never more than 5 ran."""
    paths = ["/run/0.02", "/stream?number=5&size=100&pause=0.01", "/background/0.02", "/fail/before"]

    async def one(n: int) -> None:
        client = await served.connect()
        client.send("GET", paths[n % len(paths)])
        await asyncio.sleep(n % 17 / 1000)
        (client.reset if n % 2 else client.close)()

    for start in range(0, 200, 20):
        await asyncio.gather(*[one(n) for n in range(start, start + 20)])
    await freed(served)
    assert served.ledger.inside() == 0
    assert served.ledger.peak() <= 5
