"""The benchmark measures what it says: floors that answer as we do, callers that are really in Redis."""

import asyncio

import pytest
from starlette.types import Message

from benchmarks.apps import (
    EXHAUSTED,
    SETTINGS,
    answer_of,
    bare,
    chat,
    knock,
    ours,
    same_headers,
    same_refusal,
    settings_of,
)
from benchmarks.load import PATH, Load, Sample
from benchmarks.measure import Case, Cpu, Measurement, Result, figures_of
from benchmarks.report import Line
from benchmarks.stored import store
from ratelimit_mw import Limiter, RateLimitMiddleware
from tests.support.asgi import client_of
from tests.support.processes import HOST, free_port
from tests.support.servers import StoreServer

pytestmark = pytest.mark.rerun


def shape(answer: list[Message]) -> tuple[int, list[tuple[bytes, int]], int]:
    """Status, names of headers with the lengths of their values, length of the body."""
    start, body = answer
    return start["status"], [(name, len(value)) for name, value in start["headers"]], len(body["body"])


def measurement(rate: float, app_us: float, redis_us: float = 0.0, p50: float = 0.0) -> Measurement:
    """One of a second."""
    return Measurement(
        Sample(round(rate), 1.0, p50, 0.0, 0, 0), Cpu(app_us - 10, 10.0), Cpu(redis_us, 0.0), 0.5
    )


def test_floor_of_admissions_has_our_headers() -> None:
    """The app with constant headers answers as the middleware does: the same names, values as long."""
    assert shape(answer_of(same_headers(), 2)) == shape(answer_of(ours(SETTINGS["memory"]), 2))


def test_floor_of_refusals_is_our_refusal() -> None:
    """The raw refusal is the middleware's own: status, names, lengths of values, length of the body."""
    real = answer_of(ours(lambda: settings_of("memory://", f"{EXHAUSTED}/hour")), EXHAUSTED + 3)
    floor = shape(answer_of(same_refusal()))
    assert floor == shape(real)
    assert floor[0] == 429


def test_floor_of_admissions_needs_the_app() -> None:
    """But for the headers that we add, it is the bare app's answer."""
    _, headers, body = shape(answer_of(bare()))
    status, with_ours, same_body = shape(answer_of(same_headers()))
    assert (status, with_ours[: len(headers)], same_body) == (200, headers, body)
    assert len(with_ours) == len(headers) + 3


def test_priced_request_is_priced() -> None:
    """Each request of the variant with a price holds it."""
    prices: list[int] = []
    app = ours(
        lambda: settings_of("memory://", "100/hour", price="0.5"),
        on_decision=lambda made: prices.append(made.decision.price_micros),
    )
    answer_of(app)
    assert prices == [500_000]


async def test_app_of_websockets_is_limited_by_the_key() -> None:
    """A WebSocket of the load is counted under the key that the load names."""
    keys: list[str | None] = []
    settings = settings_of("memory://", "100/hour")
    limiter = Limiter(settings, on_decision=lambda made: keys.append(made.identity.api_key_hash))
    app = RateLimitMiddleware(chat, limiter=limiter)
    for caller in (0, 1, 0):
        await knock(app, caller)
    await asyncio.sleep(0)
    first, second, third = keys
    assert first == third != second


async def test_stored_callers_are_those_of_the_middleware(redis_server: StoreServer) -> None:
    """Callers that were put into Redis are the ones that the load names, each with one request counted."""
    settings = settings_of(redis_server.url, "100/hour", "1000/day", slots=5)
    await store(settings, 20)
    async with Limiter(settings) as limiter:
        app = RateLimitMiddleware(bare(), limiter=limiter)
        left = {}
        for number in (0, 19, 20):
            async with client_of(app, x_api_key=f"key-{number}") as client:
                left[number] = (await client.get(PATH)).headers["x-ratelimit-remaining"]
    assert left == {0: "98", 19: "98", 20: "99"}


async def test_storing_leaves_no_slots(redis_server: StoreServer) -> None:
    """Of a caller that was put into Redis the windows are there, and no slot is taken."""
    await store(settings_of(redis_server.url, "100/hour", "1000/day", slots=5), 20)
    with redis_server.client() as client:
        assert len(list(client.scan_iter("*:w:*"))) == 40
        assert not list(client.scan_iter("*:s:*"))


async def test_storing_fails_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing fails if Redis does not count the callers: a sweep would be of an empty Redis."""
    monkeypatch.setattr("benchmarks.stored.PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="3 of 3"):
        await store(settings_of(f"redis://{HOST}:{free_port()}/0", "100/hour"), 3)


def test_figures_are_of_both_neighbours() -> None:
    """A measurement is compared with the mean of the bare app's just before and just after it."""
    bares = (measurement(9000, 90, p50=400), measurement(11000, 110, p50=600))
    figures = figures_of(measurement(8000, 150, 20, p50=750), bares)
    told = {name: figures[name] for name in ("share", "cpu", "redis_cpu", "added_us", "app_system_us")}
    assert told == {"share": 0.8, "cpu": 1.5, "redis_cpu": 0.2, "added_us": 250, "app_system_us": 10}


@pytest.mark.parametrize(
    ("shares", "expected"), [((0.7,), (0.7, 0.7, 0.7)), ((0.9, 0.5, 0.6, 0.7, 0.8), (0.6, 0.7, 0.8))]
)
def test_medians_tell_their_spread(shares: tuple[float, ...], expected: tuple[float, ...]) -> None:
    """Beside the median of all rounds are the quartiles; of one round all are the same."""
    result = Result()
    for share in shares:
        result.add(Sample(1, 1.0, 0, 0, 0, 0), {"share": share, "cpu": 1 / share})
    medians = result.medians()
    assert (medians["share_q1"], medians["share"], medians["share_q3"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("figure", "floor", "verdict"),
    [
        (1.3, 1.2, "met"),
        (1.2, 1.3, "MISSED"),
        (1.2, 1.29, "MISSED, by the floor too"),
        (1.2, None, "MISSED"),
        (None, 1.2, ""),
    ],
)
def test_missed_goal_is_told_from_an_unreachable_one(
    figure: float | None, floor: float | None, verdict: str
) -> None:
    """A goal that even the floor misses is said to be such."""
    assert Line("refusing", figure, 1.3, floor=floor).verdict == verdict


def test_server_is_shared_by_those_who_meet_the_same_callers() -> None:
    """A server is shared by loads of the same callers only: other callers would push remembered ones out."""
    case, busy = Case("redis-2", Load(callers=10_000)), Case("redis-2", Load(connections=1, callers=10_000))
    assert case.server == busy.server
    assert case.server != Case("redis-2", Load(callers=1_000_000)).server
    assert case.first.load.seconds * 1000 >= 10_000
    assert case.bare == Case("bare", Load(callers=1))
