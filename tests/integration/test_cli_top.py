"""`ratelimit-mw top`: who asks most and who is refused most, as a table, live and as JSON."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ratelimit_mw import Limiter, RateLimited
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime.printable import printable
from tests.conftest import StartServer
from tests.support.commands import Commands
from tests.support.processes import free_port
from tests.support.servers import StoreServer
from tests.support.settings_files import written

pytestmark = pytest.mark.rerun

HOSTILE = "[red]<b>x[/red]\n\x1b[2J\u202ey" + "z" * 100


@pytest.fixture
def shared(tmp_path: Path, redis_server: StoreServer) -> str:
    """A settings file with a real Redis."""
    text = f"""
        backend = {{ url = "{redis_server.url}", timeout = 5 }}
        [plans.default]
        requests = ["10/hour"]
        [plans.pro]
        requests = ["100/minute"]
        concurrent = 3
        spending = {{ daily = "10.00" }}
        [[keys]]
        key = "pro"
        plan = "pro"
        account = "acme"
        label = "Acme, batch"
        [[routes]]
        path = "/{{rest:path}}"
        price = "0.50"
    """
    return str(written(tmp_path / "shared.toml", text))


async def with_traffic(file: str, look: Callable[[], Awaitable[None]]) -> None:
    """Look while a worker is there that has decided about two callers: `k`, which was refused, and `pro`."""
    async with Limiter.from_settings(file) as limiter:
        for _ in range(14):
            with contextlib.suppress(RateLimited):
                async with await limiter.acquire(api_key="k"):
                    pass
        for _ in range(18):
            with contextlib.suppress(RateLimited):
                async with await limiter.acquire(api_key="pro", path="/"):
                    pass
        async with await limiter.acquire(api_key="pro"):
            await limiter.engine.reporter.report()
            await look()


async def test_top_prints_json(commands: Commands, shared: str) -> None:
    """One document: the snapshot, its callers in the order and number that was asked for."""
    said: dict[str, Any] = {}

    async def look() -> None:
        for sort in ("requests", "refused", "nearest"):
            said[sort] = await asyncio.to_thread(commands.json, "top", "--sort", sort, "--settings", shared)
        arguments = ("top", "-n", "1", "--settings", shared)
        said["one"] = await asyncio.to_thread(commands.json, *arguments)

    await with_traffic(shared, look)
    plans = {sort: [caller["plan"] for caller in each["callers"]] for sort, each in said.items()}
    assert plans["requests"] == ["pro", "default"]
    assert plans["refused"] == plans["nearest"] == ["default", "pro"]
    assert plans["one"] == ["pro"]
    assert [len(said["one"]["series"]), len(said["one"]["workers"])] == [720, 1]
    slots = [limit["used"] for limit in said["one"]["callers"][0]["limits"] if limit["kind"] == "slots"]
    assert slots == [1]


async def test_top_prints_one_table_where_there_is_no_terminal(commands: Commands, shared: str) -> None:
    """Requests, refusals by kind, slots held, money spent and the nearest limit, one line a caller."""
    printed: list[str] = []

    async def look() -> None:
        for arguments in ((), ("--once",)):
            found = await asyncio.to_thread(commands.good, "top", *arguments, "--settings", shared)
            printed.append(found)

    await with_traffic(shared, look)
    for text in printed:
        assert "29 admitted, refused: 4 rate · 1 worker" in text
        assert re.search(
            r"^k:[0-9a-f]{32} +- +default +\d\.\d +10 +4 rate +- +- +█{10} 100% 10/hour", text, re.MULTILINE
        )
        assert re.search(
            r"^k:[0-9a-f]{32} +Acme, batch · acme +pro +\d\.\d +19 +- +1/3 +9.00/10.00 USD +█+░* +95% "
            r"10.00 USD a day",
            text,
            re.MULTILINE,
        )


async def test_top_says_that_nobody_asked(commands: Commands, shared: str) -> None:
    """An empty table is not an error; but nothing is said of callers where no worker reports."""
    printed = await asyncio.to_thread(commands.good, "top", "--settings", shared)
    assert "no caller sent a request in the last minute" in printed
    assert "No worker reports" in printed
    assert "Nobody is being refused" not in printed


def test_top_needs_a_shared_backend(commands: Commands, tmp_path: Path) -> None:
    """`top` refuses counts in the memory of a process, at which no command can look."""
    file = written(tmp_path / "s.toml", "")
    said = commands.bad("top", "--settings", str(file))
    assert "backend.url is memory://, so counts are in the memory of each process" in said
    assert said.endswith("set RATELIMIT_BACKEND__URL here if the app's environment has it")


def test_top_says_that_the_backend_is_away(commands: Commands, tmp_path: Path) -> None:
    """In one line, and nothing that looks like figures."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    file = written(tmp_path / "s.toml", f'backend = {{ url = "{url}" }}')
    assert commands.bad("top", "--settings", str(file), status=3).startswith("the backend is away: ")


async def test_hostile_names_stay_on_their_line(
    commands: Commands, shared: str, start_server: StartServer
) -> None:
    """Markup, line breaks, escape sequences and marks of direction are shown, never obeyed."""
    async with Limiter.from_settings(shared) as limiter:
        for partition in (HOSTILE, f"a:{HOSTILE}"):
            # Another writer of the figures may name a partition so; the package itself hashes names.
            identity = Identity(partition, "default", account=HOSTILE, counted_as=partition)
            await (await limiter.acquire(identity)).release()
        await limiter.engine.reporter.report()
        printed = await asyncio.to_thread(commands.good, "top", "--settings", shared)
        said = await asyncio.to_thread(commands.json, "top", "--settings", shared)
    assert [each for each in printed if not each.isprintable() and each != "\n"] == []
    assert "[red]<b>x[/red]" in printed
    assert len([line for line in printed.splitlines() if "10/hour" in line]) == 2
    assert {caller["caller"] for caller in said["callers"]} == {HOSTILE, f"a:{HOSTILE}"}


def test_printable_leaves_names_alone() -> None:
    """Printable characters are not changed, and all others are replaced."""
    assert printable("k:00ff é 漢 [x]") == "k:00ff é 漢 [x]"
    assert printable("a\x1b\u202e\n") == "a\N{REPLACEMENT CHARACTER}" + 2 * "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("columns", [80, 140])
async def test_top_is_live_at_a_terminal(shared: str, columns: int) -> None:
    """It shows what changes until Ctrl-C ends it, with status 0 and the terminal as it was before."""
    seen: list[tuple[bytes, int]] = []

    async def look() -> None:
        seen.append(await asyncio.to_thread(watched, shared, columns))

    await with_traffic(shared, look)
    ((screen, status),) = seen
    assert status == 0
    assert b"\x1b[?1049h" in screen
    assert screen.rindex(b"\x1b[?1049l") > screen.rindex(b"\x1b[?1049h")
    drawn = screen.decode(errors="replace")
    assert drawn.count("nearest limit") >= 2
    assert "4 rate" in drawn
    assert "10/hour" in drawn


async def test_keys_sort_filter_and_end(shared: str) -> None:
    """At a terminal a key changes the order, a text filters, and `q` ends it with status 0."""
    seen: list[tuple[bytes, int]] = []
    steps = [
        ("", "[b] requests"), ("r", "[r] refused"), ("/", "filter: _"), ("acme", "filter: acme_"),
        ("\r", "filter: acme (Esc"), ("\x1b", "/ filter"), ("q", ""),
    ]  # fmt: skip

    async def look() -> None:
        seen.append(await asyncio.to_thread(watched, shared, 150, steps))

    await with_traffic(shared, look)
    ((screen, status),) = seen
    assert status == 0
    drawn = screen.decode(errors="replace")
    filtered = drawn[drawn.index("filter: acme_") :]
    assert "acme" in filtered
    assert re.search(r"k:[0-9a-f]{12} +Acme, batch · acme +pro", drawn)


@pytest.mark.parametrize(
    ("options", "plans"),
    [
        (("--filter", "ACME"), ["pro"]), (("--filter", "batch"), ["pro"]),
        (("--filter", "k:"), ["pro", "default"]),
        (("--plan", "default"), ["default"]), (("--plan", "default", "--filter", "acme"), []),
    ],
)  # fmt: skip
async def test_top_shows_those_who_are_looked_for(
    commands: Commands, shared: str, options: tuple[str, ...], plans: list[str]
) -> None:
    """By a part of the name, the label or the account, and by plan."""

    async def look() -> None:
        said = await asyncio.to_thread(commands.json, "top", *options, "--settings", shared)
        assert [caller["plan"] for caller in said["callers"]] == plans
        printed = await asyncio.to_thread(commands.good, "top", *options, "--settings", shared)
        assert ("no caller that fits the filter sent" in printed) is (not plans)

    await with_traffic(shared, look)


def watched(file: str, columns: int, steps: Sequence[tuple[str, str]] = ()) -> tuple[bytes, int]:
    """Run `top` on a terminal of `columns` columns; return its output and its exit status.

    Each step presses keys and then waits until `top` draws a text. Without steps, `top` is ended after two
    looks.
    """
    command = [sys.executable, "-m", "ratelimit_mw", "top", "--interval", "0.5", "--settings", file]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell has its background jobs ignore
        os.execve(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    drawn = b""
    try:
        for keys, awaited in steps:
            before = len(drawn)
            os.write(terminal, keys.encode())
            deadline = time.monotonic() + 90
            while awaited and awaited.encode() not in drawn[before:] and time.monotonic() < deadline:
                drawn += read(terminal)
            assert awaited.encode() in drawn, f"no {awaited!r} after {keys!r}"
        if not steps:
            deadline = time.monotonic() + 90
            while drawn.count(b"nearest limit") < 2 and time.monotonic() < deadline:
                drawn += read(terminal)
            os.kill(pid, signal.SIGINT)
        while data := read(terminal, 10):
            drawn += data
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    return drawn, status


def read(terminal: int, seconds: float = 0.2) -> bytes:
    """Return the output that comes within so many seconds; nothing once the other side has ended."""
    try:
        return os.read(terminal, 65_536) if select.select([terminal], [], [], seconds)[0] else b""
    except OSError:
        return b""
