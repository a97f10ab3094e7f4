"""Live keys: set in the backend, known to every process soon, and kept through whatever happens to it."""

import asyncio
import gc
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import KeyEntry, Limiter, RateLimitMiddleware, Settings, SettingsError
from ratelimit_mw._internal.backends import open_key_store
from ratelimit_mw._internal.live import registry, reload
from ratelimit_mw._internal.live.key_entries import read_entry, write_entry
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.limits import Slots
from ratelimit_mw._internal.policy.identity import key_partition
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.conftest import StartApp, StartServer
from tests.support.asgi import client_of, ok_app, settings_of, shown
from tests.support.live import traffic
from tests.support.servers import StoreServer
from tests.support.settings_files import written
from tests.support.slots import until_async
from tests.support.statuses import counted

pytestmark = pytest.mark.rerun

PLANS = """
[plans.pro]
requests = ["100/hour"]
concurrent = { limit = 9, unit = "prediction", lease = 20, max_hold = 40 }
spending = { daily = "5.00", monthly = "50.00", currency = "EUR", timezone = "Europe/Berlin", warn_at = 0.5 }
[plans.team]
requests = ["200/hour"]
share = "account"
[[keys]]
key = "listed"
plan = "pro"
account = "acme"
"""

K = hash_api_key(b"k", "")
LISTED = hash_api_key(b"listed", "")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and file are looked at more often than in earnest."""
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(reload, "POLL_SECONDS", 0.05)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Yield the log of the package."""
    with caplog.at_level(logging.INFO, "ratelimit_mw"):
        yield caplog


def about_keys(heard: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about live keys so far."""
    messages = [record.getMessage() for record in heard.records if record.levelno >= logging.WARNING]
    return [
        message for message in messages if "key" in message and "anybody who reads the backend" not in message
    ]


def settings_on(url: str, text: str = PLANS, **backend: Any) -> Settings:
    """Settings with these plans and a backend."""
    table = BackendSettings(url=SecretURL(url), **{"timeout": 5.0, **backend})
    return settings_of(text).model_copy(update={"backend": table})


def put(server: StoreServer, entries: Mapping[str, object], version: str = "x") -> None:
    """Write entries as another version of this package, or a careless operator, would."""
    with server.client() as client:
        for each, entry in entries.items():
            client.hset("ratelimit:{keys}", each, entry if isinstance(entry, str) else json.dumps(entry))
        client.set("ratelimit:{keys}:version", version)


def plan_of(limiter: Limiter, api_key: str) -> str:
    """The plan that a key has."""
    return limiter.engine.identity_of(api_key=api_key).plan


async def seen(limiter: Limiter, api_key: str, plan: str) -> None:
    """Wait until a key has this plan."""
    await until_async(lambda: plan_of(limiter, api_key) == plan)


# set, seen, removed -----------------------------------------------------------------------------


async def test_keys_are_set_and_removed_live(server_url: str) -> None:
    """A key that one process sets is in force in another one soon, until it is removed."""
    settings = settings_on(server_url)
    async with Limiter(settings) as one, Limiter(settings) as other:
        await one.engine.live.set_keys({K: KeyEntry("pro", account="bolt")})
        assert plan_of(one, "k") == "pro"
        await seen(other, "k", "pro")
        assert other.engine.identity_of(api_key="k").account == "bolt"
        await one.engine.live.remove_keys([K])
        assert plan_of(one, "k") == "default"
        await seen(other, "k", "default")


async def test_live_keys_come_before_listed_ones(server_url: str) -> None:
    """Registry first, then the file; a key that is removed is what the file says again."""
    async with Limiter(settings_on(server_url)) as limiter:
        assert limiter.engine.identity_of(api_key="listed").account == "acme"
        await limiter.engine.live.set_keys({LISTED: KeyEntry("default", concurrent=1)})
        identity = limiter.engine.identity_of(api_key="listed")
        assert (identity.plan, identity.account) == ("default", None)
        await limiter.engine.live.remove_keys([LISTED])
        assert plan_of(limiter, "listed") == "pro"


async def test_keys_are_known_from_the_first_request_on(redis_server: StoreServer) -> None:
    """Also where the server sends no lifespan events: a customer's first request has its own plan."""
    async with Limiter(settings_on(redis_server.url)) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro")})
    app = RateLimitMiddleware(ok_app(), settings=settings_on(redis_server.url))
    try:
        async with client_of(app, x_api_key="k") as client:
            answers = await asyncio.gather(*[client.get("/") for _ in range(5)])
        assert {shown(answer)[0] for answer in answers} == {"100"}
    finally:
        await app.limiter.close()


async def test_what_was_counted_is_kept_when_a_plan_changes(redis_server: StoreServer) -> None:
    """A count belongs to the caller: cutting its plan refuses at once what it has used up."""
    app = RateLimitMiddleware(ok_app(), settings=settings_on(redis_server.url))
    try:
        async with client_of(app, x_api_key="k") as client:
            await app.limiter.engine.live.set_keys({K: KeyEntry("pro", requests=["3/hour"])})
            assert [shown(await client.get("/"))[1] for _ in range(3)] == ["2", "1", "0"]
            await app.limiter.engine.live.set_keys({K: KeyEntry("pro")})
            assert shown(await client.get("/"))[:2] == ("100", "96")
            await app.limiter.engine.live.set_keys({K: KeyEntry("pro", requests=["2/hour"])})
            assert (await client.get("/")).status_code == 429
    finally:
        await app.limiter.close()


async def test_an_account_shares_its_counts_and_keeps_them_when_a_key_is_rotated(
    redis_server: StoreServer,
) -> None:
    """Keys of one account under share = "account" are one caller, an old key and its successor too."""
    new = hash_api_key(b"new", "")
    async with Limiter(settings_on(redis_server.url)) as limiter:
        entry = KeyEntry("team", account="bolt")
        await limiter.engine.live.set_keys({K: entry, new: entry})
        assert limiter.engine.identity_of(api_key="k").partition == "a:bolt"
        assert limiter.engine.identity_of(api_key="new").partition == "a:bolt"
        lease = await limiter.acquire(api_key="k")
        assert counted((await limiter.acquire(api_key="new")).decision.limits[0]) == 2
        assert lease.allowed


async def test_namespaces_have_their_own_keys(redis_server: StoreServer) -> None:
    """Two apps on one server don't see each other's keys."""
    async with (
        Limiter(settings_on(redis_server.url)) as one,
        Limiter(settings_on(redis_server.url, namespace="other")) as other,
    ):
        await one.engine.live.set_keys({K: KeyEntry("pro")})
        await asyncio.sleep(0.15)
        assert plan_of(other, "k") == "default"


async def test_thousands_of_keys_are_read(redis_server: StoreServer) -> None:
    """They come in pages, so that none takes the server long; a change of one is seen among them."""
    hashes = [hash_api_key(b"%d" % number, "") for number in range(3_000)]
    put(redis_server, {each: {"plan": "pro"} for each in hashes})
    async with Limiter(settings_on(redis_server.url)) as limiter:
        await until_async(lambda: len(limiter.engine.live.keys) == 3_000)
        assert plan_of(limiter, "2999") == "pro"
        put(redis_server, {hashes[7]: {"plan": "team", "account": "bolt"}}, version="y")
        await seen(limiter, "7", "team")


async def test_thousands_of_keys_are_set_beside_the_event_loop(redis_server: StoreServer) -> None:
    """No turn of the event loop grows with the number of keys that are set or removed."""
    turns: list[float] = []

    async def look() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            turns.append(time.thread_time() - before)

    keys = {f"sha256:{number:064x}": KeyEntry("pro", concurrent=1 + number % 9) for number in range(20_000)}
    gc.disable()  # whose pauses grow with everything there is
    try:
        async with Limiter(settings_on(redis_server.url)) as limiter:
            looking = asyncio.create_task(look())
            await limiter.engine.live.set_keys(keys)
            assert len(limiter.engine.live.rules.registered) == len(keys)
            await limiter.engine.live.remove_keys(keys)
            assert not limiter.engine.live.rules.registered
            looking.cancel()
    finally:
        gc.enable()
    assert max(turns) < 0.1


async def test_keys_are_kept_in_memory_without_a_shared_backend() -> None:
    """On the memory backend, live keys are the process's own."""
    async with Limiter(settings_of(PLANS)) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro")})
        assert plan_of(limiter, "k") == "pro"
        assert set(limiter.engine.live.keys) == {K}
        await limiter.engine.live.remove_keys([K])
        assert plan_of(limiter, "k") == "default"


async def test_keys_never_expire_and_are_no_secret(redis_server: StoreServer) -> None:
    """They are configuration, not counters, and hold hashes only."""
    async with Limiter(settings_on(redis_server.url)) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro")})
    with redis_server.client() as client:
        keys = sorted(client.keys("*keys*"))
        assert keys == [b"ratelimit:{keys}", b"ratelimit:{keys}:changes", b"ratelimit:{keys}:version"]
        assert [client.ttl(key) for key in keys] == [-1, -1, -1]
        assert client.hgetall("ratelimit:{keys}") == {K.encode(): b'{"plan":"pro"}'}


# outages ----------------------------------------------------------------------------------------


async def test_keys_are_kept_through_an_outage(start_server: StartServer, tmp_path: Path) -> None:
    """While the backend is away every key keeps its plan, also when the settings change meanwhile."""
    server = start_server("redis")
    file = written(tmp_path / "s.toml", f'backend = {{ url = "{server.url}", timeout = 0.2 }}\n{PLANS}')
    async with Limiter.from_settings(file) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro")})
        server.kill()
        await asyncio.sleep(0.3)
        assert plan_of(limiter, "k") == "pro"
        written(file, file_text(file).replace("100/hour", "90/hour"))
        await until_async(lambda: limiter.settings.plans["pro"].requests[0].quota == 90)
        assert plan_of(limiter, "k") == "pro"
        lease = await limiter.acquire(api_key="k")
        assert lease.decision.limits[0].counter.limit.text == "90/hour"  # type: ignore[union-attr]


def file_text(file: Path) -> str:
    """Return the text of the file."""
    return file.read_text()


async def test_keys_are_kept_when_the_backend_loses_its_data(
    start_server: StartServer, heard: pytest.LogCaptureFixture
) -> None:
    """A server that comes back empty downgrades nobody; the first key set on it is the registry again."""
    server = start_server("redis")
    async with Limiter(settings_on(server.url)) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro")})
        server.restart()
        await until_async(
            lambda: any("lost its live keys; the 1 known" in text for text in about_keys(heard))
        )
        assert plan_of(limiter, "k") == "pro"
        await asyncio.sleep(0.2)
        assert len([text for text in about_keys(heard) if "lost its live keys" in text]) == 1
        put(server, {LISTED: {"plan": "default"}})
        await seen(limiter, "listed", "default")
        assert plan_of(limiter, "k") == "default"


async def test_a_backend_that_is_away_at_the_start_is_read_later(
    start_server: StartServer, heard: pytest.LogCaptureFixture
) -> None:
    """It prevents no start, and its keys are known once it is there."""
    server = start_server("valkey")
    put(server, {K: {"plan": "pro"}})
    server.stop_signal()
    limiter = Limiter(settings_on(server.url, timeout=0.2))
    start = asyncio.get_running_loop().time()
    await limiter.open()
    try:
        assert asyncio.get_running_loop().time() - start < 2
        assert plan_of(limiter, "k") == "default"
        server.continue_signal()
        await seen(limiter, "k", "pro")
        assert about_keys(heard) == []
    finally:
        await limiter.close()


async def test_a_backend_that_refuses_only_this_is_reported_once(
    start_server: StartServer, heard: pytest.LogCaptureFixture
) -> None:
    """Rights that lack the registry's keys or commands are named, once."""
    server = start_server("valkey")
    put(server, {K: {"plan": "pro"}})
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-hscan")
    async with Limiter(settings_on(server.url)) as limiter:
        await until_async(lambda: about_keys(heard))
        await asyncio.sleep(0.2)
        (said,) = about_keys(heard)
        assert "hscan" in said
        assert plan_of(limiter, "k") == "default"


# entries that don't fit -------------------------------------------------------------------------

WRONG: dict[str, tuple[object, str]] = {
    "a plan that doesn't exist": ({"plan": "prx"}, "plan: there is no plan 'prx'"),
    "no JSON": ("nonsense", "it is not JSON"),
    "no object": ([1], "it is not an entry of a key: it has no plan"),
    "no plan": ({"account": "acme"}, "it is not an entry of a key: it has no plan"),
    "an unknown name": ({"plan": "pro", "quota": 5}, "it has an unknown name 'quota'"),
    "a plan of another type": ({"plan": 5}, "plan: is a whole number; expected a string"),
    "rates of another type": ({"plan": "pro", "requests": "5/hour"}, "it has `requests` that are not a list"),
    "a rate that is none": ({"plan": "pro", "requests": ["5/fortnight"]}, "requests[0]: '5/fortnight'"),
    "no slots": ({"plan": "pro", "concurrent": 0}, "concurrent.limit: 0 is out of range"),
    "money as a float": ({"plan": "pro", "daily": 1.5}, "spending.daily: is a float"),
    "a month below a day": (
        {"plan": "pro", "daily": "5", "monthly": "4"},
        "spending.monthly: '4' is less than daily",
    ),
    "no account": ({"plan": "team"}, "account: is missing"),
    "limits of its own": (
        {"plan": "team", "account": "bolt", "concurrent": 5},
        "concurrent: is set, though plan 'team' has share = \"account\"",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_an_entry_that_does_not_fit_is_reported_once_and_skipped(
    redis_server: StoreServer, heard: pytest.LogCaptureFixture, case: str
) -> None:
    """The key counts as if it were not set; every other entry is in force."""
    entry, complaint = WRONG[case]
    put(redis_server, {K: entry, LISTED: {"plan": "default"}})
    async with Limiter(settings_on(redis_server.url)) as limiter:
        assert plan_of(limiter, "k") == "default"
        assert plan_of(limiter, "listed") == "default"
        put(redis_server, {}, version="y")
        await asyncio.sleep(0.2)
        (said,) = about_keys(heard)
        assert said.startswith(f"key {key_partition(K)} is set live, but ignored: {complaint}")


async def test_a_hash_of_the_other_kind_is_reported(
    redis_server: StoreServer, heard: pytest.LogCaptureFixture
) -> None:
    """No request's key can ever have it. What is not a hash is not shown, as it may be a key in the clear."""
    put(redis_server, {f"hmac-sha256:{'0' * 64}": {"plan": "pro"}, "strange": {"plan": "pro"}})
    async with Limiter(settings_on(redis_server.url)):
        said = sorted(about_keys(heard))
    assert said[0].startswith("key (not a hash) is set live, but ignored: hash: is not a hash")
    assert "a hash of the wrong kind" in said[1]


async def test_a_plan_that_comes_and_goes(
    redis_server: StoreServer, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    """Entries are checked again when the settings change; the file's entry serves meanwhile."""
    head = f'backend = {{ url = "{redis_server.url}", timeout = 5 }}\n'
    file = written(tmp_path / "s.toml", head + PLANS)
    async with Limiter.from_settings(file) as limiter:
        put(redis_server, {LISTED: {"plan": "gold"}})
        await until_async(lambda: about_keys(heard))
        assert plan_of(limiter, "listed") == "pro"
        written(file, head + PLANS + '[plans.gold]\nrequests = ["7/hour"]\n')
        await seen(limiter, "listed", "gold")
        written(file, head + PLANS)
        await seen(limiter, "listed", "pro")
        assert len(about_keys(heard)) == 2


async def test_setting_is_checked_as_the_file_is(redis_server: StoreServer) -> None:
    """All is set or nothing; contradictions to keys of the file and of the registry are errors."""
    text = PLANS + '[[keys]]\nkey = "t"\nplan = "team"\naccount = "bolt"\n'
    other = hash_api_key(b"other", "")
    async with Limiter(settings_on(redis_server.url, text)) as limiter:
        with pytest.raises(SettingsError, match="did you mean 'pro'"):
            await limiter.engine.live.set_keys({other: KeyEntry("pro"), K: KeyEntry("prp")})
        with pytest.raises(SettingsError, match="account 'bolt' has keys of plan 'team', too"):
            await limiter.engine.live.set_keys({K: KeyEntry("pro", account="bolt")})
        assert limiter.engine.live.keys == {}
        await limiter.engine.live.set_keys(
            {K: KeyEntry("team", account="core"), other: KeyEntry("team", "core")}
        )
        with pytest.raises(SettingsError, match="account 'core' has keys of plan 'team', too"):
            await limiter.engine.live.set_keys({K: KeyEntry("pro", account="core")})
        await limiter.engine.live.set_keys({K: KeyEntry("pro", "core"), other: KeyEntry("pro", "core")})
        assert (plan_of(limiter, "k"), plan_of(limiter, "other")) == ("pro", "pro")


# entries ----------------------------------------------------------------------------------------


async def test_the_rest_of_a_limit_is_the_plans() -> None:
    """A number of slots keeps the plan's unit and lease, an amount its currency and time zone."""
    async with Limiter(settings_of(PLANS)) as limiter:
        await limiter.engine.live.set_keys({K: KeyEntry("pro", concurrent=3, daily="1.00")})
        key = limiter.engine.identity_of(api_key="k").limits
    assert key is not None
    assert key.requests is None
    assert key.concurrent == Slots(3, "prediction", 20.0, 40.0)
    assert key.spending is not None
    budget = key.spending.budget
    assert (budget.daily, budget.monthly) == (1_000_000, None)
    assert (budget.currency, budget.timezone, budget.warn_at) == ("EUR", "Europe/Berlin", 0.5)


@pytest.mark.parametrize(
    "entry",
    [
        KeyEntry("pro"),
        KeyEntry("pröfi", "acmé", ("5/hour", "1/second"), 3, "1.00", "10"),
        KeyEntry("pro", requests=()),
    ],
)
def test_entries_are_read_as_they_were_written(entry: KeyEntry) -> None:
    """An entry that was written is read again as it was."""
    assert read_entry(write_entry(entry)) == entry


async def test_a_write_is_never_half_seen(server_url: str) -> None:
    """Keys that are set together come together, whenever another process looks."""
    store = open_key_store(BackendSettings(url=SecretURL(server_url)))
    hashes = [hash_api_key(b"%d" % number, "") for number in range(50)]

    async def repeat(step: Callable[[int], Awaitable[object]]) -> None:
        for round_ in range(30):
            await step(round_)

    async def write(round_: int) -> None:
        await store.write(dict.fromkeys(hashes, b"%d" % round_))

    async def look(_: int) -> None:
        assert len(set((await store.entries()).values())) <= 1

    await asyncio.gather(repeat(write), repeat(look))
    await store.close()


async def test_other_workers_see_it_within_two_seconds(
    start_app: StartApp, tmp_path: Path, valkey_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers under real traffic go by a key's new plan, and by its removal, on time."""
    file = written(tmp_path / "s.toml", '[plans.default]\nrequests = ["5000/hour"]\n' + PLANS)
    environment = {"RATELIMIT_SETTINGS": str(file), "RATELIMIT_BACKEND__URL": valkey_server.url}
    environment["RATELIMIT_BACKEND__TIMEOUT"] = "5"
    app = start_app("tests.support.live_app:app", workers=2, environment=environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    async with Limiter.from_settings() as limiter, traffic(app.url, "k") as flow:
        await flow.until_limit("5000", workers=2)
        await limiter.engine.live.set_keys({K: KeyEntry("pro", requests=["6000/hour"])})
        assert await flow.until_limit("6000", workers=2) < 2
        await limiter.engine.live.remove_keys([K])
        assert await flow.until_limit("5000", workers=2) < 2
