"""The `resolve=` hook: keys that the app's own database knows, remembered, and waited for briefly."""

import asyncio
import os
from collections.abc import Callable
from decimal import Decimal

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_mw import KeyEntry, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.live import resolve
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from tests.support.asgi import client_of, ok_app, settings_of, shown
from tests.support.slots import until_async

SETTINGS = """
[plans.default]
requests = ["10/hour"]
[plans.pro]
requests = ["100/hour"]
[plans.team]
requests = ["200/hour"]
share = "account"
[[keys]]
key = "listed"
plan = "team"
account = "acme"
"""


class Database:
    """An app's database of keys: counts look-ups, is slow, hangs or fails as a test wants."""

    def __init__(self, **entries: KeyEntry) -> None:
        self.entries: dict[str, KeyEntry | None] = dict(entries)
        self.asked: list[str] = []
        self.answered = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, api_key: str) -> KeyEntry | None:
        """Look a key up."""
        self.asked.append(api_key)
        await self.gate.wait()
        self.answered += 1
        if self.error is not None:
            raise self.error
        return self.entries.get(api_key)


class FakeTime:
    """The clock that the memory of look-ups goes by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds since whenever."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """A clock that stands still until a test moves it."""
    fake = FakeTime()
    monkeypatch.setattr(resolve, "time", fake)
    return fake


def app_with(database: Callable[..., object], text: str = SETTINGS) -> RateLimitMiddleware:
    """An app that looks keys up in this database."""
    return RateLimitMiddleware(ok_app(), limiter=Limiter(settings_of(text)), resolve=database)  # type: ignore[arg-type]


async def limit_of(app: RateLimitMiddleware, key: str) -> str | None:
    """The limit that a request with this key is told."""
    async with client_of(app, x_api_key=key) as client:
        return shown(await client.get("/"))[0]


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines about the hook."""
    return [each.getMessage() for each in caplog.records if "resolve=" in each.getMessage()]


# who is looked up -------------------------------------------------------------------------------


async def test_a_key_has_what_the_database_says() -> None:
    """Its plan, account and limits of its own; asked once for many requests."""
    database = Database(k=KeyEntry("pro", requests=["50/hour"]), t=KeyEntry("team", account="acme"))
    app = app_with(database)
    assert [await limit_of(app, "k") for _ in range(3)] == ["50"] * 3
    assert await limit_of(app, "t") == "200"
    assert app.limiter.settings.plans["team"].share == "account"
    assert database.asked == ["k", "t"]


async def test_an_unknown_key_follows_the_settings() -> None:
    """None from the hook is a key known nowhere; a caller without a key is not looked up at all."""
    database = Database()
    assert await limit_of(app_with(database), "k") == "10"
    anonymous = app_with(database, 'identity.unknown_keys = "anonymous"' + SETTINGS)
    assert await limit_of(anonymous, "k") == "20"
    async with client_of(anonymous) as client:
        assert shown(await client.get("/"))[0] == "20"
    assert database.asked == ["k", "k"]


async def test_listed_and_live_keys_come_first() -> None:
    """A key that the file or the registry knows is not asked for."""
    database = Database(listed=KeyEntry("pro"), live=KeyEntry("pro"))
    app = app_with(database)
    await app.limiter.engine.live.set_keys({hash_api_key(b"live", ""): KeyEntry("default")})
    assert [await limit_of(app, "listed"), await limit_of(app, "live")] == ["200", "10"]
    assert database.asked == []


async def test_the_key_is_given_as_it_was_sent() -> None:
    """The key is given as text, from which its very bytes can be had again."""
    database = Database()
    app = app_with(database)
    async with client_of(app) as client:
        for key in ("grün".encode(), b"\xff\xfe"):
            await client.get("/", headers=[(b"x-api-key", key)])
    assert [os.fsencode(key) for key in database.asked] == ["grün".encode(), b"\xff\xfe"]


async def test_a_limiter_looks_up_too() -> None:
    """`acquire` by API key knows what a request with that key would."""
    database = Database(k=KeyEntry("pro"))
    async with Limiter(settings_of(SETTINGS), resolve=database) as limiter:
        for api_key in ("k", b"k"):
            lease = await limiter.acquire(api_key=api_key)
            assert lease.decision.limits[0].counter.limit.text == "100/hour"  # type: ignore[union-attr]
        lease = await limiter.acquire(api_key="other")
        assert lease.decision.limits[0].counter.limit.text == "10/hour"  # type: ignore[union-attr]


# remembering ------------------------------------------------------------------------------------


async def test_an_entry_is_asked_for_again_after_its_time(clock: FakeTime) -> None:
    """Fresh for a minute; then it still serves while it is looked up, so that nobody waits."""
    database = Database(k=KeyEntry("pro"))
    app = app_with(database)
    assert await limit_of(app, "k") == "100"
    clock.now += 59
    assert await limit_of(app, "k") == "100"
    assert len(database.asked) == 1
    database.entries["k"] = KeyEntry("pro", requests=["70/hour"])
    database.gate.clear()
    clock.now += 2
    assert await limit_of(app, "k") == "100"
    database.gate.set()
    await asyncio.sleep(0)
    assert await limit_of(app, "k") == "70"
    assert len(database.asked) == 2


async def test_an_entry_long_past_its_time_is_waited_for(clock: FakeTime) -> None:
    """A caller who comes back after a while gets the entry of now, and a removed key is unknown."""
    database = Database(k=KeyEntry("pro"))
    app = app_with(database)
    assert await limit_of(app, "k") == "100"
    database.entries["k"] = None
    clock.now += 121
    assert await limit_of(app, "k") == "10"


async def test_a_miss_is_remembered_for_a_moment(clock: FakeTime) -> None:
    """A key that the database doesn't know is asked for again only after some seconds."""
    database = Database()
    app = app_with(database)
    assert [await limit_of(app, "k") for _ in range(3)] == ["10"] * 3
    assert len(database.asked) == 1
    database.entries["k"] = KeyEntry("pro")
    clock.now += 5
    assert await limit_of(app, "k") == "100"


async def test_settings_that_change_hold_for_remembered_entries() -> None:
    """An entry is kept, and read anew under other settings."""
    database = Database(k=KeyEntry("pro"))
    app = app_with(database)
    assert await limit_of(app, "k") == "100"
    app.limiter.apply(settings_of(SETTINGS.replace("100/hour", "90/hour")))
    assert await limit_of(app, "k") == "90"
    app.limiter.apply(settings_of(SETTINGS.replace("plans.pro", "plans.gone")))
    assert await limit_of(app, "k") == "10"
    assert len(database.asked) == 1


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys come, only so many are remembered; invented ones push out no real one."""
    monkeypatch.setattr(resolve, "MAX_FOUND", 3)
    monkeypatch.setattr(resolve, "MAX_MISSED", 4)
    database = Database(**{f"k{number}": KeyEntry("pro") for number in range(5)})
    app = app_with(database)
    for number in range(3):
        await limit_of(app, f"k{number}")
    for number in range(20):
        await limit_of(app, f"invented{number}")
    database.asked.clear()
    assert [await limit_of(app, f"k{number}") for number in range(3)] == ["100"] * 3
    assert database.asked == []
    assert len(app.limiter.engine.live.resolver._missed) == 4  # type: ignore[union-attr]
    await limit_of(app, "k3")
    await limit_of(app, "k0")
    assert database.asked == ["k3", "k0"]


# failing ----------------------------------------------------------------------------------------


async def test_a_failing_database_leaves_what_is_known(
    clock: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    """Known keys keep their last entry, others are unknown; asked again later; reported once a minute."""
    database = Database(k=KeyEntry("pro"))
    app = app_with(database)
    await limit_of(app, "k")
    database.error = ConnectionError("no route for key k-secret")
    clock.now += 500
    assert [await limit_of(app, "k"), await limit_of(app, "k-secret")] == ["100", "10"]
    assert len(database.asked) == 3
    assert [await limit_of(app, "k"), await limit_of(app, "k-secret")] == ["100", "10"]
    assert len(database.asked) == 3
    (said,) = failures(caplog)
    assert said.startswith("resolve= failed: ConnectionError at ")
    assert "k-secret" not in caplog.text
    database.error = None
    database.entries["k-secret"] = KeyEntry("pro")
    clock.now += 5
    assert await limit_of(app, "k-secret") == "100"
    assert len(failures(caplog)) == 1


async def test_no_request_waits_longer_than_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that hangs, even one that can't be cancelled, holds a request for so long and no longer."""
    monkeypatch.setattr(resolve, "TIME_LIMIT", 0.1)
    over = asyncio.Event()

    async def hang(api_key: str) -> KeyEntry | None:
        if api_key == "polite":
            await asyncio.sleep(60)
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue
        return None

    app = app_with(hang)
    loop = asyncio.get_running_loop()
    for key in ("polite", "stubborn"):
        start = loop.time()
        assert await limit_of(app, key) == "10"
        assert 0.05 < loop.time() - start < 10
    over.set()
    assert failures(caplog)[0] == "resolve= failed: no answer within 0.1 s"
    await app.limiter.close()


async def test_requests_of_one_key_share_a_look_up() -> None:
    """However many come at once, the database is asked once; one that is cancelled takes nobody with it."""
    database = Database(k=KeyEntry("pro"))
    database.gate.clear()
    app = app_with(database)
    requests = [asyncio.create_task(limit_of(app, "k")) for _ in range(20)]
    await until_async(lambda: database.asked)
    requests[0].cancel()
    await asyncio.sleep(0.01)
    database.gate.set()
    assert await asyncio.gather(*requests[1:]) == ["100"] * 19
    assert database.asked == ["k"]


async def test_a_flood_of_invented_keys_is_bounded(clock: FakeTime, caplog: pytest.LogCaptureFixture) -> None:
    """So many look-ups at once and no more; keys known from before are looked up all the same."""
    database = Database(k=KeyEntry("pro"))
    app = app_with(database)
    await limit_of(app, "k")
    database.gate.clear()
    flood = [asyncio.create_task(limit_of(app, f"invented{number}")) for number in range(200)]
    await until_async(lambda: len(database.asked) == 1 + resolve.MAX_STRANGERS)
    assert await limit_of(app, "one more") == "10"
    assert "one more" not in database.asked
    clock.now += 61
    assert await limit_of(app, "k") == "100"
    await until_async(lambda: database.asked[-1] == "k")
    database.gate.set()
    assert await asyncio.gather(*flood) == ["10"] * 200
    assert len(database.asked) == 2 + resolve.MAX_STRANGERS
    assert failures(caplog) == [f"resolve= failed: more than {resolve.MAX_STRANGERS} look-ups at once"]
    await until_async(lambda: database.answered == len(database.asked))
    await asyncio.sleep(0)  # then the last look-up has ended
    assert await limit_of(app, "afterwards") == "10"
    assert database.asked[-1] == "afterwards"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("pro", "it returned str, neither KeyEntry nor None"),
        (KeyEntry("prp"), "plan: there is no plan 'prp'"),
        (KeyEntry("team"), "account: is missing"),
        (KeyEntry("pro", requests=["5/fortnight"]), "requests[0]: '5/fortnight' is not a rate"),
        (KeyEntry("pro", daily=Decimal("NaN")), "spending.daily"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_reported(
    answer: object, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The key is unknown then, and the log says why."""

    async def nonsense(api_key: str) -> object:
        return answer

    assert await limit_of(app_with(nonsense), "k") == "10"
    (said,) = failures(caplog)
    assert complaint in said


async def test_closing_ends_the_look_ups(caplog: pytest.LogCaptureFixture) -> None:
    """A request that waits for one goes on as with an unknown key."""
    database = Database(k=KeyEntry("pro"))
    database.gate.clear()
    app = app_with(database)
    request = asyncio.create_task(limit_of(app, "k"))
    await until_async(lambda: database.asked)
    await app.limiter.close()
    assert await request == "10"
    assert caplog.records == []


async def test_without_a_hook_nothing_is_awaited() -> None:
    """On the memory backend a request is then decided in one turn of the event loop."""
    app = app_with(Database(), SETTINGS)
    app.limiter.engine.live.resolver = None
    turns = 0

    async def serve(request: Request) -> Response:
        return PlainTextResponse(str(turns))

    limited = RateLimitMiddleware(Starlette(routes=[Route("/", serve)]), limiter=app.limiter)
    async with client_of(limited, x_api_key="k") as client:
        await client.get("/")

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        bare = httpx.ASGITransport(Starlette(routes=[Route("/", serve)]))
        async with httpx.AsyncClient(transport=bare, base_url="http://app") as other:
            turns = 0
            without = int((await other.get("/")).text)
        turns = 0
        assert int((await client.get("/")).text) == without
        ticking.cancel()
