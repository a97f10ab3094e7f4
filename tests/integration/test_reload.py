"""Live settings: a good change of the file applies everywhere soon, a bad one is reported and ignored."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings, SettingsError
from ratelimit_mw._internal.live import reload
from ratelimit_mw._internal.live.reload import FileWatch
from tests.conftest import StartApp
from tests.support.apps import ROOT
from tests.support.asgi import client_of, ok_app, settings_of, shown, statuses
from tests.support.live import SEEN_WITHIN, replace_file, swap_link, traffic
from tests.support.servers import StoreServer
from tests.support.settings_files import written
from tests.support.slots import until_async

pytestmark = pytest.mark.rerun


def limits(quota: int, more: str = "") -> str:
    """A settings file with so many requests an hour for everyone."""
    return f'{more}\n[plans.default]\nrequests = ["{quota}/hour"]\n'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at more often than in earnest."""
    monkeypatch.setattr(reload, "POLL_SECONDS", 0.02)


@pytest.fixture
def file(tmp_path: Path, quick: None) -> Path:
    """A settings file with 5 requests an hour."""
    return written(tmp_path / "s.toml", limits(5))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Yield the log of the package."""
    with caplog.at_level(logging.INFO, "ratelimit_mw"):
        yield caplog


def quota_of(limiter: Limiter) -> int:
    """The requests an hour in force."""
    return limiter.settings.plans["default"].requests[0].quota


def reported(heard: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors so far."""
    return [record.getMessage() for record in heard.records if record.levelno >= logging.WARNING]


def remove(file: Path) -> None:
    """Take the file away."""
    file.unlink()


async def settle() -> None:
    """Give the watch time for a few looks."""
    await asyncio.sleep(0.2)


# on real workers --------------------------------------------------------------------------------


async def test_every_worker_goes_by_a_change_and_no_request_is_dropped(
    start_app: StartApp, tmp_path: Path, redis_server: StoreServer
) -> None:
    """Edits, atomic replaces and symlink swaps are in force on all workers within two seconds."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, quota in ((first, 10_001), (second, 10_004)):
        folder.mkdir()
        written(folder / "ratelimit.toml", limits(quota))
    (tmp_path / "data").symlink_to(first)
    file = tmp_path / "ratelimit.toml"
    file.symlink_to(Path("data") / "ratelimit.toml")
    environment = {"RATELIMIT_SETTINGS": str(file), "RATELIMIT_BACKEND__URL": redis_server.url}
    environment["RATELIMIT_BACKEND__TIMEOUT"] = "5"
    app = start_app("tests.support.live_app:app", workers=2, environment=environment)
    async with httpx.AsyncClient(base_url=app.url, headers={"X-API-Key": "k"}, timeout=30) as client:
        slow = asyncio.create_task(client.get("/?seconds=4"))
        async with traffic(app.url, "k") as flow:
            await flow.until_limit("10001", workers=2)
            written(first / "ratelimit.toml", limits(10_002))
            assert await flow.until_limit("10002", workers=2) < SEEN_WITHIN
            replace_file(first / "ratelimit.toml", limits(10_003))
            assert await flow.until_limit("10003", workers=2) < SEEN_WITHIN
            swap_link(tmp_path / "data", second)
            assert await flow.until_limit("10004", workers=2) < SEEN_WITHIN
            written(second / "ratelimit.toml", limits(10_005).replace("requests", "request"))
            await until_async(lambda: app.log.count("are ignored") == 2)
            await flow.until_limit("10004", workers=2)
            assert len({answer.version for answer in flow.answers}) == 4
        assert (await slow).status_code == 200
    assert app.log.count("did you mean 'requests'?") == 2


async def test_changes_apply_without_lifespan(
    start_app: StartApp, tmp_path: Path, redis_server: StoreServer
) -> None:
    """A server that sends no lifespan events watches the file from the first request on."""
    file = written(tmp_path / "s.toml", limits(10_001))
    environment = {"RATELIMIT_SETTINGS": str(file), "RATELIMIT_BACKEND__URL": redis_server.url}
    app = start_app("tests.support.live_app:app", "--lifespan", "off", environment=environment)
    async with traffic(app.url, "k") as flow:
        await flow.until_limit("10001", workers=1)
        written(file, limits(10_002))
        assert await flow.until_limit("10002", workers=1) < SEEN_WITHIN


# in this process --------------------------------------------------------------------------------


async def test_what_was_counted_is_kept(file: Path) -> None:
    """A lowered limit gives no negative number, a raised one is felt at once."""
    app = RateLimitMiddleware(ok_app(), settings=file)
    async with client_of(app, x_api_key="k") as client:
        assert await statuses(client, 4) == [200] * 4
        written(file, limits(2))
        await until_async(lambda: quota_of(app.limiter) == 2)
        refused = await client.get("/")
        assert refused.status_code == 429
        assert shown(refused)[:2] == ("2", "0")
        assert "4/2 requests used" in refused.json()["error"]["message"]
        written(file, limits(6))
        await until_async(lambda: quota_of(app.limiter) == 6)
        assert await statuses(client, 3) == [200, 200, 429]


BAD = {
    "half-written": ('[plans.default]\nrequests = ["5/ho', "is not valid TOML"),
    "empty": ("", "is empty; expected at least one table"),
    "a comment": ("# here be limits\n", "is empty; expected at least one table"),
    "an unknown plan": ('identity.default_plan = "pro"\n', "there is no plan 'pro'"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_file_is_reported_once_and_ignored(
    file: Path, heard: pytest.LogCaptureFixture, case: str
) -> None:
    """A bad file leaves the settings in force; the log has each error once, and tells of a good file."""
    text, complaint = BAD[case]
    async with Limiter.from_settings(file) as limiter:
        version = limiter.version
        written(file, text)
        await until_async(lambda: reported(heard))
        await settle()
        os.utime(file)
        await settle()
        (report,) = reported(heard)
        assert report.startswith("changed settings are ignored")
        assert complaint in report
        assert str(file) in report
        assert limiter.version == version
        written(file, limits(5))
        await until_async(lambda: reported(heard)[1:] == [f"{file}: the settings are good again"])
        assert limiter.version == version


async def test_all_errors_are_reported(file: Path, heard: pytest.LogCaptureFixture) -> None:
    """The report is the full list, as `check` prints it."""
    async with Limiter.from_settings(file):
        written(file, 'shadw = true\n[plans.default]\nrequests = ["5/fortnight"]\n')
        await until_async(lambda: reported(heard))
        (report,) = reported(heard)
        assert "did you mean 'shadow'?" in report
        assert "plans.default.requests[0]" in report


async def test_a_missing_file_is_reported_once_and_ignored(
    file: Path, heard: pytest.LogCaptureFixture
) -> None:
    """A missing file leaves the settings in force; a file that comes in its place applies."""
    async with Limiter.from_settings(file) as limiter:
        await settle()
        remove(file)
        await until_async(lambda: reported(heard))
        await settle()
        (report,) = reported(heard)
        assert "there is no such file" in report
        written(file, limits(7))
        await until_async(lambda: quota_of(limiter) == 7)


async def test_a_file_that_is_being_written_is_left_alone(file: Path) -> None:
    """It is read once two looks have found it the same: half a file may be good, too."""
    running = Settings.load(file)
    watch = FileWatch(str(file))
    assert [await watch.check(running) for _ in range(3)] == [None] * 3
    for quota in (6, 7, 8):
        written(file, limits(quota))
        assert await watch.check(running) is None
    changed = await watch.check(running)
    assert changed is not None
    assert changed.plans["default"].requests[0].quota == 8
    assert await watch.check(changed) is None


async def test_a_change_between_loading_and_watching_is_seen(file: Path) -> None:
    """The first look compares with what is in force, not with the file as it is by then."""
    limiter = Limiter.from_settings(file)
    written(file, limits(8))
    async with limiter:
        await until_async(lambda: quota_of(limiter) == 8)


async def test_backend_and_secret_apply_at_restart(file: Path, heard: pytest.LogCaptureFixture) -> None:
    """They stay as they were and warn; the rest of the same change applies."""
    listed = '[[keys]]\nkey = "k"\nplan = "default"\naccount = "acme"\n'
    written(file, limits(5) + listed)
    async with Limiter.from_settings(file) as limiter:
        backend = limiter.engine.backend
        changed = 'backend = { url = "redis://127.0.0.1:1", timeout = 2 }\nidentity.hash_secret = "new"\n'
        written(file, limits(9, changed) + listed)
        await until_async(lambda: quota_of(limiter) == 9)
        assert limiter.engine.backend is backend
        assert limiter.settings.backend.safe_url == "memory://"
        assert not limiter.settings.identity.hash_secret
        assert limiter.engine.identity_of(api_key="k").account == "acme"
        await until_async(lambda: reported(heard))
        await settle()
        (report,) = reported(heard)
        names = "backend.url, backend.timeout, identity.hash_secret (and with it the keys)"
        assert report == f"{file}: {names} changed; the change applies at restart"


async def test_a_change_that_needs_the_restart_waits_for_it(
    file: Path, heard: pytest.LogCaptureFixture
) -> None:
    """Keys wait for their new secret; where the rest doesn't fit the old keys, all of it waits."""
    key = '[[keys]]\nkey = "k"\nplan = "pro"\n'
    written(file, limits(5) + "[plans.pro]\n" + key)
    async with Limiter.from_settings(file) as limiter:
        written(file, limits(9, 'identity.hash_secret = "new"'))
        await until_async(lambda: reported(heard))
        assert "keys[0].plan: identity.hash_secret (and with it the keys) changed" in reported(heard)[0]
        assert quota_of(limiter) == 5


async def test_the_environment_stays_in_force(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of the file doesn't change a value that a variable sets."""
    monkeypatch.setenv("RATELIMIT_SHADOW", "true")
    async with Limiter.from_settings(file) as limiter:
        written(file, limits(6, "shadow = false"))
        await until_async(lambda: quota_of(limiter) == 6)
        assert limiter.settings.shadow


async def test_settings_made_in_code_are_not_watched(file: Path) -> None:
    """Settings that the app itself has changed are not replaced by those of the file."""
    settings = Settings.load(file).model_copy(update={"shadow": True})
    assert settings.file is None
    async with Limiter(settings) as limiter:
        written(file, limits(6))
        await settle()
        assert quota_of(limiter) == 5
    assert Settings().file is None
    assert Settings.load(file).file == str(file)


async def test_responses_follow_the_settings_in_force(file: Path) -> None:
    """The next request is answered as `[response]` says now; one under way keeps what it began with."""
    go_on = asyncio.Event()

    async def serve(request: Request) -> Response:
        if request.url.path == "/wait":
            await go_on.wait()
        return PlainTextResponse("ok")

    app = RateLimitMiddleware(Starlette(routes=[Route("/{rest:path}", serve)]), settings=file)
    async with client_of(app, x_api_key="k") as client:
        waiting = asyncio.create_task(client.get("/wait"))
        await client.get("/")
        written(file, limits(2, 'response = { headers = ["ietf"], body = "problem" }'))
        await until_async(lambda: quota_of(app.limiter) == 2)
        refused = await client.get("/")
        assert refused.headers["content-type"] == "application/problem+json"
        assert "x-ratelimit-limit" not in refused.headers
        assert refused.headers["ratelimit-policy"] == '"2/hour";q=2;w=3600'
        go_on.set()
        assert (await waiting).headers["x-ratelimit-limit"] == "5"


async def test_a_slow_disk_holds_up_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at and read in a thread."""
    async with Limiter.from_settings(file) as limiter:
        stat = Path.stat

        def slow_stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if path == file:
                subprocess.run(["sleep", "0.3"], check=True)
            return stat(path, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(Path, "stat", slow_stat)
        loop = asyncio.get_running_loop()
        longest, end = 0.0, loop.time() + 0.8
        while loop.time() < end:
            before = loop.time()
            await (await limiter.acquire(api_key="k")).release()
            await asyncio.sleep(0.01)
            longest = max(longest, loop.time() - before)
        assert longest < 0.2


async def test_apply_by_hand(file: Path) -> None:
    """An app may change the settings itself; what can't be changed stays, what doesn't fit is an error."""
    limiter = Limiter.from_settings(file)
    limiter.apply(Settings.load(written(file, limits(6, 'backend.url = "redis://127.0.0.1:1"'))))
    assert quota_of(limiter) == 6
    assert limiter.settings.backend.safe_url == "memory://"
    plans = Settings.load(written(file, limits(6) + '[plans.pro]\n[[keys]]\nkey = "k"\nplan = "pro"\n'))
    limiter.apply(plans)
    with pytest.raises(SettingsError, match="there is no plan 'pro'"):
        limiter.apply(Settings.load(written(file, limits(6, 'identity.hash_secret = "s"'))))


def test_whole_networks_are_trusted_at_no_cost() -> None:
    """Settings that trust large networks are in force at once: nobody counts the addresses in them."""
    texts = [f'identity.trusted_proxies = ["{network}"]' for network in ("10.0.0.0/8", "::/0", "fd00::/8")]
    assert len({Limiter(settings_of(text)).version for text in texts}) == 3


def test_the_version_is_the_same_in_every_process() -> None:
    """It names the settings, whatever order a process keeps their methods in, and tells no secret."""
    routes = [{"path": "/", "methods": ["GET", "PUT", "POST", "PATCH", "DELETE"]}]
    code = (
        "from ratelimit_mw import Limiter, Settings\n"
        f"print(Limiter(Settings(routes={routes}, identity={{'hash_secret': 'a'}})).version)\n"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    limiter = Limiter(Settings.model_validate({"routes": routes}))
    assert limiter.version == other.stdout.strip()
    assert len(limiter.version) == 12
    assert Limiter(Settings(shadow=True)).version != Limiter(Settings()).version
