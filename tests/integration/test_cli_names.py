"""Callers by the text that is shown of them: every command takes it, or the beginning of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Identity, KeyEntry, Limiter
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import key_partition
from tests.support.commands import Commands
from tests.support.live import stored_keys
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

SEEN, LISTED, FIRST, SECOND = (hash_api_key(key, "") for key in (b"seen", b"listed", b"first", b"second"))
SEEN_NAME, LISTED_NAME, FIRST_NAME = (key_partition(each) for each in (SEEN, LISTED, FIRST))


@pytest.fixture
def commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> Callable[..., Any]:
    """Commands on the file, each run as a process of its own would: in no event loop."""
    monkeypatch.setenv("RATELIMIT_SETTINGS", file)
    commands = Commands(capsys)

    async def run(kind: str, *arguments: str, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(commands, kind), *arguments, **options)

    return run


@pytest.fixture
def file(tmp_path: Path, redis_server: StoreServer) -> str:
    """A settings file with a real Redis, a listed key and an account whose keys share their counts."""
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        [plans.default]
        requests = ["10/minute"]
        [plans.pro]
        requests = ["20/minute"]
        [plans.team]
        requests = ["30/minute"]
        share = "account"
        [[keys]]
        key = "listed"
        plan = "pro"
        label = "Acme, batch"
        [[keys]]
        key = "apart-1"
        plan = "pro"
        account = "apart"
        [[keys]]
        key = "apart-2"
        plan = "pro"
        account = "apart"
        [[keys]]
        key = "first"
        plan = "team"
        account = "bolt"
        [[keys]]
        key = "second"
        plan = "team"
        account = "bolt"
    """
    return str(written(tmp_path / "s.toml", text))


@pytest.fixture
async def limiter(file: str) -> AsyncIterator[Limiter]:
    """A worker that has served one request of each kind of caller and told of it."""
    async with Limiter.from_settings(file) as limiter:
        for key in ("seen", "listed", "first"):
            await (await limiter.acquire(api_key=key)).release()
        await (await limiter.acquire(address="192.0.2.7")).release()
        await limiter.engine.reporter.report()
        yield limiter


async def used(commands: Any, *named: str) -> tuple[str, int]:
    """The caller whom `show` finds, and how much of its first limit it has used."""
    (caller,) = (await commands("json", "show", *named))["callers"]
    return caller["partition"], caller["limits"][0]["used"]


@pytest.mark.usefixtures("limiter")
async def test_a_caller_is_found_by_what_top_shows_of_it(commands: Any) -> None:
    """Whole names, beginnings of six digits or more, and shortened names as a page shows them."""
    shown = {caller["caller"] for caller in (await commands("json", "top"))["callers"]}
    assert {SEEN_NAME, LISTED_NAME, "a:bolt"} <= shown
    for text in (SEEN_NAME, SEEN_NAME[:8], SEEN_NAME[:8].upper().replace("K:", "k:"), f"{SEEN_NAME[:12]}…"):
        assert await used(commands, text) == (SEEN_NAME, 1)
        assert await used(commands, "--key", text) == (SEEN_NAME, 1)
    assert await used(commands, "a:bolt") == await used(commands, "--account", "a:bolt") == ("a:bolt", 1)
    for text in (FIRST_NAME, "first", "bolt"):
        assert await used(commands, text) == ("a:bolt", 1)
    assert await used(commands, LISTED) == (LISTED_NAME, 1)


@pytest.mark.usefixtures("limiter")
async def test_an_account_stands_for_all_its_keys(commands: Any) -> None:
    """Keys of an account that are counted one by one are shown one by one, under any name of the account."""
    apart = {key_partition(hash_api_key(key, "")) for key in (b"apart-1", b"apart-2")}
    for named in (["a:apart"], ["apart"], ["--account", "apart"]):
        callers = (await commands("json", "show", *named))["callers"]
        assert {each["partition"] for each in callers} == apart
    message = await commands("bad", "explain", "GET", "/", "--key", "a:apart")
    assert "the keys of this account are counted one by one: name one" in message


@pytest.mark.usefixtures("limiter")
async def test_show_says_the_name_and_the_label(commands: Any) -> None:
    """Output of `show` has the same name of the caller as `top`, and the key's label in the settings."""
    printed = await commands("good", "show", LISTED_NAME[:9])
    assert f"caller   {LISTED_NAME}\n" in printed
    assert "label    Acme, batch\n" in printed


async def test_a_caller_without_news_is_found_by_its_counts(
    commands: Any, limiter: Limiter, redis_server: StoreServer
) -> None:
    """A caller that has counts is known by its whole name, even if no worker has reported it for long."""
    lease = await limiter.acquire(Identity("a name of the app's", "pro"))
    await lease.release()
    name = lease.identity.partition
    with redis_server.client() as client:
        client.delete("ratelimit:{fleet}:i")
    assert await used(commands, SEEN_NAME) == (SEEN_NAME, 1)
    assert await used(commands, name) == (name, 1)


@pytest.mark.usefixtures("limiter")
@pytest.mark.parametrize("text", ["k:00000000", f"k:{'0' * 32}", "a:nobody", "ip:192.0.9", "i:123456", "l:1"])
@pytest.mark.parametrize(
    "command",
    [
        ("show",),
        ("reset",),
        ("explain", "GET", "/", "--key"),
        ("keys", "set", "--plan", "pro"),
        ("keys", "hash"),
    ],
    ids=" ".join,
)
async def test_a_name_of_nobody_is_an_error(
    commands: Any, redis_server: StoreServer, command: tuple[str, ...], text: str
) -> None:
    """It is never taken for an API key: nothing is changed, and the exit status says so."""
    assert "no caller who is known or has counts has this name" in await commands("bad", *command, text)
    assert stored_keys(redis_server) == {}


async def test_an_address_is_nobody_elses_beginning(commands: Any, limiter: Limiter) -> None:
    """A whole address stands for itself, seen or not, though the name of a caller who was seen begins so."""
    for address in ("192.0.2.17", "2001:db8:0:12::1"):
        await (await limiter.acquire(address=address)).release()
    await limiter.engine.reporter.report()
    for name in ("ip:192.0.2.1", "ip:2001:db8:0:1::/64"):
        assert await used(commands, name) == (name, 0)
        assert name in await commands("good", "explain", "GET", "/", "--address", name)
        network = name.removeprefix("ip:") + ("" if name.endswith("/64") else "/32")
        printed = await commands("good", "keys", "set", name, "--plan", "pro", "--for", "2h")
        assert printed.startswith(f"{network}: plan pro until ")
        await commands("good", "keys", "remove", name)
        assert "is neither an API key" in await commands("bad", "keys", "hash", name)
    assert await used(commands, "ip:192.0.2.1…") == ("ip:192.0.2.17", 1)
    assert "stands for several callers" in await commands("bad", "show", "ip:192.0.2.")


@pytest.mark.usefixtures("limiter")
async def test_a_prefix_is_long_enough_and_of_one_caller(commands: Any, redis_server: StoreServer) -> None:
    """Five digits name nobody; the error of a beginning that several callers have in common names them."""
    assert "a prefix has at least 6 digits" in await commands("bad", "show", SEEN_NAME[:7])
    twins = [f"sha256:123456{digit * 58}" for digit in "ab"]
    with redis_server.client() as client:
        client.hset("ratelimit:{keys}", mapping=dict.fromkeys(twins, json.dumps({"plan": "pro"})))
        client.set("ratelimit:{keys}:version", "1")
    message = await commands("bad", "show", "k:123456")
    assert message.startswith("k:123456 stands for several callers: ")
    assert all(key_partition(each) in message for each in twins)
    assert (await used(commands, "k:123456a"))[0] == key_partition(twins[0])


@pytest.mark.usefixtures("limiter")
async def test_keys_are_set_by_what_is_shown(commands: Any, redis_server: StoreServer) -> None:
    """A key by its name, and all keys of an account, which stay the account's."""
    printed = await commands("good", "keys", "set", SEEN_NAME[:10], "--plan", "pro")
    assert printed == f"{SEEN_NAME}: plan pro, in force within 2 seconds\n"
    await commands("good", "keys", "set", "a:bolt", "--plan", "pro")
    assert stored_keys(redis_server) == {
        SEEN: KeyEntry("pro"),
        **dict.fromkeys((FIRST, SECOND), KeyEntry("pro", "bolt")),
    }
    assert (await commands("good", "keys", "hash", SEEN_NAME)).strip() == SEEN
    await commands("good", "keys", "remove", "a:bolt")
    await commands("good", "keys", "remove", SEEN_NAME[:8])
    assert stored_keys(redis_server) == {}
    assert "is neither an API key nor" in await commands("bad", "keys", "hash", "ip:192.0.2.7")


@pytest.mark.usefixtures("limiter")
async def test_reset_clears_whom_it_is_shown(commands: Any) -> None:
    """By a name copied from a table, and nobody else."""
    (cleared,) = (await commands("json", "reset", SEEN_NAME[:8]))["cleared"]
    assert cleared["partition"] == SEEN_NAME
    assert await used(commands, SEEN_NAME[:8]) == (SEEN_NAME, 0)
    assert await used(commands, "a:bolt") == ("a:bolt", 1)


@pytest.mark.usefixtures("limiter")
async def test_any_other_text_is_an_api_key(commands: Any) -> None:
    """One that was never seen has used nothing, which is not an error."""
    assert await used(commands, "never-seen") == (key_partition(hash_api_key(b"never-seen", "")), 0)
    assert await used(commands, "192.0.2.7") == ("ip:192.0.2.7", 1)


async def test_a_caller_is_named_once(commands: Any) -> None:
    """Two names of one caller are wrong usage."""
    assert "name the caller once" in await commands("bad", "show", "k", "--key", "k", status=2)
