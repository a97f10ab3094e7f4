"""Decisions of one process."""

import asyncio
import os
import threading
import tomllib
from collections.abc import Callable, Coroutine
from itertools import pairwise

from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.observe.decision_counts import MAX_CALLERS, MAX_TOUCHED, PIECE, DecisionCounts
from ratelimit_mw._internal.settings import Settings
from tests.support.asgi import Down, settings_of

SETTINGS = Settings(
    **tomllib.loads("""
plans.default.requests = ["2/minute"]
plans.trial = { requests = ["1/minute"], shadow = true }
plans.busy = { concurrent = 1, spending = { daily = "1.00" } }
keys = [{ key = "trial", plan = "trial" }, { key = "busy", plan = "busy" }]
routes = [{ path = "/v1/{x}", price = "2.00" }]
""")
)


async def test_every_decision_is_counted_by_plan_route_outcome_and_limit() -> None:
    """Totals tell who was refused by which limit on which route, and what shadow mode let through."""
    limiter = Limiter(SETTINGS)
    for _ in range(3):
        await limiter.acquire(api_key="someone", address="10.0.0.1", path="/v1/a")
    await limiter.acquire(api_key="someone else", address="10.0.0.1", path="/v2")
    for _ in range(2):
        await limiter.acquire(api_key="trial")
    await limiter.acquire(api_key="busy", path="/v1/b")
    for _ in range(2):
        await limiter.acquire(api_key="busy")

    assert limiter.engine.decision_counts.totals() == {
        ("default", "/v1/{x}", "admitted", ""): 2,
        ("default", "/v1/{x}", "rate", "2/minute"): 1,
        ("default", "", "admitted", ""): 1,
        ("trial", "", "admitted", ""): 1,
        ("trial", "", "shadow", "1/minute"): 1,
        ("busy", "/v1/{x}", "cost", "daily"): 1,
        ("busy", "", "admitted", ""): 1,
        ("busy", "", "concurrency", "slots"): 1,
    }


async def test_callers_are_taken_once() -> None:
    """Each caller's counts, over all routes, are handed out with the identity, and begin anew."""
    limiter = Limiter(SETTINGS)
    for path in ("/v1/a", "/v2", "/v2"):
        await limiter.acquire(api_key="someone", address="10.0.0.1", path=path)

    (taken,) = limiter.engine.decision_counts.take_callers()

    assert taken[0].partition.startswith("k:")
    assert taken[1] == {"admitted": 2, "rate": 1}
    assert limiter.engine.decision_counts.take_callers() == []
    await limiter.acquire(api_key="trial")
    assert [counts for _, counts in limiter.engine.decision_counts.take_callers()] == [{"admitted": 1}]
    assert sum(limiter.engine.decision_counts.totals().values()) == 4


async def test_of_very_many_callers_the_busiest_are_kept() -> None:
    """However many keys are invented between two readings, memory is bounded and the busiest are seen."""
    limiter = Limiter(SETTINGS)
    for _ in range(3):
        await limiter.acquire(api_key="busiest", address="10.0.0.1")
    for number in range(12_000):
        await limiter.acquire(api_key=f"invented {number}", address="10.0.0.1")

    taken = limiter.engine.decision_counts.take_callers()

    assert len(taken) <= MAX_CALLERS
    assert {"admitted": 2, "rate": 1} in [counts for _, counts in taken]
    assert sum(limiter.engine.decision_counts.totals().values()) == 12_003


async def test_a_report_adds_up_thousands_of_callers_in_pieces() -> None:
    """No turn of the event loop adds up more than a piece, neither of a report nor of the requests before."""
    engine = Limiter(SETTINGS).engine
    decision_counts = engine.decision_counts
    most = 0
    for number in range(10_000):
        identity = engine.identity_of(api_key=f"caller {number}", address="10.0.0.1")
        decision_counts.admit(engine.policies.match(identity, "GET", "/v2"))
        most = max(most, decision_counts.waiting)
    assert PIECE < most <= MAX_TOUCHED
    waiting = [decision_counts.waiting]

    async def look() -> None:
        while waiting[-1]:
            await asyncio.sleep(0)
            waiting.append(decision_counts.waiting)

    await asyncio.gather(look(), engine.reporter.report())
    assert max(before - after for before, after in pairwise(waiting)) == PIECE
    assert sum(decision_counts.totals().values()) == 10_000


async def test_a_first_refusal_that_has_all_added_up_is_counted_itself() -> None:
    """A first refusal that makes room by adding policies up, its own too, is not lost."""
    limiter = Limiter(SETTINGS)
    last = f"key {MAX_TOUCHED - 1}"
    for number in range(MAX_TOUCHED):
        await limiter.acquire(api_key=f"key {number}")
    assert limiter.engine.decision_counts.waiting == MAX_TOUCHED, "the next policy finds no room"

    for _ in range(2):
        await limiter.acquire(api_key=last)

    assert limiter.engine.decision_counts.waiting < MAX_TOUCHED, "some were added up"
    assert limiter.engine.decision_counts.totals() == {
        ("default", "", "admitted", ""): MAX_TOUCHED + 1,
        ("default", "", "rate", "2/minute"): 1,
    }


async def test_what_the_backend_is_not_asked_about_is_counted() -> None:
    """Requests of blocked callers and of an outage are decisions as all others are; exempt ones are none."""
    settings = settings_of("""
    plans.default.requests = ["2/minute"]
    plans.open = { requests = ["2/minute"], on_failure = "allow" }
    plans.closed = { requests = ["2/minute"], on_failure = "deny" }
    plans.blocked = { blocked = true }
    [[keys]]
    key = "open"
    plan = "open"
    [[keys]]
    key = "closed"
    plan = "closed"
    [[keys]]
    key = "blocked"
    plan = "blocked"
    [[routes]]
    path = "/health"
    exempt = true
    """)
    limiter = Limiter(settings, backend=Down())
    for _ in range(3):
        await limiter.acquire(api_key="someone", address="10.0.0.1", path="/health")
        await limiter.acquire(api_key="someone", address="10.0.0.1")
        for api_key in ("open", "closed", "blocked"):
            await limiter.acquire(api_key=api_key)

    assert limiter.engine.decision_counts.totals() == {
        ("default", "", "admitted", ""): 2,
        ("default", "", "rate", "2/minute"): 1,
        ("open", "", "admitted", ""): 3,
        ("closed", "", "unavailable", ""): 3,
        ("blocked", "", "blocked", ""): 3,
    }
    await limiter.close()


async def test_a_piece_is_added_up_at_a_time() -> None:
    """A reader is told whether anything is left to add up."""
    engine = Limiter(SETTINGS).engine
    for number in range(PIECE + 1):
        identity = engine.identity_of(api_key=f"caller {number}", address="10.0.0.1")
        engine.decision_counts.admit(engine.policies.match(identity, "GET", "/v2"))
    assert [engine.decision_counts.add_up_some(), engine.decision_counts.waiting] == [True, 1]
    assert [engine.decision_counts.add_up_some(), engine.decision_counts.waiting] == [False, 0]


async def test_another_thread_may_read() -> None:
    """No lock is held once a request is counted."""
    limiter = Limiter(SETTINGS)
    for _ in range(2):
        await limiter.acquire(api_key="busy")
    totals: list[int] = []
    reader = threading.Thread(
        target=lambda: totals.append(sum(limiter.engine.decision_counts.totals().values())), daemon=True
    )
    reader.start()
    await asyncio.to_thread(reader.join, 10)
    assert totals == [2]


def test_a_child_process_counts_anew() -> None:
    """Counts from before a fork are told by the parent alone, whether they were added up or not."""
    limiter = Limiter(SETTINGS)
    decision_counts = limiter.engine.decision_counts

    async def use(api_key: str, number: int = 1) -> None:
        for _ in range(number):
            await limiter.acquire(api_key=api_key, address="10.0.0.1")

    asyncio.run(use("added up"))
    decision_counts.totals()
    asyncio.run(use("admitted"))
    asyncio.run(use("refused", 3))
    child = os.fork()
    if not child:
        os._exit(0 if _counts_anew(decision_counts, use) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sum(decision_counts.totals().values()) == 5


def _counts_anew(decision_counts: DecisionCounts, use: Callable[[str], Coroutine[None, None, None]]) -> bool:
    """Whether a child process counts its own decisions alone."""
    before = decision_counts.totals(), decision_counts.take_callers()
    asyncio.run(use("admitted"))
    asyncio.run(use("refused"))
    expected = {("default", "", "admitted", ""): 1, ("default", "", "rate", "2/minute"): 1}
    return before == ({}, []) and decision_counts.totals() == expected
