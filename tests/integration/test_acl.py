"""examples/deploy/users.acl: users of Redis and Valkey with every right that is needed, and no other."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import redis
import yaml

from ratelimit_mw import Limiter, Settings
from ratelimit_mw._internal.backends.rights import ADMIN, WORKER
from ratelimit_mw._internal.cli.commands import run
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.limiter.inspect_caller import forget, overview
from ratelimit_mw._internal.live import rights
from ratelimit_mw._internal.settings import findings
from tests.conftest import StartServer
from tests.integration.test_deploy import DEPLOY
from tests.support.pages import blocks
from tests.support.processes import HOST, ServerProcess
from tests.support.servers import StoreServer, server_binaries
from tests.support.statuses import counted

pytestmark = pytest.mark.rerun

USERS = DEPLOY / "users.acl"
COMPOSE = DEPLOY.parents[1] / "docker-compose.yml"
SCRIPTS = DEPLOY.parents[1] / "ratelimit_mw" / "_internal" / "backends" / "redis" / "lua"
HEALTH_CHECKS = {"ping"}
"""Commands that the limiter doesn't need, and whoever looks after the server does."""
OTHER_DATABASES = {"select"}
REGISTRY_READS = {"hscan"}
"""Done at the first poll for live keys, which may come after the requests of a short test."""


@pytest.fixture
def store(kind: str, start_server: StartServer) -> StoreServer:
    """A server of each kind with the users, whose password is `secret`."""
    server = start_server(kind)
    with server.client() as client:
        for user, rules in users().items():
            if user != "default":
                client.execute_command("ACL", "SETUSER", user, *rules.replace("resetpass", ">secret").split())
    return server


def users() -> dict[str, str]:
    """The rules of each user of the file."""
    lines = [line.split(" ", 2) for line in USERS.read_text().splitlines()]
    assert all(line[0] == "user" for line in lines)
    return {user: rules for _, user, rules in lines}


class ServerOfThePage(ServerProcess):
    """The server that docs/deployment.md starts, on a port of its own and in the foreground."""

    url = admin_url = ""

    def command(self) -> list[str]:
        """Its command, of the files that the page makes."""
        page = (DEPLOY.parents[1] / "docs" / "deployment.md").read_text("utf-8")
        (text,) = [block.text for block in blocks(page) if "users.local.acl" in block.text]
        text = re.sub(r"^redis-server (.*) --daemonize yes$", r"echo \1", text, flags=re.MULTILINE)
        (login,) = re.findall(
            r"^    RATELIMIT_BACKEND__URL=(\S+) \\\n +ratelimit-mw keys set", page, re.MULTILINE
        )
        commands = f'{text}echo "$RATELIMIT_BACKEND__URL"\necho "{login}"'
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=self.folder, capture_output=True, text=True, check=True, timeout=60
        )
        arguments, url, admin = done.stdout.splitlines()
        self.url = url.replace("6379", str(self.port))
        self.admin_url = admin.replace("6379", str(self.port))
        file, *options = arguments.split()
        return [str(server_binaries()["redis"]), str(self.folder / file), *options, "--port", str(self.port)]

    def answers(self) -> bool:
        """Whether the address that the page exports opens it."""
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as client:
            return bool(client.ping())
        return False


def test_the_page_starts_a_server_with_users(tmp_path: Path) -> None:
    """A server that the page's commands start keeps its log in that folder, and is open to its user alone."""
    for name in ("users.acl", "redis.conf"):
        shutil.copy(DEPLOY / name, tmp_path)
    server = ServerOfThePage("page", tmp_path)
    server.start()
    try:
        with redis.Redis(HOST, server.port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert list(tmp_path.glob("appendonly*"))
        assert (tmp_path / "users.local.acl").stat().st_mode & 0o077 == 0
        with redis.Redis.from_url(server.url) as app, pytest.raises(redis.exceptions.NoPermissionError):
            app.hset("ratelimit:{keys}", "k", "v")
        with redis.Redis.from_url(server.admin_url) as admin:
            assert admin.hset("ratelimit:{keys}", "k", "v") == 1
    finally:
        server.stop()


def granted(user: str) -> set[str]:
    """The commands that a user may give."""
    return {rule[1:] for rule in users()[user].split() if rule.startswith("+")}


def url_of(server: StoreServer, user: str) -> str:
    """The server's address with a user's login, in another database than the first."""
    return f"redis://{user}:secret@{HOST}:{server.port}/1"


async def use(url: str) -> None:
    """Do everything that a worker does."""
    plan = {"requests": ["5/minute"], "concurrent": {"limit": 2, "lease": 1}, "spending": {"daily": "1.00"}}
    settings = Settings.model_validate(
        {"backend": {"url": url, "timeout": 5.0, "on_failure": "deny"}, "plans": {"default": plan}}
    )
    async with Limiter(settings) as limiter:
        lease = await limiter.acquire(api_key="k", price="0.10")
        assert lease.allowed
        token = await lease.detach(ttl=60)
        assert await limiter.renew(token)
        await limiter.settle(token, "0.05")
        await limiter.release(token)
        slots = [await limiter.acquire(api_key="k") for _ in range(3)]
        assert [each.allowed for each in slots] == [True, True, False]
        await slots[0].release()
        async with await limiter.acquire(api_key="k"):
            pass
        refused = [await limiter.acquire(api_key="k") for _ in range(3)][-1].decision.refusal
        assert refused is not None
        assert refused.reason in {"rate", "concurrency"}
        identity = limiter.engine.identity_of(api_key="k")
        assert counted((await overview(limiter, identity)).limits[0]) > 2
        await limiter.engine.reporter.report()
        assert (await FleetView(limiter).caller(identity.partition)).series
        await forget(limiter, identity)
        assert counted((await overview(limiter, identity)).limits[0]) == 0


def commands_given(server: StoreServer) -> set[str]:
    """Return the commands done on a server since its statistics were cleared, inside scripts and outside."""
    with server.client() as client:
        statistics = client.info("commandstats")
    return {
        name.removeprefix("cmdstat_").partition("|")[0]
        for name, figures in statistics.items()
        if int(figures["calls"]) > int(figures.get("failed_calls", 0))
    }


def plain(commands: set[str]) -> set[str]:
    """Without subcommands, which Redis 6.2 does not tell apart."""
    return {command.partition("|")[0] for command in commands}


def test_worker_has_the_rights_it_uses_and_no_other(store: StoreServer) -> None:
    """The grants are what the server saw in use: one more could be misused, one less would be missed."""
    with store.client() as client:
        client.config_resetstat()
    asyncio.run(use(url_of(store, "ratelimit")))
    seen = commands_given(store) - {"config", "info", "hello"}  # the test's own
    # Of what only some paths of the scripts do, the scripts themselves are witness.
    live = {SCRIPTS / "changes.lua", SCRIPTS / "replace_entries.lua"}  # which set live keys
    for script in {*SCRIPTS.glob("*.lua")} - live:
        seen |= {name.lower() for name in re.findall(r"call\(?,? ?'([A-Z]+)'", script.read_text())}
    assert seen - {"client", "eval"} <= granted("ratelimit")
    assert plain(granted("ratelimit")) - seen <= HEALTH_CHECKS | OTHER_DATABASES | REGISTRY_READS | {"eval"}


def test_script_is_found_again_without_its_cache(store: StoreServer) -> None:
    """After a restart the script is sent whole, with EVAL: nobody needs SCRIPT LOAD."""
    with store.client() as client:
        client.script_flush()
    asyncio.run(use(url_of(store, "ratelimit")))
    assert "eval" in commands_given(store)


def test_admin_can_set_live_keys_and_the_worker_cannot(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user that may only count can't give itself a plan; the error names missing rights and the remedy."""
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    monkeypatch.setenv("RATELIMIT_BACKEND__TIMEOUT", "5")
    for user, status in (("ratelimit", 3), ("ratelimit-admin", 0)):
        monkeypatch.setenv("RATELIMIT_BACKEND__URL", url_of(store, user))
        assert run(["keys", "set", "a-key", "--plan", "default"]) == status
        said = capsys.readouterr().err
        assert run(["keys", "list"]) == 0, capsys.readouterr()
        assert run(["keys", "remove", "a-key"]) == (1 if status else 0)  # there is none
        if status:
            assert said.startswith("ratelimit-mw: rights are missing in the backend: ")
            assert "ACL SETUSER ratelimit +hget +hset +hdel +watch +multi +exec" in said
    assert granted("ratelimit-admin") - granted("ratelimit") == set(ADMIN)
    assert granted("ratelimit") == set(WORKER)


def test_what_an_error_names_gives_the_rights(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who is given the rights named by each error, one by one, gets a command that works."""
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    monkeypatch.setenv("RATELIMIT_BACKEND__TIMEOUT", "5")
    monkeypatch.setenv("RATELIMIT_BACKEND__URL", url_of(store, "new"))
    with store.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "new", "on", ">secret", "resetkeys", "-@all", "+select", "+auth"
        )
        for _ in range(30):
            if run(["show", "--key", "k"]) == 0:
                return
            said = capsys.readouterr().err
            assert "rights are missing in the backend: " in said, said
            line = re.search(r"ACL SETUSER [^(\n]+", said)
            assert line is not None
            client.execute_command(*line[0].split())
    pytest.fail("there is no end of missing rights")


def test_a_refused_login_is_named(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong password is not a backend that is away."""
    monkeypatch.delenv("RATELIMIT_SETTINGS", raising=False)
    monkeypatch.setenv("RATELIMIT_BACKEND__URL", f"redis://ratelimit:wrong@{HOST}:{store.port}/1")
    assert run(["show", "--key", "k"]) == 3
    assert "the backend refuses the login of backend.url" in capsys.readouterr().err


@pytest.mark.parametrize("lacks", ["hget", "hset", "hdel", "watch", "multi", "exec", None])
async def test_a_dashboard_without_rights_is_found_at_the_start(
    store: StoreServer, lacks: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One right too few is reported with what gives it; to find that out, nothing is written."""
    monkeypatch.setattr(findings, "_said", set())
    with redis.Redis.from_url(f"redis://{HOST}:{store.port}/1") as client:
        if lacks:
            client.execute_command("ACL", "SETUSER", "ratelimit-admin", f"-{lacks}")
        settings = settings_with_changes(url_of(store, "ratelimit-admin"))
        async with Limiter(settings) as limiter:
            await limiter.engine.live.rights.run()
            missing = limiter.engine.live.rights.missing
        assert client.exists("ratelimit:{keys}", "ratelimit:{keys}:version") == 0
    records = [
        record for record in caplog.records if getattr(record, "check", "") == "dashboard-without-rights"
    ]
    assert [missing] * len(records) == ([ADVICE] if lacks else [])
    assert all(ADVICE in record.getMessage() for record in records)


async def test_rights_that_are_given_later_are_seen(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dashboard that could change nothing says so no longer once it can."""
    monkeypatch.setattr(rights, "AGAIN_SECONDS", 0.0)
    with store.client() as client:
        client.execute_command("ACL", "SETUSER", "ratelimit-admin", "-hset")
        async with Limiter(settings_with_changes(url_of(store, "ratelimit-admin"))) as limiter:
            await limiter.engine.live.rights.run()
            assert limiter.engine.live.rights.missing == ADVICE
            client.execute_command(*ADVICE.split())
            await limiter.engine.live.rights.run()
            assert limiter.engine.live.rights.missing is None


ADVICE = "ACL SETUSER ratelimit-admin +hget +hset +hdel +watch +multi +exec"


def settings_with_changes(url: str) -> Settings:
    """Settings with a dashboard that may change plans."""
    operations = {"dashboard_path": "/ops", "dashboard_token": "t", "dashboard_changes": True}
    return Settings.model_validate({"backend": {"url": url, "timeout": 5.0}, "operations": operations})


@pytest.mark.parametrize("user", ["ratelimit", "ratelimit-admin"])
def test_stolen_login_is_of_little_use(store: StoreServer, user: str) -> None:
    """Other keys, the server and its users are out of reach, from inside a script, too."""
    denied = [
        ("GET", "other"),
        ("SET", "other", "1"),
        ("DEL", "ratelimit"),
        ("EVAL", "return redis.call('GET', 'other')", "0"),
        ("EVAL", "return redis.call('SET', KEYS[1], 1)", "1", "other"),
        ("EVAL", "return redis.call('FLUSHALL')", "0"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "dir", "/"),
        ("SCRIPT", "FLUSH"),
        ("SCRIPT", "KILL"),
        ("SHUTDOWN", "NOSAVE"),
        ("REPLICAOF", "127.0.0.1", "1"),
        ("MONITOR",),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("ACL", "LIST"),
        ("MODULE", "LIST"),
        ("SAVE",),
        ("DUMP", "ratelimit:x"),
        ("RESTORE", "ratelimit:x", "0", "x"),
        ("RENAME", "ratelimit:x", "ratelimit:y"),
        ("FUNCTION", "FLUSH"),
        ("PUBLISH", "x", "y"),
        ("INFO",),
    ]
    said = r"(?i)permission|unknown command|can't access|can't run"
    with redis.Redis.from_url(url_of(store, user)) as client:
        for command in denied:
            with pytest.raises(redis.ResponseError, match=said):
                client.execute_command(*command)


class Closed(StoreServer):
    """A server that nobody but the users of the file can ask anything."""

    def answers(self) -> bool:
        """Whether the worker can log in."""
        return asked(self.port, "AUTH ratelimit secret", "PING") == "+OK\r\n+PONG\r\n"


@pytest.mark.parametrize("admin", ["", "other"])
def test_file_is_what_the_servers_read(kind: str, tmp_path: Path, admin: str) -> None:
    """Users with a password from docker-compose.yml can log in, and nobody without one."""
    file = tmp_path / "users.acl"
    (command,) = yaml.safe_load(COMPOSE.read_text())["services"]["redis"]["command"][2:]
    fill_in = command.replace("$$", "$").partition("&& exec")[0]
    fill_in = fill_in.replace("/etc/users.acl", str(USERS)).replace("/tmp/users.acl", str(file))
    environment = {**os.environ, "REDIS_PASSWORD": "secret", "REDIS_ADMIN_PASSWORD": admin}
    subprocess.run(["sh", "-c", fill_in], env=environment, check=True)
    server = Closed(kind, tmp_path / "server", "--aclfile", str(file))
    server.start()
    try:
        assert asked(server.port, "PING").startswith("-NOAUTH")
        assert asked(server.port, "AUTH default x").startswith("-WRONGPASS")
        assert asked(server.port, "AUTH ratelimit other").startswith("-WRONGPASS")
        assert asked(server.port, "AUTH ratelimit ").startswith("-")
        assert asked(server.port, "AUTH ratelimit-admin secret").startswith("-WRONGPASS")
        assert asked(server.port, "AUTH ratelimit-admin other").startswith("+OK" if admin else "-WRONGPASS")
    finally:
        server.stop()


def asked(port: int, *commands: str) -> str:
    """Send commands as a person would type them; return the answers, or nothing if the server isn't there."""
    try:
        with socket.create_connection((HOST, port), timeout=5) as connection:
            answers = ""
            for command in commands:
                connection.sendall(f"{command}\r\n".encode())
                answers += connection.recv(1_000).decode()
            return answers
    except OSError:
        return ""
