"""Metered units while the backend is away: estimated and settled here, and told to it afterwards."""

from collections.abc import AsyncIterator

import pytest

from ratelimit_mw import Lease, Limit, RateLimited
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import WindowStatus
from tests.unit.test_local import MakePair, Pair

SETTINGS = """
plans.default = { requests = ["99/minute"], units = { tokens = ["1000/minute", "5000/day"] } }
routes = [{ path = "/chat", units = { tokens = 300 } }]
"""


@pytest.fixture
async def make() -> AsyncIterator[MakePair]:
    """Make limiters whose backend can be taken away."""
    make = MakePair()
    yield make
    for pair in make.made:
        pair.backend.away = False  # or closing would wait for it
        await pair.limiter.close()


async def chat(pair: Pair) -> Lease:
    """Ask for one completion."""
    return await pair.limiter.acquire(api_key="a", path="/chat")


def end(pair: Pair, lease: Lease, *, failed: bool = False) -> None:
    """End its request as the middleware does."""
    pair.limiter.engine.leases.end(lease, failed)


async def used(pair: Pair) -> list[int]:
    """Tokens of both windows in the shared backend."""
    _, *tokens = await pair.statuses()
    return [status.used for status in tokens if isinstance(status, WindowStatus)]


async def test_estimates_and_settles_count_here(make: MakePair) -> None:
    """From what was last known, and as exactly as in the shared backend."""
    pair = make(SETTINGS)
    await (await chat(pair)).settle(units={"tokens": 400})
    pair.backend.away = True
    first, second, third = await chat(pair), await chat(pair), await chat(pair)
    assert [first.allowed, second.allowed, third.allowed] == [True, True, False]
    await first.settle(units={"tokens": 10})
    await first.settle(units={"tokens": 10})
    assert (await chat(pair)).allowed


async def test_what_was_settled_meanwhile_is_told(make: MakePair) -> None:
    """Requests that have ended count what they have used: settled, kept, or nothing where they failed."""
    pair = make(SETTINGS)
    pair.backend.away = True
    settled, kept, failed = await chat(pair), await chat(pair), await chat(pair)
    await settled.settle(units={"tokens": 70})
    end(pair, settled)
    end(pair, kept)
    end(pair, failed, failed=True)
    await pair.back()
    assert await used(pair) == [370, 370]


@pytest.mark.parametrize("share", ["1.0", "0.7"])
async def test_a_request_that_outlives_the_outage_settles_afterwards(make: MakePair, share: str) -> None:
    """Its estimate is told, and corrected once in the shared backend."""
    pair = make(f"backend.local_share = {share}\n{SETTINGS}")
    pair.backend.away = True
    running, settled = await chat(pair), await chat(pair)
    await settled.settle(units={"tokens": 20})
    await pair.back()
    assert await used(pair) == [320, 320]
    await running.settle(units={"tokens": 500})
    await running.settle(units={"tokens": 500})
    end(pair, running)
    end(pair, settled)
    assert await used(pair) == [520, 520]


async def test_what_an_outage_admitted_is_given_back_as_the_whole_limit_counts_it(make: MakePair) -> None:
    """A share may be counted to the microsecond where the whole limit is counted by parts of its window."""
    text = SETTINGS.replace("1000/minute", "20000/minute").replace("5000/day", "50000/day")
    pair = make(f"backend.local_share = 0.04\n{text}")
    pair.backend.away = True
    running = await chat(pair)
    assert running.allowed
    await pair.back()
    pair.clock.now += 10_000
    assert (await chat(pair)).allowed
    await running.settle(units={"tokens": 20})
    assert (await used(pair))[0] == 320


async def test_what_runs_since_an_outage_counts_in_the_next_one(make: MakePair) -> None:
    """Estimates that the backend was not told of are added to the counts known when it goes again."""
    pair = make(f"backend.local_share = 1.0\n{SETTINGS}")
    pair.backend.away = True
    assert [(await chat(pair)).allowed for _ in range(2)] == [True, True]
    pair.backend.away = False
    pair.clock.set(1)
    assert (await chat(pair)).allowed
    pair.backend.away = True
    pair.clock.set(2)
    assert not (await chat(pair)).allowed


async def test_an_end_while_units_are_told(make: MakePair) -> None:
    """A request that ends in the very moment in which the backend learns of it counts its units once."""
    pair = make(SETTINGS)
    pair.backend.away = True
    lease = await chat(pair)
    pair.backend.away = False
    decide = pair.backend.decide
    ended: list[Lease] = []

    async def slow(charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        outcome = decide(charge, lease_id, price)
        if lease_id == lease.reservation.id:
            await lease.settle(units={"tokens": 20})
            end(pair, lease)
            ended.append(lease)
        return outcome

    pair.backend.restore = slow  # type: ignore[method-assign]
    for _ in range(2):
        await pair.back()
    assert ended == [lease]
    assert await used(pair) == [20, 20]


async def test_a_job_of_an_outage_settles_by_its_token(make: MakePair) -> None:
    """Before the backend knows of it and after."""
    pair = make(SETTINGS)
    pair.limiter.engine.leases.token_store = pair.limiter.engine.decider.local.reconciler
    pair.backend.away = True
    early, late = await chat(pair), await chat(pair)
    tokens = [await early.detach(ttl=60), await late.detach(ttl=60)]
    await pair.limiter.settle(tokens[0], units={"tokens": 5})
    await pair.back()
    assert await used(pair) == [305, 305]
    await pair.limiter.settle(tokens[1], units={"tokens": 50})
    await pair.limiter.settle(tokens[0], units={"tokens": 6})
    assert await used(pair) == [55, 55]


async def test_a_flapping_backend_ends_with_the_exact_sum(make: MakePair) -> None:
    """Whenever it is away, admitted or settled: each request counts what it has used, once."""
    pair = make(SETTINGS.replace("1000/minute", "100000/minute").replace("5000/day", "1000000/day"))
    leases: list[Lease] = []
    total = 0
    for number in range(40):
        pair.backend.away = number % 3 == 1
        if not pair.backend.away:
            await pair.back()
        leases.append(await chat(pair))
        if number >= 5:
            lease, amount = leases[number - 5], 10 * number
            await lease.settle(units={"tokens": amount})
            total += amount
            if number % 2:
                end(pair, lease)
    await pair.back()
    for lease in leases[-5:]:
        end(pair, lease, failed=True)
    assert await used(pair) == [total, total]


async def test_what_is_refused_late_takes_nothing_off_others(make: MakePair) -> None:
    """A request that a late limit refuses gives its own estimate back, and no unit that another has used."""
    pair = make(SETTINGS)
    pair.backend.away = True
    failing = Limit("failing", "1/minute").on("a")
    done, refused = await chat(pair), await chat(pair)
    await done.charge(failing)
    end(pair, done)
    with pytest.raises(RateLimited):
        await refused.charge(failing)
    await pair.back()
    assert await used(pair) == [300, 300]
