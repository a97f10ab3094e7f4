"""One request with early and late limits, money, units and a slot, refused at each of them in turn."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_mw import Limit, Limiter, RateLimitMiddleware, by, get_lease, limited
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import Allowance, Slots
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.asgi import client_of, settings_of
from tests.support.conformance import KINDS, Bench, SharedServer, opened
from tests.support.servers import server_binaries
from tests.support.topologies import Cluster

SETTINGS = """
    backend.timeout = 10
    [plans.default]
    requests = ["50/minute"]
    concurrent = 5
    units = { tokens = ["5000/minute"] }
    spending = { daily = "9.00" }
    [application]
    requests = ["500/minute"]
    [[routes]]
    path = "/{id}"
    cost = 2
    price = "0.40"
    units = { tokens = 100 }
    requests = ["40/minute"]
    total = ["400/minute"]
"""
EARLY = Limit("early", "30/minute", by=by.path("id"), cost=3)
FAILED = Limit("failed", "30/minute", by=by.address, count="failures")
EVERYONE = Limit("everyone", "30/minute", by=by.everyone)
LATE = Limit("late", "30/minute", cost=4)
MODEL = Limit("model", "3000/minute", unit="tokens", cost=70, concurrent=5)
LATEST = Limit("latest", "30/minute")


@pytest.fixture(params=[*KINDS, *[f"{kind} cluster" for kind in sorted(server_binaries())]])
async def bench(
    request: pytest.FixtureRequest, shared_server: SharedServer, shared_cluster: Callable[[str], Cluster]
) -> AsyncIterator[Bench]:
    """Each kind of backend in turn, clusters too, without any counts."""
    kind, _, cluster = request.param.partition(" ")
    if cluster:
        bench = Bench(request.param, shared_cluster(kind))
        yield bench
        await bench.close()
        return
    async with opened(kind, shared_server) as bench:
        yield bench


async def handler(request: Request) -> Response:
    """Charge what only the handler knows, in two steps."""
    lease = get_lease(request)
    await lease.charge(LATE.on("x"), MODEL.on("m"))
    await lease.charge(LATEST.on("x"))
    return PlainTextResponse("ok", 401)


def counters_of(app: RateLimitMiddleware) -> dict[str, Counter]:
    """Every counter that the request meets, by a name."""
    engine = app.limiter.engine
    policy = engine.policies.match(engine.identity_of(api_key="a"), "GET", "/7")
    found = list(policy.priced_charge.counters)
    for extended in engine.live.rules.code_limits._extended.values():
        found += [each for each in extended.priced_charge.counters if each.name]
    return {
        f"{each.partition} {each.scope} {type(each.limit).__name__}": each for each in dict.fromkeys(found)
    }


async def used(bench: Bench, counters: dict[str, Counter]) -> dict[str, tuple[int, int]]:
    """Return what is counted and held of each."""
    found = {}
    for name, counter in counters.items():
        outcome = await bench.peek(counter)
        found[name] = (outcome.used(0), outcome.held(0) if isinstance(counter.limit, Allowance) else 0)
    return found


async def test_refused_at_each_limit_in_turn(bench: Bench) -> None:
    """Any full limit, early or late, leaves nothing of the request charged."""
    app = RateLimitMiddleware(
        Starlette(routes=[Route("/{id}", limited(EARLY, FAILED, EVERYONE)(handler))]),
        limiter=Limiter(settings_of(SETTINGS), backend=bench.backend),
    )
    async with client_of(app, x_api_key="a") as client:
        assert (await client.get("/7")).status_code == 401, "all limits admit it"
        counters = counters_of(app)
        assert len(counters) == 14
        for name, counter in counters.items():
            await app.limiter.engine.forget(counters.values())
            bench.wait(120)
            await settled(bench, counters, dict.fromkeys(counters, (0, 0)))
            reservations = await fill(bench, counter)
            before = await used(bench, counters)
            answer = await client.get("/7")
            assert answer.status_code == 429, name
            await settled(bench, counters, before)
            for reservation in reservations:
                await bench.backend.finish(reservation, EstimateAction.GIVE_BACK)
    await app.limiter.close()


async def fill(bench: Bench, counter: Counter) -> list[Reservation]:
    """Use all that a counter grants; returns what has to be ended."""
    limit = counter.limit
    if isinstance(limit, Slots):
        return [await bench.reserve(counter) for _ in range(limit.limit)]
    if isinstance(limit, Allowance):
        return [await bench.reserve(counter, price=limit.amount)]
    if limit.is_metered:
        reservation = await bench.reserve(counter, **{limit.counts: limit.quota})
        await bench.backend.hold_estimate(reservation)
        return [reservation]
    assert (await bench.acquire(counter, cost=limit.quota)).admitted
    return []


async def settled(bench: Bench, counters: dict[str, Counter], expected: dict[str, tuple[int, int]]) -> None:
    """Wait until so much is counted: what is given back is on its way."""
    found: dict[str, tuple[int, int]] = {}
    for _ in range(500):
        found = await used(bench, counters)
        if found == expected:
            return
        await asyncio.sleep(0.02)
    assert found == expected
