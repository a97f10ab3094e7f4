"""The package answers alike whether its modules are compiled or not, and exactly under load."""

import asyncio
import gc
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import weakref
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import time_machine
from starlette.types import Message, Receive, Scope, Send

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw._internal.live.registry import LiveTables
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.runtime.compiled import PURE, is_compiled
from ratelimit_mw._internal.settings import KeySettings
from tests.support.asgi import FakeClock, client_of, limited, ok_app, settings_of, start_of
from tests.support.servers import StoreServer
from tests.support.slots import held, until_async
from tests.support.statuses import counted

ROOT = Path(__file__).parents[2]
HAS_COMPILER = bool(shutil.which("cc")) and Path(sysconfig.get_path("include"), "Python.h").exists()

needs_compiled = pytest.mark.skipif(not is_compiled(), reason="nothing is compiled here")


@pytest.mark.skipif(
    not HAS_COMPILER or PURE in os.environ, reason="there is no C compiler, or it is not wanted"
)
def test_every_module_with_c_types_is_compiled_where_a_compiler_is_at_hand() -> None:
    """An installation with a C compiler compiles each module that has a `.pxd` file."""
    names = [
        ".".join(types.relative_to(ROOT).with_suffix("").parts)
        for types in (ROOT / "ratelimit_mw").rglob("*.pxd")
    ]
    assert len(names) > 10
    files = [Path(str(import_module(name).__file__)) for name in names]
    assert [file for file in files if file.suffix == ".py"] == []
    sources = [ROOT / types.with_suffix(".py") for types in (ROOT / "ratelimit_mw").rglob("*.pxd")]
    stale = [
        each.name
        for file, each in zip(files, sources, strict=True)
        if file.stat().st_mtime < each.stat().st_mtime
    ]
    assert stale == [], "changed since they were compiled: `make .venv/installed` compiles them anew"


def test_it_can_be_left_out() -> None:
    """`RATELIMIT_PURE_PYTHON=1` has Python run the same files."""
    program = "import ratelimit_mw._internal.runtime.compiled as c; print(c.is_compiled())"
    assert _python("-c", program, pure=True).strip() == "False"


@needs_compiled
@pytest.mark.parametrize("seed", range(4))
def test_any_traffic_is_answered_as_uncompiled(seed: int) -> None:
    """Callers, routes, headers, slots, budgets, proxies, errors, late answers, clock steps: each answer, to
    the byte, is the one that the same sources give uncompiled.
    """
    arguments = ("-m", "tests.support.twin_traffic", str(seed), "2500")
    compiled, pure = _python(*arguments), _python(*arguments, pure=True)
    assert compiled.count("\n") == 2500
    assert {status for status in (200, 404, 429, 500) if f'"status", {status}' not in compiled} == set()
    assert compiled == pure


@pytest.mark.parametrize("prefetch", [False, True])
async def test_through_the_middleware_exactly_the_limit_is_admitted(
    server: StoreServer, prefetch: bool
) -> None:
    """A caller who sends more than was sold, many requests at once, is admitted as often as the limit says:
    whether each is asked for or taken ahead.
    """
    limiter = Limiter(
        settings_of(f"""
            backend = {{ url = "{server.url}", timeout = 5.0 }}
            identity.hash_secret = "s"
            plans.default = {{ requests = ["6000/hour"], prefetch = {str(prefetch).lower()} }}
        """)
    )
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    starts: list[Message] = []
    async with limiter:
        for _ in range(63):
            starts += await asyncio.gather(*[start_of(app, b"one") for _ in range(100)])
        assert Counter(start["status"] for start in starts) == {200: 6000, 429: 300}
        assert limiter.engine.decision_counts.totals()["default", "", "admitted", ""] == 6000
    told = [dict(start["headers"])[b"x-ratelimit-remaining"] for start in starts if start["status"] == 200]
    if not prefetch:
        assert sorted(map(int, told)) == list(range(6000))


async def test_two_keys_are_refused_in_whichever_of_many_headers() -> None:
    """However many headers may hold a key, two that differ are ambiguous."""
    names = [f"x-k{number}" for number in range(70)]
    app = limited(f"identity.api_key_headers = {names}\n".replace("'", '"'), FakeClock())
    app.limiter.engine.identify.of_address("192.0.2.1")
    async with client_of(app) as client:
        for other in ("x-k1", "x-k31", "x-k32", "x-k64"):
            assert (await client.get("/", headers={"x-k0": "one"})).status_code == 200
            assert (await client.get("/", headers={"x-k0": "one", other: "two"})).status_code == 400


@pytest.mark.parametrize("is_remembered", [True, False])
async def test_what_is_set_live_counts_at_once(monkeypatch: pytest.MonkeyPatch, is_remembered: bool) -> None:
    """A key gets and loses a plan of its own between two requests, whether its caller is remembered here or
    was forgotten.
    """
    if not is_remembered:
        monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_POLICIES", 1)
        monkeypatch.setattr("ratelimit_mw._internal.policy.identity._MAX_REMEMBERED", 1)
    app = limited('plans = { default.requests = ["5/hour"], pro.requests = ["50/hour"] }', FakeClock())
    live, digest = app.limiter.engine.live, hash_api_key(b"one", "")
    told: list[bytes] = []
    for keys in ({}, {digest: KeySettings(hash=digest, plan="pro")}, {}):
        live._put(live.rules.with_registered(LiveTables(keys)))
        starts = [await start_of(app, key) for key in (b"one", b"two", b"three")]
        told += [dict(start["headers"])[b"x-ratelimit-limit"] for start in starts]
    assert told == [b"5"] * 3 + [b"50"] + [b"5"] * 5


async def test_a_refusal_under_way_keeps_the_settings_it_began_with(server: StoreServer) -> None:
    """Settings that come in force while the backend is asked don't change how the answer is written."""
    table = f'backend = {{ url = "{server.url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n'
    table += 'plans.default = { requests = ["3/minute"] }\n'
    limiter = Limiter(settings_of(table))
    limiter.engine.identify._read_address.looks = 0
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    async with limiter:
        for _ in range(3):
            assert (await start_of(app, b"one"))["status"] == 200
        refused = asyncio.create_task(start_of(app, b"one"))
        await asyncio.sleep(0)  # it is under way
        limiter.apply(settings_of(table + '[response]\nbody = "problem"\n'))
        await start_of(app, b"two")
        start = await refused
    assert start["status"] == 429
    assert dict(start["headers"])[b"content-type"] == b"application/json"


async def test_a_refusal_met_again_tells_the_time_that_is_left(server: StoreServer) -> None:
    """While the server is not asked, a refused caller is told a wait that shrinks, and is counted."""
    table = f'backend = {{ url = "{server.url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n'
    table += 'plans.default = { requests = ["3/minute"] }\n'
    limiter = Limiter(settings_of(table))
    limiter.engine.identify._read_address.looks = 0
    seconds = 100.0
    limiter.engine.refusals.now = lambda: seconds
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    async with limiter:
        statuses = [(await start_of(app, b"one"))["status"] for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        policy = limiter.engine.policies.match(
            limiter.engine.identity_of(api_key="one", address="192.0.2.1"), "GET", "/"
        )
        waits: list[int] = []
        for later in (0.0, 0.000_000_4, 0.001, 0.25, 0.9):
            seconds = 100.0 + later
            start = await start_of(app, b"one")
            assert start["status"] == 429
            waits.append(int(dict(start["headers"])[b"retry-after-ms"]))
        passed = [waits[0] - wait for wait in waits]
        assert passed == [0, 0, 1, 250, 900]
        assert limiter.engine.decision_counts.totals()["default", "", "rate", "3/minute"] == 7
        seconds = 101.1
        assert (await start_of(app, b"one"))["status"] == 429
        assert limiter.engine.refusals.by_charge[policy.charge].received == seconds, "the server was asked"


async def test_what_a_request_held_comes_back_whenever_it_is_cancelled(server: StoreServer) -> None:
    """A request that ends frees its slot, and one cancelled before the app gives all back."""
    entered = 0

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal entered
        entered += 1
        await asyncio.sleep(0)
        await ok_app()(scope, receive, send)

    table = f'backend = {{ url = "{server.url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n'
    table += 'plans.default = { requests = ["9000/hour"], concurrent = { limit = 500, lease = 600 } }\n'
    limiter = Limiter(settings_of(table))
    limiter.engine.identify._read_address.looks = 0
    app = RateLimitMiddleware(answer, limiter=limiter)
    async with limiter:
        for _ in range(3):
            assert (await start_of(app, b"one"))["status"] == 200
        turns = cancelled_before = 0
        while entered < 20:  # with ever more time to get there, however slow the server is
            before = entered
            task = asyncio.create_task(start_of(app, b"one"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            cancelled_before += entered == before
            turns += 1 + turns // 16
        assert app._lifespan.active == 0
        assert cancelled_before > 1
        await until_async(lambda: held(server) == 0)
        policy = limiter.engine.policies.match(
            limiter.engine.identity_of(api_key="one", address="192.0.2.1"), "GET", "/"
        )
        assert [counted(limit_status) for limit_status in (await limiter.engine.peek(policy)).limits] == [
            entered,
            0,
        ]


async def test_a_block_is_not_spent_after_its_time(server: StoreServer) -> None:
    """Units taken ahead are left alone once their time is over, however many there are."""
    table = f'backend = {{ url = "{server.url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n'
    table += 'plans.default = { requests = ["100000/hour"], prefetch = true }\n'
    limiter = Limiter(settings_of(table))
    limiter.engine.identify._read_address.looks = 0
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    async with limiter:
        policy = limiter.engine.policies.match(
            limiter.engine.identity_of(api_key="one", address="192.0.2.1"), "GET", "/"
        )
        prefetch_state = policy.prefetch_state
        assert prefetch_state is not None
        for _ in range(2_000):
            await start_of(app, b"one")
            if prefetch_state.block is not None and prefetch_state.block.left > 2:
                break
        block = prefetch_state.block
        assert block is not None
        block.until = 0.0
        assert (await start_of(app, b"one"))["status"] == 200
        assert prefetch_state.block is not block


def _python(*arguments: str, pure: bool = False) -> str:
    environment = {name: value for name, value in os.environ.items() if name != PURE}
    if pure:
        environment[PURE] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout


async def test_a_test_of_an_app_may_move_the_clock() -> None:
    """The memory backend goes by a clock that a library for tests stops or moves.

    The second request over the limit is refused like the first, and the window is over when the clock says
    so.
    """
    with time_machine.travel("2024-01-15 10:00:00Z", tick=False) as clock:
        app = RateLimitMiddleware(ok_app(), settings_of('plans.default.requests = ["2/minute"]'))

        async def meet(number: int) -> list[int]:
            return [(await start_of(app, b"one"))["status"] for _ in range(number)]

        assert await meet(5) == [200, 200, 429, 429, 429]
        clock.shift(60)
        assert await meet(4) == [200, 200, 429, 429]
        await app.limiter.close()


def test_what_nobody_uses_any_more_is_freed() -> None:
    """An app that was closed and dropped takes its limiter along, whoever it has met."""

    async def serve() -> tuple[weakref.ref[object], weakref.ref[object]]:
        app = RateLimitMiddleware(ok_app(), settings_of(""))
        for key in (b"one", b"one", b"two"):
            await start_of(app, key)
        await app.limiter.close()
        return weakref.ref(app), weakref.ref(app.limiter.engine.backend)

    seen = asyncio.run(serve())
    gc.collect()
    assert [each() for each in seen] == [None, None]


async def test_a_refusal_is_counted_though_another_thread_reads(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a reader of the figures comes in between, each refusal is counted once."""
    logger, limiters = logging.getLogger("ratelimit_mw"), list[Limiter]()
    is_enabled_for = logger.isEnabledFor

    def read_first(level: int) -> bool:
        for limiter in limiters:
            limiter.engine.decision_counts.totals()
        return is_enabled_for(level)

    monkeypatch.setattr(logger, "isEnabledFor", read_first)
    text = f'backend = {{ url = "{server.url}", timeout = 5.0 }}\nidentity.hash_secret = "s"\n'
    app = RateLimitMiddleware(ok_app(), settings_of(f'{text}plans.default.requests = ["2/minute"]'))
    async with app.limiter as limiter:
        limiters.append(limiter)
        for _ in range(22):
            await start_of(app, b"one")
        assert limiter.engine.decision_counts.totals()["default", "", "rate", "2/minute"] == 20
