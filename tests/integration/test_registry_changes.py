"""Changes of live keys: workers read what has changed alone, and everything only where that isn't known."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from ratelimit_mw import KeyEntry, Limiter, Settings
from ratelimit_mw._internal.backends import key_store, open_key_store
from ratelimit_mw._internal.backends.key_store import KeyStore
from ratelimit_mw._internal.live import registry
from ratelimit_mw._internal.live.registry import Registry
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.conftest import StartServer
from tests.support.servers import StoreServer
from tests.support.slots import until_async

pytestmark = pytest.mark.rerun

HASHES = [f"sha256:{number:064x}" for number in range(3_000)]
A, B = HASHES[:2]
PRO, DEFAULT = KeyEntry("pro"), KeyEntry("default")
SETTINGS = Settings.model_validate({"plans": {"pro": {"requests": ["9/minute"]}}})


def open_store(url: str) -> KeyStore:
    """A store of live keys on this server."""
    return open_key_store(BackendSettings(url=SecretURL(url)), timeout=10)


@asynccontextmanager
async def registries(url: str, number: int = 2) -> AsyncIterator[list[Registry]]:
    """Registries as processes of their own would have them."""
    made = [Registry(open_store(url)) for _ in range(number)]
    try:
        yield made
    finally:
        for each in made:
            await each.close()


def whole_reads(server: StoreServer) -> int:
    """Count the pages of entries that the server was asked for since its statistics were cleared."""
    with server.client() as client:
        return int(client.info("commandstats").get("cmdstat_hscan", {}).get("calls", 0))


def forget_reads(server: StoreServer) -> None:
    """Clear the statistics of the server."""
    with server.client() as client:
        client.config_resetstat()


def put(server: StoreServer, name: str, entry: str, version: str) -> None:
    """Write an entry as version 0.1 of this package did, which logged nothing."""
    with server.client() as client:
        client.hset("ratelimit:{keys}", name, entry)
        client.set("ratelimit:{keys}:version", version)


# what is read -----------------------------------------------------------------------------------


async def test_one_change_among_thousands_is_read_alone(server: StoreServer) -> None:
    """A worker that knows all keys asks for those that were set or removed since, and for no others."""
    async with registries(server.url) as (one, other):
        await one.set(dict.fromkeys(HASHES, DEFAULT), SETTINGS)
        assert await other.read()
        forget_reads(server)
        await one.set({A: PRO}, SETTINGS)
        await one.remove([B])
        assert await other.read()
        assert not await other.read()
        assert whole_reads(server) == 0
        assert (other.entries[A], other.entries.get(B), len(other.entries)) == (PRO, None, 2_999)


async def test_a_worker_that_was_away_catches_up_page_by_page(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the log is read while it goes back far enough; the last change of each key counts."""
    monkeypatch.setattr(key_store, "READ_PAGE", 3)
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        await other.read()
        forget_reads(server)
        for number in range(5):
            await one.set({A: DEFAULT, **dict.fromkeys(HASHES[10 * number :][2:9], PRO)}, SETTINGS)
            await one.set({A: PRO}, SETTINGS)
        await other.read()
        assert whole_reads(server) == 0
        assert dict(other.entries) == dict(one.entries)
        assert other.entries[A] == PRO


@pytest.mark.parametrize("changes", [1, 12])
async def test_a_gap_in_the_log_has_everything_read(
    server: StoreServer, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is bounded. Who is further behind, or meets a change larger than it, reads all keys."""
    monkeypatch.setattr(key_store, "LOGGED", 10)
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT, B: DEFAULT}, SETTINGS)
        await other.read()
        forget_reads(server)
        if changes == 1:
            await one.set(dict.fromkeys(HASHES[2:20], PRO), SETTINGS)
        for number in range(changes):
            await one.set({HASHES[number]: PRO}, SETTINGS)
        await one.remove([B])
        await other.read()
        assert whole_reads(server) > 0
        assert dict(other.entries) == dict(one.entries)
        with server.client() as client:
            assert client.zcard("ratelimit:{keys}:changes") <= 10
        forget_reads(server)
        await one.set({A: DEFAULT}, SETTINGS)
        await other.read()
        assert (whole_reads(server), other.entries[A]) == (0, DEFAULT)


async def test_changes_without_the_log_are_not_missed(server: StoreServer) -> None:
    """A fleet may have writers of version 0.1: what these set is read, also if others set more since."""
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        await other.read()
        put(server, B, '{"plan":"pro"}', "an old one's")
        await one.set({A: PRO}, SETTINGS)
        await other.read()
        assert dict(other.entries) == {A: PRO, B: PRO}
        put(server, B, '{"plan":"default"}', "another old one's")
        await other.read()
        assert other.entries[B] == DEFAULT
        put(server, B, '{"plan":"pro"}', "the next one")
        await other.read()
        assert other.entries[B] == PRO


async def test_a_server_with_another_history_is_read_whole(start_server: StartServer) -> None:
    """After a fail-over to a replica that lacked the latest changes, none of those is believed in."""
    server = start_server("redis")
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        with server.client() as client:
            kept = {key: client.dump(key) for key in client.keys("ratelimit:*")}
        await one.set({A: PRO, B: PRO}, SETTINGS)
        await other.read()
        with server.client() as client:
            client.flushall()
            for key, data in kept.items():
                client.restore(key, 0, data)
        await one.set({HASHES[2]: PRO}, SETTINGS)
        await other.read()
        assert dict(other.entries) == dict(one.entries) == {A: DEFAULT, HASHES[2]: PRO}


@pytest.mark.parametrize("damage", ["another type", "nonsense", "gone"])
async def test_a_damaged_log_is_begun_anew(server: StoreServer, damage: str) -> None:
    """Whatever has become of the log, a change is made, seen by all, and logged again."""
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        await other.read()
        with server.client() as client:
            client.delete("ratelimit:{keys}:changes")
            if damage == "another type":
                client.set("ratelimit:{keys}:changes", "x")
            if damage == "nonsense":
                client.zadd("ratelimit:{keys}:changes", {"nonsense": 1.5})
        for plan in (PRO, DEFAULT, PRO):
            await one.set({A: plan}, SETTINGS)
            await other.read()
            assert other.entries[A] == plan


async def test_a_change_without_memory_for_it_is_refused_whole(start_server: StartServer) -> None:
    """A server that is full does nothing of a change; once there is room, the next one is logged as ever."""
    server = start_server("redis")
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT, B: DEFAULT}, SETTINGS)
        await other.read()
        with server.client() as client:
            client.config_set("maxmemory", "1")
            try:
                with pytest.raises(BackendError):
                    await one.set({A: PRO, B: PRO}, SETTINGS)
            finally:
                client.config_set("maxmemory", "0")
        assert not await other.read()
        await one.set({B: PRO}, SETTINGS)
        await other.read()
        assert dict(other.entries) == {A: DEFAULT, B: PRO}


async def test_a_user_without_hget_changes_keys_all_the_same(start_server: StartServer) -> None:
    """The users' file of version 0.1 lacks that right: then all keys are read, as by that version."""
    server = start_server("valkey")
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        await other.read()
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-hget")
        forget_reads(server)
        await one.set({A: PRO}, SETTINGS)
        await other.read()
        assert other.entries[A] == PRO
        assert whole_reads(server) > 0


# whole changes, in time ---------------------------------------------------------------------------


async def test_a_change_is_seen_whole_or_not_at_all(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several writers at once, a reader has both keys of each change, by the log and without it."""
    monkeypatch.setattr(key_store, "READ_PAGE", 10)
    monkeypatch.setattr(key_store, "LOGGED", 40)
    pairs = [HASHES[number : number + 2] for number in range(0, 400, 2)]
    async with registries(server.url, 4) as (reader, *writers):
        await writers[0].set(dict.fromkeys(HASHES[:400], KeyEntry("default", label="0")), SETTINGS)
        writing = True

        async def write(writer: KeyStore) -> None:
            for number in range(60):
                pair = random.choice(pairs)
                text = b'{"plan":"pro","label":"%d"}' % number
                await writer.write(dict.fromkeys(pair, text if number % 3 else None))

        async def look() -> None:
            while writing:
                with suppress(BackendError):  # changed again and again: what was known is kept
                    await reader.read()
                seen = reader.entries
                for one, other in pairs if seen else ():
                    assert seen.get(one) == seen.get(other)

        looking = asyncio.create_task(look())
        await asyncio.gather(*[write(each._store) for each in writers])
        writing = False
        await looking
        await reader.read()
        await writers[0].read()
        assert dict(reader.entries) == dict(writers[0].entries)


async def test_event_loops_that_read_at_once_end_at_the_latest(server: StoreServer) -> None:
    """A slower reading of one event loop never takes back what another one has read since."""
    async with registries(server.url) as (one, other):
        await one.set({A: DEFAULT}, SETTINGS)
        for number in range(20):
            await one.set({A: KeyEntry("pro", label=str(number))}, SETTINGS)
            await asyncio.gather(*[other.read() for _ in range(5)])
            assert other.entries[A].label == str(number)


async def test_many_workers_read_everything_at_different_moments(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that have to read everything spread that over a second; few keys are read at once."""
    waits: list[float] = []

    def no_wait(_: float, most: float) -> float:
        waits.append(most)
        return 0.0

    monkeypatch.setattr(random, "uniform", no_wait)
    async with registries(server.url) as (one, other):
        assert not await other.poll()
        put(server, A, '{"plan":"pro"}', "1")
        assert await other.poll()  # the first time, when nothing is known, at once
        put(server, A, '{"plan":"pro"}', "2")
        assert await other.poll()
        await one.set(dict.fromkeys(HASHES, DEFAULT), SETTINGS)
        assert await other.poll()
        put(server, A, '{"plan":"pro"}', "3")
        assert await other.poll()
        assert waits == pytest.approx([0.0, 0.0001, 0.0001, 0.3])
        assert registry.POLL_SECONDS + registry.SPREAD_SECONDS < 2.0


async def test_workers_go_by_changes_from_the_log(
    redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans, removals and account contradictions from the log hold as those that are read whole."""
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.05)
    plans = {"team": {"requests": ["5/minute"], "share": "account"}, "crew": {"share": "account"}}
    backend = {"url": redis_server.url, "timeout": 5.0}
    settings = Settings.model_validate({"backend": backend, "plans": plans})
    async with Limiter(settings) as one, Limiter(settings) as other:

        def plans_of() -> list[str]:
            return [key.plan for key in other.engine.live.rules.registered.values()]

        await one.engine.live.set_keys({A: KeyEntry("team", account="acme"), B: KeyEntry("default")})
        await until_async(lambda: sorted(plans_of()) == ["default", "team"])
        with redis_server.client() as client:
            client.hset("ratelimit:{keys}", B, '{"plan":"crew","account":"acme"}')
        await one.engine.live.set_keys({HASHES[9]: KeyEntry("default")})  # which reads nothing of that
        await one.engine.live.set_keys({HASHES[9]: KeyEntry("team", account="acme")})
        await until_async(lambda: sorted(plans_of()) == ["default", "team", "team"])
        await one.engine.live.remove_keys([A, B])
        await until_async(lambda: plans_of() == ["team"])
