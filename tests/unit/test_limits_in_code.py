"""Limits that an app declares in code, on its routes: whose they are, and what refuses under which name."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any
from uuid import UUID

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp, Scope
from starlette.websockets import WebSocket

from ratelimit_mw import Identity, Limit, RateLimitMiddleware, by, limited
from tests.support.asgi import Counting, FakeClock, client_of, limiter_of, ok, shown, statuses
from tests.support.asgi import limited as behind

PLANS = """
    plans.default = { requests = ["100/minute"], concurrent = 9 }
    plans.anonymous = { requests = ["50/minute"] }
"""


def app_of(*limits: Limit | str, path: str = "/") -> Starlette:
    """An app with one route on which these limits are, and another without any."""

    @limited(*limits)
    async def handler(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return Starlette(routes=[Route(path, handler, methods=["GET", "POST"]), Route("/free", ok)])


def fresh_endpoint() -> Callable[..., Any]:
    """An endpoint that nothing has marked yet."""

    async def handler(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return handler


# on which routes --------------------------------------------------------------------------------


async def test_a_mark_limits_its_route_alone() -> None:
    """A marked route is limited beside the plan, which counts on; other routes are not."""
    async with client_of(
        behind(PLANS, FakeClock(), app_of(Limit("few", "2/minute"))), x_api_key="a"
    ) as client:
        assert await statuses(client, 3) == [200, 200, 429]
        answer = await client.get("/")
        assert answer.json()["error"]["details"]["policy"] == "few"
        assert shown(await client.get("/free"))[:2] == ("100", "97"), "a refused request costs nothing"


def test_a_mark_wraps_nothing() -> None:
    """The decorator returns the very function, sync or async, with any arguments."""

    def handler(item: int) -> int:
        return item

    assert limited("1/minute")(handler) is handler
    assert handler(5) == 5


async def fastapi_app(place: str) -> ASGIApp:
    """An app of FastAPI's with a limit at this place, and the route `/a/x` below it."""
    dependencies = [Depends(limited("2/minute"))]
    at = {name: dependencies if name == place else [] for name in ("app", "router", "nested", "included")}
    app, router, nested = (
        FastAPI(dependencies=at["app"]),
        APIRouter(dependencies=at["router"]),
        APIRouter(dependencies=at["nested"]),
    )

    async def other(_: None = dependencies[0] if place == "dependency" else None) -> None:
        """A dependency of the handler."""

    @nested.get("/x", dependencies=dependencies if place == "route" else None)
    def x(_: None = Depends(other)) -> str:
        return "x"

    @nested.get("/y")
    def y(_: None = Depends(other)) -> str:
        return "y"

    router.include_router(nested, prefix="/a", dependencies=at["included"])
    if place == "mounted":
        inner = FastAPI(dependencies=dependencies)
        inner.include_router(router)
        app.mount("/", inner)
    else:
        app.include_router(router)
    return app


@pytest.mark.parametrize("place", ["app", "router", "nested", "included", "route", "dependency", "mounted"])
async def test_a_dependency_limits_what_it_is_on(place: str) -> None:
    """`Depends(limited(...))` counts before the handler, on a route, a router, an app, however nested."""
    async with client_of(behind(PLANS, FakeClock(), await fastapi_app(place)), x_api_key="a") as client:
        assert await statuses(client, 3, "/a/x") == [200, 200, 429]
        answer = await client.get("/a/x")
        assert answer.json()["error"]["details"]["policy"] == "GET /a/x"
        expected = [200, 200, 200] if place == "route" else [200, 200, 429]
        assert await statuses(client, 3, "/a/y") == expected, "each route has a count of its own"


async def test_a_named_limit_is_shared_by_its_routes() -> None:
    """Routes that one named limit marks have one count; it is charged once where it marks a route twice."""
    shared, app = Limit("shared", "3/minute"), FastAPI()
    for path in ("/a", "/b"):
        app.add_api_route(path, limited(shared)(lambda: "ok"), dependencies=[Depends(limited(shared))])
    async with client_of(behind(PLANS, FakeClock(), app), x_api_key="a") as client:
        assert await statuses(client, 2, "/a") == [200, 200]
        assert await statuses(client, 2, "/b") == [200, 429]


async def test_the_mark_of_a_decorated_endpoint_is_found() -> None:
    """A decorator over the mark hides nothing, as long as it says what it wraps; nor does a class."""

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def wrapper(request: Request) -> Any:
            return await function(request)

        return wrapper

    @limited("1/minute")
    class Endpoint(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("ok")

    @limited("1/minute")
    async def handler(request: Request, more: int = 0) -> Response:
        return PlainTextResponse("ok")

    routes = [
        Route("/wrapped", decorated(handler)),
        Route("/partial", partial(handler, more=1)),
        Route("/class", Endpoint),
        Mount("/mounted", routes=[Route("/{id:int}", handler)]),
    ]
    async with client_of(behind(PLANS, FakeClock(), Starlette(routes=routes)), x_api_key="a") as client:
        for path in ("/wrapped", "/partial", "/class", "/mounted/7"):
            assert await statuses(client, 2, path) == [200, 429], path


async def test_methods_of_a_class_may_be_marked() -> None:
    """Marks on the methods of a class limit those methods alone, beside what is on the class."""

    @limited(Limit("all", "4/minute"))
    class Endpoint(HTTPEndpoint):
        @limited("2/minute")
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("ok")

        @limited("1/minute")
        async def delete(self, request: Request) -> Response:
            return PlainTextResponse("ok")

        async def put(self, request: Request) -> Response:
            return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", Endpoint), Route("/narrow", Endpoint, methods=["DELETE"])])
    async with client_of(behind(PLANS, FakeClock(), app), x_api_key="a") as client:
        assert await statuses(client, 2, "/", "GET") == [200, 200]
        assert await statuses(client, 1, "/", "HEAD") == [429], "answered by the method for GET"
        assert await statuses(client, 2, "/", "DELETE") == [200, 429]
        assert await statuses(client, 2, "/", "PUT") == [200, 429], "four requests in all"
    async with client_of(behind(PLANS, FakeClock(), app), x_api_key="a") as client:
        assert await statuses(client, 2, "/narrow", "DELETE") == [200, 429]


def test_the_start_of_a_websocket_endpoint_may_be_marked() -> None:
    """Of a class for WebSockets, the method that is called on connecting may be marked."""

    class Endpoint(WebSocketEndpoint):
        @limited("1/minute")
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()

    app = behind(PLANS, FakeClock(), Starlette(routes=[WebSocketRoute("/", Endpoint)]))
    client = TestClient(app)
    with client.websocket_connect("/"):
        pass
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/"):
        pass


async def test_the_route_that_the_app_would_take_counts() -> None:
    """Of routes that match, the limits of the first one hold, as the router chooses."""
    routes = [
        Route("/users/me", ok),
        Route("/users/{id}", limited("1/minute")(fresh_endpoint())),
        Route("/users/{id}", ok, methods=["DELETE"]),
    ]
    async with client_of(behind(PLANS, FakeClock(), Starlette(routes=routes)), x_api_key="a") as client:
        assert await statuses(client, 3, "/users/me") == [200] * 3
        assert await statuses(client, 2, "/users/7") == [200, 429]
        assert await statuses(client, 2, "/users/7", "DELETE") == [200] * 2


async def test_routes_of_another_host_are_other_routes() -> None:
    """Paths are alike, and limits are not: each host has those of its own routes, and no other has any."""

    def on(host: str, *limits: Limit) -> Host:
        endpoint = fresh_endpoint()
        return Host(host, Router([Route("/x", limited(*limits)(endpoint) if limits else endpoint)]))

    routes = [
        Mount("/below", routes=[on("api.example.com", Limit("below", "1/minute"))]),
        on("www.example.com", Limit("www", "3/minute")),
        on("api.example.com", Limit("api", "2/minute")),
        on("{tenant}.example.com"),
        Route("/x", limited(Limit("others", "4/minute"))(fresh_endpoint())),
    ]
    app = behind("", FakeClock(), Starlette(routes=routes))
    admitted = {}
    for url in (
        "http://api.example.com/x",
        "http://www.example.com:8000/x",
        "http://ann.example.com/x",
        "http://api.example.com/below/x",
        "http://example.org/x",
    ):
        async with client_of(app, x_api_key=url) as client:
            admitted[url[7:]] = [(await client.get(url)).status_code for _ in range(6)].count(200)
    assert list(admitted.values()) == [2, 3, 6, 1, 4]


async def test_added_middleware_and_late_routes() -> None:
    """`add_middleware` finds the same marks, also those of routes that are added after the first request."""
    app = app_of("1/minute")
    app.add_middleware(RateLimitMiddleware, limiter=limiter_of(PLANS, FakeClock()))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 2) == [200, 429]
        app.router.routes.append(Route("/later", limited("1/minute")(fresh_endpoint())))
        assert await statuses(client, 2, "/later") == [200, 429]


async def test_a_mark_that_is_made_while_routes_are_read_counts() -> None:
    """A route that another thread marks and adds while the routes are read is limited as all others."""

    class Growing(Starlette):
        """An app that gets a route after each of the first looks at its routes."""

        @property
        def routes(self) -> list[BaseRoute]:
            shown = list(self.router.routes)
            if len(shown) < 3:
                marked = limited("1/minute")(fresh_endpoint())
                self.router.routes.append(Route(f"/{len(shown)}", marked))
            return shown

    app = Growing(routes=[Route("/0", ok)])
    async with client_of(behind(PLANS, FakeClock(), app), x_api_key="a") as client:
        assert await statuses(client, 1, "/0") == [200]
        assert await statuses(client, 2, "/1") == [200, 429]
        assert await statuses(client, 2, "/2") == [200, 429]


def test_a_websocket_route_is_limited() -> None:
    """A mark on a WebSocket's endpoint limits its handshakes, not requests to the same path."""

    @limited("1/minute")
    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", handler), Route("/", ok)])
    with TestClient(behind(PLANS, FakeClock(), app)) as client:
        for _ in range(3):
            assert client.get("/").status_code == 200
        with client.websocket_connect("/"):
            pass
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/"):
            pass


def fails(scope: Scope, identity: Identity) -> str:
    """Raise, as a function with a fault does."""
    raise ZeroDivisionError


async def test_exempt_routes_are_exempt_from_these() -> None:
    """A rule that exempts a route exempts it from limits in code, too, and asks none of their functions."""
    limit = Limit("x", "1/minute", by=fails)
    text = PLANS + 'routes = [{ path = "/", exempt = true }]'
    async with client_of(behind(text, FakeClock(), app_of(limit))) as client:
        assert await statuses(client, 3) == [200] * 3


@pytest.mark.parametrize("by_what", [by.caller, by.address])
async def test_blocked_callers_stay_blocked(by_what: Any) -> None:
    """A limit in code on a route lets nobody in whom the settings block, and asks no function."""
    text = "plans.default = { blocked = true }"
    limits = [Limit("x", "9/minute", by=by_what), Limit("y", "9/minute", by=fails)]
    async with client_of(behind(text, FakeClock(), app_of(*limits)), x_api_key="a") as client:
        assert await statuses(client, 2) == [403, 403]


# whose they are ---------------------------------------------------------------------------------


async def counted_apart(limit: Limit, *requests: dict[str, Any], path: str = "/") -> list[int]:
    """Return the statuses of these requests, each with a `path`, an `address` and headers of its own."""
    app, found = behind(PLANS, FakeClock(), app_of(limit, path=path)), list[int]()
    for request in requests:
        options = {"x_api_key": "a", **request}
        where = options.pop("path", "/")
        async with client_of(app, **options) as client:
            found += await statuses(client, 1, where)
    return found


async def test_by_caller() -> None:
    """Each caller has its own count, wherever it comes from."""
    limit = Limit("x", "1/minute")
    requests = [{}, {"address": "192.0.2.9"}, {"x_api_key": "b"}]
    assert await counted_apart(limit, *requests) == [200, 429, 200]


async def test_by_address() -> None:
    """Each address has its own count, whatever key it sends; of IPv6 a /64 is one."""
    limit = Limit("x", "1/minute", by=by.address)
    requests = [{}, {"x_api_key": "b"}, {"address": "192.0.2.9"}]
    assert await counted_apart(limit, *requests) == [200, 429, 200]
    requests = [{"address": f"2001:db8::{n}"} for n in (1, 2)]
    assert await counted_apart(limit, *requests) == [200, 429]


async def test_by_everyone() -> None:
    """All callers draw on one count, and a refusal tells of capacity, without figures."""
    limit = Limit("x", "1/minute", by=by.everyone)
    app = behind(PLANS, FakeClock(), app_of(limit))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 1) == [200]
    async with client_of(app, x_api_key="b") as client:
        error = (await client.get("/")).json()["error"]
    assert (error["code"], error["details"]) == ("CAPACITY_EXCEEDED", {"retry_after": 60, "policy": "x"})


async def test_by_path() -> None:
    """Each value of a path parameter has a count of its own, of all callers together."""
    limit = Limit("x", "1/minute", by=by.path("id"))
    requests = [{"path": "/p/1/x"}, {"path": "/p/1/y", "x_api_key": "b"}, {"path": "/p/2/x"}]
    assert await counted_apart(limit, *requests, path="/p/{id}/{rest:path}") == [200, 429, 200]


async def test_by_header() -> None:
    """Each value of a header has a count of its own; a request without the header is not limited by it."""
    limit = Limit("x", "1/minute", by=by.header("X-Tenant"))
    requests = [{"x_tenant": "a"}, {"x_tenant": "a", "x_api_key": "b"}, {"x_tenant": "b"}, {}, {}]
    assert await counted_apart(limit, *requests) == [200, 429, 200, 200, 200]


KEY = UUID("deadbeef-0000-4000-8000-00000badf00d")


@pytest.mark.parametrize("key", ["a@example.com", b"\xff\x00", 7, KEY, "", "k:1", "{}\r\n\0\ud800"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_by_a_function(key: Any, *, is_async: bool) -> None:
    """A function of scope and identity, sync or async, names the key, which is any plain value."""

    def function(scope: Scope, identity: Identity) -> Any:
        assert identity.plan == "default"
        return key if scope["path"] == "/" else "other"

    async def waits(scope: Scope, identity: Identity) -> Any:
        return function(scope, identity)

    limit = Limit("x", "1/minute", by=waits if is_async else function)
    requests = [{}, {"x_api_key": "b"}, {"path": "/else"}, {"path": "/else"}]
    assert await counted_apart(limit, *requests, path="/{rest:path}") == [200, 429, 200, 429]


async def test_a_function_may_leave_requests_out() -> None:
    """None stands for a request that the limit doesn't apply to."""
    limit = Limit("x", "1/minute", by=lambda *_: None)
    assert await counted_apart(limit, {}, {}) == [200, 200]


@pytest.mark.parametrize("key", [1.5, True, ["a"], object()])
async def test_what_is_no_key_is_counted_by_the_caller(key: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A function that returns something else limits the caller, never nobody, and the log says so."""
    limit = Limit("x", "1/minute", by=lambda *_: key)
    assert await counted_apart(limit, {}, {}, {"x_api_key": "b"}) == [200, 429, 200]
    assert "by= returned something that is not a key" in caplog.text


async def test_a_function_that_raises_is_answered_as_the_app_would() -> None:
    """An `HTTPException` of a key function is answered by the app; any other reaches the server."""

    def refuses(scope: Scope, identity: Identity) -> str:
        raise HTTPException(401)

    assert await counted_apart(Limit("x", "1/minute", by=refuses), {}) == [401]
    with pytest.raises(ZeroDivisionError):
        await counted_apart(Limit("x", "1/minute", by=fails), {})


async def test_keys_are_hashed() -> None:
    """A key is kept as its hash under the secret, and shown nowhere."""
    limiters = [
        limiter_of(f'{PLANS}\nidentity.hash_secret = "{secret}"', FakeClock()) for secret in ("", "s")
    ]
    partitions = []
    for limiter in limiters:
        app = RateLimitMiddleware(
            app_of(Limit("x", "1/minute", by=lambda *_: "a@example.com")), limiter=limiter
        )
        async with client_of(app) as client:
            assert await statuses(client, 2) == [200, 429]
        partitions.append(limiter.engine.live.rules.code_limits.partition_of("a@example.com"))
    assert all(partition.startswith("l:") and len(partition) == 34 for partition in partitions)
    assert partitions[0] != partitions[1]
    assert "example" not in repr(Limit("x", "1/minute").on("a@example.com"))


# how much ---------------------------------------------------------------------------------------


async def test_a_cost_of_its_own() -> None:
    """A limit's cost is its own, whatever the route costs under the plan."""
    text = PLANS + 'routes = [{ path = "/", cost = 10 }]'
    clock = FakeClock()
    async with client_of(
        behind(text, clock, app_of(Limit("x", "5/minute", cost=2))), x_api_key="a"
    ) as client:
        assert await statuses(client, 3) == [200, 200, 429]
        error = (await client.get("/")).json()["error"]
        assert error["message"].endswith("4/5 requests used in 1 minute; this request needs 2.")
        assert shown(await client.get("/free"))[:2] == ("100", "79")
        clock.set(60)
        assert await statuses(client, 3) == [200, 200, 429]


async def test_a_function_names_the_cost(caplog: pytest.LogCaptureFixture) -> None:
    """A cost may depend on the request; what is not a cost is told in the log, and counts as 1."""
    costs: list[Any] = [3, 2, 1]
    limit = Limit("x", "5/minute", cost=lambda *_: costs.pop(0))
    assert await counted_apart(limit, {}, {}, {}) == [200, 200, 429]
    costs = [0, -1, 1.5, float("nan"), "2", True]
    assert await counted_apart(limit, *[{}] * 6) == [200] * 5 + [429]
    assert caplog.text.count("a cost must be a whole number from 1 to 1000000000") == 6
    costs = [10**9]
    assert await counted_apart(limit, {}) == [429]


async def test_rates_for_some() -> None:
    """Some callers have other rates, on the same count; what is not a rate leaves them the limit's own."""
    rates: dict[str, Any] = {"gold": "3/minute", "bad": "3/mnute"}
    limit = Limit("x", "1/minute", rates_for=lambda identity: rates.get(identity.plan))
    text = PLANS + 'plans.gold.requests = ["9/minute"]\nplans.bad.requests = ["9/minute"]'
    for plan, expected in [("gold", [200, 200, 200, 429]), ("bad", [200, 429]), ("default", [200, 429])]:
        identity = Identity("ann", plan)
        app = behind(text, FakeClock(), app_of(limit), identify=lambda _, who=identity: who)
        async with client_of(app) as client:
            assert await statuses(client, len(expected)) == expected


async def test_when_it_applies() -> None:
    """A condition leaves requests out."""
    limit = Limit("x", "1/minute", when=lambda scope, _: scope["method"] == "POST")
    async with client_of(behind(PLANS, FakeClock(), app_of(limit)), x_api_key="a") as client:
        assert await statuses(client, 3) == [200] * 3
        assert await statuses(client, 2, method="POST") == [200, 429]


async def test_headers_tell_of_limits_by_caller_alone() -> None:
    """The nearest of the caller's own windows is told, of code or plan; other keys' windows never are."""
    clock = FakeClock()
    for by_what, expected in [
        (by.caller, ("5", "4")),
        (by.address, ("100", "99")),
        (by.everyone, ("100", "99")),
    ]:
        app = behind(PLANS, clock, app_of(Limit("x", "5/minute", by=by_what)))
        async with client_of(app, x_api_key="a") as client:
            assert shown(await client.get("/"))[:2] == expected
    text = PLANS + 'response.headers = ["ietf"]'
    async with client_of(
        behind(text, clock, app_of(Limit("x", "5/minute", "9/hour"))), x_api_key="a"
    ) as client:
        headers = (await client.get("/")).headers
    assert headers["ratelimit-policy"] == '"100/minute";q=100;w=60, "x";q=5;w=60, "x 9/hour";q=9;w=3600'


async def test_all_limits_are_one_question() -> None:
    """Plan, route and limits in code are asked in one step, and all are charged or none is."""
    backend = Counting(clock=FakeClock())
    limits = [
        Limit("a", "2/minute"),
        Limit("b", "1/minute", by=by.path("id")),
        Limit("c", "9/minute", by=by.address),
    ]
    app = RateLimitMiddleware(app_of(*limits, path="/{id}"), limiter=limiter_of(PLANS, FakeClock(), backend))
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3, "/1") == [200, 429, 429]
        assert backend.asked == 3
        assert await statuses(client, 2, "/2") == [200, 429], "what refused charged nothing of a"
        assert await statuses(client, 1, "/3") == [429]


async def test_two_limits_of_one_name() -> None:
    """Two declarations of one name have one count; on one route the stricter of equal windows refuses."""
    limits = [Limit("x", "3/minute"), Limit("x", "2/minute", "9/hour")]
    async with client_of(behind(PLANS, FakeClock(), app_of(*limits)), x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]


async def test_a_name_like_a_plans_is_no_plan() -> None:
    """A limit that is called as a plan, or in an odd way, has nothing to do with anything of that name."""
    for name in ("default", "p", "p:tokens", "app", "c:x", "{x}", "ü"):
        async with client_of(
            behind(PLANS, FakeClock(), app_of(Limit(name, "1/minute"))), x_api_key="a"
        ) as client:
            assert await statuses(client, 2) == [200, 429]
            assert shown(await client.get("/free"))[:2] == ("100", "98")


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("x",), {}, "x: a limit needs a rate such as '60/minute', or concurrent"),
        (("", "1/minute"), {}, "the name of a limit must be 1 to 200 printable characters, not ''"),
        (("a\nb", "1/minute"), {}, "the name of a limit must be 1 to 200 printable characters, not 'a\\nb'"),
        (("x", "1/mnute"), {}, "x: rates '1/mnute' is not a rate; expected one rate, such as"),
        (("x", "1/minute", "2/minute"), {}, "x: rates '2/minute' has the same window length as another rate"),
        (("x", "1/minute"), {"cost": 0}, "x: a cost must be a whole number from 1 to 1000000000, not 0"),
        (("x", "1/minute"), {"cost": -1}, "x: a cost must be a whole number from 1 to 1000000000, not -1"),
        (("x", "1/minute"), {"cost": 1.0}, "x: a cost must be a whole number from 1 to 1000000000, not 1.0"),
        (
            ("x", "1/minute"),
            {"cost": 10**30},
            "x: a cost must be a whole number from 1 to 1000000000, not 1000",
        ),
        (
            ("x", "1/minute"),
            {"by": "caller"},
            "x: by must be one of ratelimit_mw.by, or a function, not 'caller'",
        ),
        (
            ("x", "1/minute"),
            {"unit": "To kens"},
            "x: unit 'To kens' is not the name of a unit; expected a small",
        ),
        (("x", "1/minute"), {"concurrent": 0}, "x: concurrent 0 is out of range; expected a whole number"),
        (("x", "1/minute"), {"when": True}, "x: when must be a function, not True"),
        (("x", "1/minute"), {"rates_for": "2/minute"}, "x: rates_for must be a function, not '2/minute'"),
    ],
)
def test_a_bad_declaration_says_what_is_wrong(arguments: Any, options: Any, text: str) -> None:
    """A declaration of no limit raises, and tells the name, the fault and what was expected."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        Limit(*arguments, **options)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ((), "limited() needs a Limit or a rate, such as '10/minute'"),
        ((5,), "limited() takes a Limit or a rate such as '10/minute', not 5"),
        (("10/mnute",), "limited: rates '10/mnute' is not a rate"),
        (
            (Limit("x", "1/minute").on("k"),),
            "limited() takes a Limit or a rate such as '10/minute', not Limit(",
        ),
    ],
)
def test_a_bad_mark_says_what_is_wrong(limits: Any, text: str) -> None:
    """The decorator raises for anything but limits and rates."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        limited(*limits)
    assert str(raised.value).startswith(text)


def test_a_bound_method_cannot_be_marked() -> None:
    """A callable that keeps no attributes raises, since its mark would be lost."""
    with pytest.raises(TypeError, match="can't be marked with limits: mark the function itself"):
        limited("1/minute")("".upper)


# findings ---------------------------------------------------------------------------------------


def test_a_router_that_cannot_be_read_is_a_finding() -> None:
    """Limits in code that can't be learnt are told at the start, never left out in silence."""
    limited("1/minute")

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    apps: list[ASGIApp] = [bare, Starlette(routes=[Mount("/sub-app-7", bare)])]
    apps.append(app_of(Limit("x-7", "1/minute", by=by.path("nobody"))))
    for app in apps:
        middleware = behind(PLANS, FakeClock(), app)
        assert [finding.name for finding in middleware.read_marks().findings] == ["limits-not-learnt"]


def test_findings_are_logged_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """A limit that never applies is in the log before the first request."""
    with TestClient(behind(PLANS, FakeClock(), app_of(Limit("x-8", "1/minute", by=by.path("nobody"))))):
        assert "limit x-8 never applies on /: it counts by the path parameter 'nobody'" in caplog.text
