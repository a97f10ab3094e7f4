"""Decisions of one process."""

import asyncio
import tomllib
from itertools import pairwise

from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.observe.decision_counts import MAX_CALLERS, MAX_TOUCHED, PIECE
from ratelimit_mw._internal.settings import Settings

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

    assert limiter.engine.tally.totals() == {
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

    (taken,) = limiter.engine.tally.take_callers()

    assert taken[0].partition.startswith("k:")
    assert taken[1] == {"admitted": 2, "rate": 1}
    assert limiter.engine.tally.take_callers() == []
    await limiter.acquire(api_key="trial")
    assert [counts for _, counts in limiter.engine.tally.take_callers()] == [{"admitted": 1}]
    assert sum(limiter.engine.tally.totals().values()) == 4


async def test_of_very_many_callers_the_busiest_are_kept() -> None:
    """However many keys are invented between two readings, memory is bounded and the busiest are seen."""
    limiter = Limiter(SETTINGS)
    for _ in range(3):
        await limiter.acquire(api_key="busiest", address="10.0.0.1")
    for number in range(12_000):
        await limiter.acquire(api_key=f"invented {number}", address="10.0.0.1")

    taken = limiter.engine.tally.take_callers()

    assert len(taken) <= MAX_CALLERS
    assert {"admitted": 2, "rate": 1} in [counts for _, counts in taken]
    assert sum(limiter.engine.tally.totals().values()) == 12_003


async def test_a_report_adds_up_thousands_of_callers_in_pieces() -> None:
    """No turn of the event loop adds up more than a piece, neither of a report nor of the requests before."""
    engine = Limiter(SETTINGS).engine
    tally = engine.tally
    most = 0
    for number in range(10_000):
        identity = engine.identity_of(api_key=f"caller {number}", address="10.0.0.1")
        tally.admit(engine.policies.match(identity, "GET", "/v2"))
        most = max(most, tally.waiting)
    assert PIECE < most <= MAX_TOUCHED
    waiting = [tally.waiting]

    async def look() -> None:
        while waiting[-1]:
            await asyncio.sleep(0)
            waiting.append(tally.waiting)

    await asyncio.gather(look(), engine.reporter.report())
    assert max(before - after for before, after in pairwise(waiting)) == PIECE
    assert sum(tally.totals().values()) == 10_000


async def test_a_first_refusal_that_has_all_added_up_is_counted_itself() -> None:
    """A first refusal that makes room by adding policies up, its own too, is not lost."""
    limiter = Limiter(SETTINGS)
    last = f"key {MAX_TOUCHED - 1}"
    for number in range(MAX_TOUCHED):
        await limiter.acquire(api_key=f"key {number}")
    assert limiter.engine.tally.waiting == MAX_TOUCHED, "the next policy that is counted on finds no room"

    for _ in range(2):
        await limiter.acquire(api_key=last)

    assert limiter.engine.tally.waiting < MAX_TOUCHED, "some were added up"
    assert limiter.engine.tally.totals() == {
        ("default", "", "admitted", ""): MAX_TOUCHED + 1,
        ("default", "", "rate", "2/minute"): 1,
    }
