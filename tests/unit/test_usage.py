"""`operations.usage_path`: a caller reads how it stands, for nothing, and cannot flood it."""

import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Scope

from ratelimit_mw import Identity, KeyEntry, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.asgi.usage import EACH_ADDRESS, EACH_CALLER
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from tests.conftest import StartServer
from tests.support.asgi import (
    START,
    Counting,
    Down,
    FakeClock,
    client_of,
    limited,
    limiter_of,
    ok_app,
    settings_of,
    shown,
    statuses,
)
from tests.support.topologies import Cluster

SETTINGS = """
[operations]
usage_path = "/limits"
[application]
requests = ["5000/minute"]
[identity]
per_address = ["2000/minute"]
[plans.default]
requests = ["60/minute", "1000/hour"]
concurrent = { limit = 5, unit = "prediction" }
spending = { daily = "25.00", monthly = "100" }
[plans.anonymous]
requests = ["5/minute"]
[[keys]]
key = "listed"
plan = "default"
[[routes]]
path = "/v1/search"
methods = ["POST", "GET"]
requests = ["20/second"]
total = ["4000/minute"]
[[routes]]
path = "/v1/search"
methods = ["GET", "POST"]
requests = ["20/second"]
[[routes]]
path = "/priced"
price = "0.50"
"""


async def usage_of(client: httpx.AsyncClient, path: str = "/limits") -> Any:
    """Return the usage that the caller is told."""
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rate(policy: str, used: int, limit: int, window: int, reset: int = START) -> dict[str, Any]:
    """Return a rate as the usage tells it."""
    remaining = limit - used
    told = {"policy": policy, "limit": limit, "used": used, "remaining": remaining}
    return {**told, "window": window, "reset": reset}


async def test_a_caller_reads_all_that_is_its_own() -> None:
    """Plan, rates, slots and budgets with what is used of each; amounts are decimal strings."""
    clock = FakeClock()
    app = limited(SETTINGS, clock)
    running = await app.limiter.acquire(api_key="listed", path="/priced")
    done = await app.limiter.acquire(api_key="listed", path="/priced")
    await done.settle("0.031")
    await done.release()
    async with client_of(app, x_api_key="listed") as client:
        await client.post("/v1/search")
        told = await usage_of(client)
    assert running.allowed
    day, month = told["spending"][0].pop("reset"), told["spending"][1].pop("reset")
    assert (day - START, month - START) == (50_460, 1_432_860)
    assert told == {
        "plan": "default",
        "requests": [
            rate("60/minute", 3, 60, 60, START + 60),
            rate("1000/hour", 3, 1000, 3600, START + 3600),
        ],
        "concurrent": {"unit": "prediction", "limit": 5, "active": 1, "remaining": 4},
        "spending": [
            {"period": "daily", "currency": "USD", "limit": "25.00", "spent": "0.031", "held": "0.50"}
            | {"remaining": "24.469"},
            {"period": "monthly", "currency": "USD", "limit": "100.00", "spent": "0.031", "held": "0.50"}
            | {"remaining": "99.469"},
        ],
        "routes": [
            {
                "path": "/v1/search",
                "methods": ["GET", "POST"],
                "requests": [rate("20/second", 1, 20, 1, START + 1)],
            }
        ],
        "address": [],
    }
    await running.release()


async def test_what_all_callers_share_is_not_told() -> None:
    """Limits of the application and totals of routes are nobody's own."""
    async with client_of(limited(SETTINGS, FakeClock()), x_api_key="listed") as client:
        text = (await client.get("/limits")).text
    assert "20/second" in text
    assert "5000" not in text
    assert "4000" not in text


async def test_reading_costs_nothing() -> None:
    """However often it is read, nothing is used: no unit, no slot, no money."""
    app = limited(SETTINGS, FakeClock())
    async with client_of(app, x_api_key="listed") as client:
        await client.get("/")
        first = await usage_of(client)
        for _ in range(20):
            assert await usage_of(client) == first
        assert shown(await client.get("/"))[:2] == ("60", "58")


async def test_headers_are_those_of_any_response() -> None:
    """`X-RateLimit-*` tell of the nearest limit of the plan, and no cache keeps the answer."""
    async with client_of(limited(SETTINGS, FakeClock()), x_api_key="listed") as client:
        before = await client.get("/")
        answer = await client.get("/limits")
    assert shown(answer) == shown(before)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"


async def test_spending_near_its_end_shows_in_the_headers_too() -> None:
    """A budget that has reached its `warn_at` is told of as in any response."""
    text = """
        operations = {usage_path = "/limits"}
        plans.default.spending = {daily = "1.00", warn_at = 0.5}
        routes = [{path = "/priced", price = "0.60"}]
    """
    async with client_of(limited(text, FakeClock()), x_api_key="a") as client:
        assert "x-spending-remaining" not in (await client.get("/limits")).headers
        await client.get("/priced")
        assert (await client.get("/limits")).headers["x-spending-remaining"] == "0.40"


async def test_resets_are_written_as_the_settings_say() -> None:
    """With `reset = "seconds"` they count from now, as the header does."""
    text = 'operations = {usage_path = "/limits"}\nresponse = {reset = "seconds"}'
    clock = FakeClock()
    async with client_of(limited(text, clock), x_api_key="a") as client:
        await client.get("/")
        clock.set(15)
        assert (await usage_of(client))["requests"][0]["reset"] == 45


async def test_each_sees_its_own() -> None:
    """Another key, another address and nobody's key are other callers."""
    app = limited(SETTINGS, FakeClock())
    async with client_of(app, x_api_key="a") as client:
        await statuses(client, 3)
    seen = []
    for address, headers in [
        ("192.0.2.1", {"x_api_key": "a"}),
        ("192.0.2.1", {"x_api_key": "b"}),
        ("192.0.2.1", {}),
        ("192.0.2.9", {}),
    ]:
        async with client_of(app, address=address, **headers) as client:
            if not headers and address == "192.0.2.1":
                await statuses(client, 2)
            told = await usage_of(client)
            seen.append((told["plan"], told["requests"][0]["used"], told["address"][0]["used"]))
    assert seen == [("default", 3, 3), ("default", 0, 3), ("anonymous", 2, 5), ("anonymous", 0, 0)]


async def test_hooks_say_whose_usage_it_is() -> None:
    """`identify=` and `resolve=` name the caller here as for any request."""

    def identify(scope: Scope) -> Identity:
        return Identity("ann", "anonymous")

    async def resolve(api_key: str) -> KeyEntry:
        return KeyEntry("anonymous", requests=("7/minute",))

    async with client_of(limited(SETTINGS, FakeClock(), identify=identify), x_api_key="a") as client:
        await client.get("/")
        assert (await usage_of(client))["requests"][0]["used"] == 1
    async with client_of(limited(SETTINGS, FakeClock(), resolve=resolve), x_api_key="a") as client:
        assert (await usage_of(client))["requests"][0]["limit"] == 7


async def test_head_says_the_same_without_a_body() -> None:
    """`HEAD` has the headers of `GET`, its length included."""
    async with client_of(limited(SETTINGS, FakeClock()), x_api_key="a") as client:
        by_get, by_head = await client.get("/limits"), await client.head("/limits")
    assert by_head.content == b""
    assert by_head.headers == by_get.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PURGE"])
async def test_other_methods_are_refused(method: str) -> None:
    """There is nothing to write: 405 with `Allow`; neither the app nor the backend is asked."""
    clock = FakeClock()
    backend = Counting(clock=clock)
    async with client_of(limited(SETTINGS, clock, backend=backend), x_api_key="a") as client:
        answer = await client.request(method, "/limits")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["error"]["code"] == "METHOD_NOT_ALLOWED"
    assert backend.asked == 0


async def test_off_unless_it_is_set() -> None:
    """Without the setting every path is the app's."""
    async with client_of(limited("", FakeClock()), x_api_key="a") as client:
        assert (await client.get("/limits")).text == "ok"


async def test_the_path_follows_the_settings_in_force() -> None:
    """Changed settings move it, from the next request on."""
    app = limited(SETTINGS, FakeClock())
    async with client_of(app, x_api_key="a") as client:
        assert (await usage_of(client))["plan"] == "default"
        app.limiter.apply(settings_of(SETTINGS.replace("/limits", "/usage").replace('"60/', '"30/')))
        assert (await client.get("/limits")).text == "ok"
        assert (await usage_of(client, "/usage"))["requests"][0]["limit"] == 30


async def test_mounted_it_is_under_the_mount() -> None:
    """In a mounted app the path is the one inside the mount, as with routes."""
    app = Starlette(routes=[Mount("/inner", limited(SETTINGS, FakeClock())), Mount("/", ok_app())])
    async with client_of(app, x_api_key="a") as client:
        assert (await usage_of(client, "/inner/limits"))["plan"] == "default"
        assert (await client.get("/limits")).text == "ok"


async def test_a_websocket_on_the_path_is_the_apps() -> None:
    """A handshake asks for no usage."""
    seen = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "websocket", "path": "/limits", "headers": [], "client": ("192.0.2.1", 1)}
    await limited(SETTINGS, FakeClock(), app)(scope, receive, send)
    assert seen == ["websocket"]


# floods -----------------------------------------------------------------------------------------


async def test_a_caller_that_asks_too_often_is_refused() -> None:
    """A normal 429 with its wait, hardly any of them asks the backend, and the app's limits are untouched."""
    clock = FakeClock()
    app = limited(SETTINGS, clock)
    app.limiter.engine.backend = backend = Counting(clock=clock)
    app.limiter.engine.decider.remembers = True  # as with any backend but memory
    async with client_of(app, x_api_key="listed") as client:
        assert await statuses(client, EACH_CALLER.quota, "/limits") == [200] * EACH_CALLER.quota
        asked = backend.asked
        refused = await client.get("/limits")
        assert await statuses(client, 50, "/limits") == [429] * 50
        assert backend.asked - asked < 5
        assert shown(await client.get("/"))[:2] == ("60", "59")
        head = await client.head("/limits")
        assert (head.status_code, head.content) == (429, b"")
    assert refused.headers["retry-after"] == "60"
    assert refused.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    async with client_of(app, x_api_key="another") as client:
        assert (await client.get("/limits")).status_code == 200
    clock.set(60)
    app.limiter.engine.refusals.clear()
    async with client_of(app, x_api_key="listed") as client:
        assert (await client.get("/limits")).status_code == 200


async def test_invented_keys_are_refused_together() -> None:
    """Requests of one address under unknown keys share one limit; known keys at it have their own."""
    app = limited(SETTINGS, FakeClock())
    for number in range(EACH_ADDRESS.quota):
        async with client_of(app, x_api_key=f"invented-{number}") as client:
            assert (await client.get("/limits")).status_code == 200
    for headers, expected in [({"x_api_key": "one-more"}, 429), ({}, 429), ({"x_api_key": "listed"}, 200)]:
        async with client_of(app, **headers) as client:
            assert (await client.get("/limits")).status_code == expected
    async with client_of(app, address="192.0.2.9", x_api_key="one-more") as client:
        assert (await client.get("/limits")).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        SETTINGS,
        f"shadow = true\n{SETTINGS}",
        'operations = {usage_path = "/limits"}\nplans.default = {}',
        'operations = {usage_path = "/limits"}\nroutes = [{path = "/{rest:path}", exempt = true}]',
    ],
    ids=["plain", "shadow", "unlimited", "exempt"],
)
async def test_no_setting_opens_it_to_floods(text: str) -> None:
    """Neither an exempt rule nor shadow mode nor a plan without limits lifts what protects it."""
    async with client_of(limited(text, FakeClock()), x_api_key="a") as client:
        assert await statuses(client, 61, "/limits") == [*[200] * 60, 429]


async def test_what_is_kept_for_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that were seen once are forgotten, and asked about anew."""
    monkeypatch.setattr("ratelimit_mw._internal.asgi.usage.MAX_QUESTIONS", 10)
    app = limited(SETTINGS, FakeClock())
    for number in range(35):
        async with client_of(app, x_api_key=f"key-{number}") as client:
            assert (await client.get("/limits")).status_code == 200
            assert len(app._usage._questions) <= 10


# backends ---------------------------------------------------------------------------------------


async def test_without_the_backend_it_is_unavailable() -> None:
    """503 with a wait, and no figures that are guessed."""
    clock = FakeClock()
    async with client_of(limited(SETTINGS, clock, backend=Down(clock=clock)), x_api_key="a") as client:
        answer = await client.get("/limits")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "RATE_LIMIT_UNAVAILABLE"


async def test_on_a_server_the_same_is_told(server_url: str) -> None:
    """Counts on Redis and Valkey are told as from memory, and the gate holds there, too."""
    backend = RedisBackend(server_url, timeout=5)
    async with Limiter(settings_of(SETTINGS), backend=backend) as limiter:
        app = RateLimitMiddleware(ok_app(), limiter=limiter)
        async with client_of(app, x_api_key="a") as client:
            await client.get("/priced")
            told = await usage_of(client)
            assert [each["used"] for each in told["requests"]] == [1, 1]
            assert told["concurrent"]["active"] == 0
            assert [each["spent"] for each in told["spending"]] == ["0.50", "0.50"]
            assert (await statuses(client, 60, "/limits"))[-1] == 429


async def test_on_a_cluster_the_same_is_told(cluster: Cluster) -> None:
    """Also where the gate of a caller and that of its address are counted on different nodes."""
    settings = settings_of(f'{SETTINGS}\n[backend]\nurl = "{cluster.url}"\ntimeout = 5')
    async with (
        Limiter(settings) as limiter,
        client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client,
    ):
        await client.get("/priced")
        told = await usage_of(client)
        assert [each["used"] for each in told["requests"]] == [1, 1]
        assert (await statuses(client, 60, "/limits"))[-1] == 429


async def test_a_server_that_hangs_is_waited_for_once(start_server: StartServer) -> None:
    """Gate and figures together take no longer than the one question of any other request."""
    server = start_server("valkey")
    settings = settings_of(f"{SETTINGS}\n[backend]\ntimeout = 1")
    async with (
        Limiter(settings, backend=RedisBackend(server.url, timeout=1)) as limiter,
        client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client,
    ):
        await usage_of(client)
        server.stop_signal()
        started = time.monotonic()
        answer = await client.get("/limits")
        took = time.monotonic() - started
        server.continue_signal()
    assert answer.status_code == 503
    assert 0.9 < took < 1.8


async def test_many_rules_are_asked_about_in_parts() -> None:
    """Hundreds of rules with limits of their own are all told of."""
    routes = "".join(f'[[routes]]\npath = "/r{n}"\nrequests = ["{n + 1}/hour"]\n' for n in range(250))
    limiter = limiter_of(f'[operations]\nusage_path = "/limits"\n{routes}', FakeClock())
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter), x_api_key="a") as client:
        await client.get("/r249")
        told = await usage_of(client)
    assert [each["requests"][0]["limit"] for each in told["routes"]] == list(range(1, 251))
    assert told["routes"][249]["requests"][0]["used"] == 1
