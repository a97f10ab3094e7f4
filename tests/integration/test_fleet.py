"""The figures of the fleet: what workers report, how it is read, and what it costs the backend."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from ratelimit_mw import Limit, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends import open_figures_store
from ratelimit_mw._internal.backends.figures_store import (
    BUCKET,
    DAY_BUCKET,
    DAY_KEPT,
    DAY_LIFE,
    KEPT,
    MOST_WATCHED,
    TOTALS_LIFE,
    FiguresQuery,
    FiguresStore,
    Report,
)
from ratelimit_mw._internal.backends.memory_figures import MemoryFiguresStore
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.fleet.day import DayReader
from ratelimit_mw._internal.fleet.view import POINTS
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.observe.sightings import ROUTES
from ratelimit_mw._internal.runtime.compiled import is_compiled
from tests.conftest import StartServer
from tests.support.asgi import client_of, ok_app
from tests.support.fleet import ask, eventually, fresh, settings_of
from tests.support.servers import StoreServer, server_binaries
from tests.support.topologies import Cluster

pytestmark = pytest.mark.rerun

REASONS = ("rate", "concurrency", "spending", "cost", "capacity", "unavailable", "blocked")


@pytest.fixture(params=["memory", *sorted(server_binaries())])
def url(request: pytest.FixtureRequest) -> str:
    """The memory backend, and each kind of server."""
    if request.param == "memory":
        return "memory://"
    server: StoreServer = request.getfixturevalue("shared_server")(request.param)
    return server.url


async def writes_and_reads(store: FiguresStore) -> None:
    """Assert the behaviour of every store of figures."""
    now = await store.now()
    report = Report("w:1", '{"pid":1}', {"admitted pro": 3}, {"admitted k:a": 2, "rate k:a": 1}, ["[1]"])
    await store.write(report)
    await store.write(report)
    await store.write(Report("w:2", '{"pid":2}', {"rate pro": 1}))
    buckets = range(int(now // BUCKET), int(await store.now() // BUCKET) + 1)
    reading = await store.read(FiguresQuery(buckets, buckets, now - 60))
    totals = [sum(counts.get(name, 0) for counts in reading.totals) for name in ("admitted pro", "rate pro")]
    assert totals == [6, 1]
    history = await store.history(["admitted k:a", "rate k:a", "rate k:b"], buckets)
    for counts in (reading.callers, history):
        found = [
            sum(each.get(name, 0) for each in counts) for name in ("admitted k:a", "rate k:a", "rate k:b")
        ]
        assert found == [4, 2, 0]
    assert reading.identities == ["[1]"]
    assert {name: text for name, (text, _) in reading.workers.items()} == {
        "w:1": '{"pid":1}',
        "w:2": '{"pid":2}',
    }
    assert all(abs(at - now) < 30 for _, at in reading.workers.values())
    await store.leave("w:1")
    assert list((await store.read(FiguresQuery((), (), now))).workers) == ["w:2"]
    await store.close()


async def test_reports_add_up(url: str) -> None:
    """Counts of one bucket are added, of all workers; the latest word of each worker stands."""
    await writes_and_reads(open_figures_store(settings_of(url).backend))


async def test_reports_add_up_on_a_cluster(cluster: Cluster) -> None:
    """All figures are on one node, whichever that is."""
    await writes_and_reads(open_figures_store(settings_of(cluster.url).backend))


async def test_a_bucket_keeps_the_highest_counts(url: str) -> None:
    """However many callers there are, so many are kept: those with the most requests."""
    store = open_figures_store(settings_of(url).backend)
    now = await store.now()
    for start in range(0, 2_000, 100):
        few = {f"rate k:{number}": number + 1 for number in range(start, start + 100)}
        await store.write(Report("w", "{}", {}, few, [f"[{number}]" for number in range(start, start + 100)]))
    buckets = range(int(now // BUCKET), int(await store.now() // BUCKET) + 1)
    reading = await store.read(FiguresQuery((), buckets, now - 60))
    await store.close()
    assert all(len(counts) <= KEPT for counts in reading.callers)
    assert max(counts.get("rate k:1999", 0) for counts in reading.callers) == 2_000
    assert len(reading.identities) <= KEPT
    assert "[1999]" in reading.identities


async def test_a_report_of_no_request_runs_no_script(server: StoreServer) -> None:
    """A report of plans alone is plain commands, which leave the same keys and lives as the script does."""
    store = open_figures_store(settings_of(server.url).backend)
    totals = {f"admitted p{number}": number + 1 for number in range(KEPT + 20)}

    async def written(report: Report) -> dict[bytes, tuple[int, int]]:
        """Write a report to an empty server; entries and life, in tens of seconds, of keys by their kind."""
        server.empty()
        await store.write(report)
        with server.client() as client:
            kinds = {key.split(b":")[2]: key for key in client.scan_iter("*")}
            return {
                kind: (client.zcard(key) if kind != b"h" else 1, round(client.pttl(key) / 10_000))
                for kind, key in kinds.items()
                if kind != b"c"
            }

    def scripts() -> int:
        with server.client() as client:
            figures = client.info("commandstats")
        return sum(figures.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))

    before = scripts()
    plain = await written(Report("w:1", "{}", totals))
    assert scripts() == before
    scripted = await written(Report("w:1", "{}", totals, {"admitted k:a": 1}))
    assert scripts() > before
    await store.close()
    assert plain == scripted
    assert plain[b"t"][0] == KEPT
    assert plain[b"d"][0] == DAY_KEPT


@pytest.mark.parametrize("callers", [{}, {"admitted k:a": 1}])
async def test_a_figure_of_another_type_fails_the_report(
    server: StoreServer, callers: Mapping[str, int]
) -> None:
    """A report that could not be written whole raises, whichever of its keys somebody else has written."""
    store = open_figures_store(settings_of(server.url).backend)
    for key in ("workers", "watched"):
        server.empty()
        with server.client() as client:
            client.set(f"ratelimit:{{fleet}}:{key}", "a text")
        with pytest.raises(BackendError, match="WRONGTYPE"):
            await store.write(Report("w:1", "{}", {"admitted pro": 1}, callers))
    await store.close()


async def test_every_figure_expires(server: StoreServer) -> None:
    """Nothing stays in the backend for ever, nor much longer than it is looked at."""
    async with Limiter(settings_of(server.url)) as limiter:
        await ask(limiter, "a", 1)
        await limiter.engine.reporter.report()
        with server.client() as client:
            lives = {name: client.ttl(name) for name in client.scan_iter("*{fleet}*")}
    assert len(lives) == 7
    assert all(0 < life <= (DAY_LIFE if b"}:d:" in name else TOTALS_LIFE) for name, life in lives.items()), (
        lives
    )


async def test_a_snapshot_tells_what_became_of_requests(url: str) -> None:
    """By time, plan and caller: admitted, or refused and why; and how each limit of a caller stands."""
    plans = {
        "default": {"requests": ["5/hour"], "concurrent": 2},
        "pro": {"requests": ["100/minute"], "spending": {"daily": "10.00"}},
    }
    keys = [{"key": "pro", "plan": "pro", "account": "acme"}]
    routes = [{"path": "/{rest:path}", "price": "0.50", "methods": ["GET"], "requests": ["7/hour"]}]
    async with Limiter(settings_of(url, plans=plans, keys=keys, routes=routes)) as limiter:
        await ask(limiter, "a", 8)
        await ask(limiter, "pro", 4)
        said = (await fresh(limiter)).as_dict()
    json.dumps(said)
    assert len(said["series"]) == POINTS
    assert [b["at"] - a["at"] for a, b in zip(said["series"], said["series"][1:], strict=False)] == [
        BUCKET
    ] * 719
    assert sum(point["admitted"] for point in said["series"]) == 9
    assert sum(point["refused"]["rate"] for point in said["series"]) == 3
    assert [(plan["plan"], plan["admitted"]) for plan in said["plans"]] == [("default", 5), ("pro", 4)]
    first, second = said["callers"]
    digits = hash_api_key(b"a", "").partition(":")[2]
    assert (first["caller"], first["plan"], first["account"]) == (f"k:{digits[:32]}", "default", None)
    assert (first["api_key_hash"], second["account"]) == (f"sha256:{digits}", "acme")
    assert first["refused"] == {**dict.fromkeys(REASONS, 0), "rate": 3}
    assert first["nearest"] == 1.0
    limits = [(limit["name"], limit["kind"], limit["scope"], limit["used"]) for limit in first["limits"]]
    assert limits == [
        ("5/hour", "window", "plan", 5),
        ("2 requests at once", "slots", "plan", 0),
        ("7/hour", "window", "route GET /{rest:path}", 5),
    ]
    budget = next(limit for limit in second["limits"] if limit["kind"] == "spending")
    assert (budget["used"], budget["limit"], budget["share"]) == (2.0, 10.0, 0.2)
    assert (budget["used_text"], budget["limit_text"], budget["currency"]) == ("2.00", "10.00", "USD")
    (worker,) = said["workers"]
    assert worker["version"] == limiter.version
    assert worker["compiled"] is is_compiled()
    assert said["settings"] == {"versions": [limiter.version]}
    assert said["backend"]["up"] is True
    assert said["partial"] is None


async def test_the_last_day_is_kept_in_steps_of_five_minutes(url: str) -> None:
    """A day of plans at a bounded cost: each step keeps so many names, and all of them end."""
    async with Limiter(settings_of(url)) as limiter:
        await ask(limiter, "a", 7)
        await limiter.engine.reporter.report()
        day = await FleetView(limiter).day()
        assert len(day.series) == 288
        assert {b.at - a.at for a, b in zip(day.series, day.series[1:], strict=False)} == {DAY_BUCKET}
        assert sum(step.outcomes.admitted for step in day.series) == 5
        assert sum(step.outcomes.all_refused for step in day.series) == 2
        (step,) = [step for step in day.steps if step.plans]
        assert step.plans["default"].admitted == 5
        store = limiter.engine.reporter.store
        await store.write(Report("w", "{}", {f"rate plan{number}": 9 + number for number in range(300)}))
        counts = await store.day([int(await store.now() // DAY_BUCKET)])
        assert [len(each) for each in counts] == [DAY_KEPT]
        assert "rate plan299" in counts[0]


async def test_old_steps_of_the_day_are_read_once() -> None:
    """Whoever looks again reads what may still grow; a step that grew after the last look is read again."""
    now, asked = 1_800_000_000.0, []

    class Store(MemoryFiguresStore):
        async def day(self, buckets: Sequence[int]) -> Sequence[Mapping[str, int]]:
            asked.append(len(buckets))
            return await super().day(buckets)

    store = Store(lambda: now)
    reader = DayReader(store)
    for later in (1.0, 290.0, 3_600.0):
        await store.write(Report("w", "{}", {"admitted pro": 1}))
        await reader.read()
        now += later
        await store.write(Report("w", "{}", {"admitted pro": 1}))
        await reader.read()
    assert sum(step.outcomes.admitted for step in (await reader.read()).series) == 6
    assert asked[0] == 288
    assert max(asked[1:]) <= 2 + 3_600 // 300


async def test_traffic_is_told_by_route_and_method(url: str) -> None:
    """Each rule by its methods and path, refusals first; what falls under no rule has an empty name."""
    routes = [
        {"path": "/jobs", "methods": ["POST"], "requests": ["2/hour"]},
        {"path": "/jobs", "methods": ["GET", "DELETE"]},
    ]
    async with Limiter(settings_of(url, plans={"default": {}}, routes=routes)) as limiter:
        for method, path, times in (("POST", "/jobs", 5), ("GET", "/jobs", 3), ("GET", "/other", 4)):
            for _ in range(times):
                await limiter.acquire(api_key="a", address="192.0.2.1", method=method, path=path)
        said = (await fresh(limiter)).as_dict()["routes"]
    assert [(each["route"], each["admitted"], each["refused"]["rate"]) for each in said] == [
        ("POST /jobs", 2, 3), ("", 4, 0), ("DELETE,GET /jobs", 3, 0),
    ]  # fmt: skip


async def test_traffic_is_told_by_the_apps_own_routes_while_somebody_looks(url: str) -> None:
    """A row for each route and method of the app, however many paths and methods clients invent."""
    login = Limit("login", "3/hour")

    async def item(request: Request) -> Response:
        if request.method == "POST":
            await request.state.ratelimit.charge(login)
        return PlainTextResponse("ok")

    served = Starlette(routes=[
        Route("/items/{id}", item, methods=["GET", "POST"]), Mount("/files", PlainTextResponse("ok")),
    ])  # fmt: skip
    rule = {"path": "/items/{id}", "methods": ["GET"], "requests": ["4/hour"]}
    settings = settings_of(url, plans={"default": {"requests": ["1000/hour"]}}, routes=[rule])
    middleware = RateLimitMiddleware(served, settings=settings)
    live, reporter = middleware.limiter.engine.live, middleware.limiter.engine.reporter
    async with middleware.limiter, client_of(middleware, x_api_key="a") as client:
        view = FleetView(middleware.limiter)
        await view.read()
        await reporter.store.write(Report("w", "{}"))
        await client.get("/items/before")
        await reporter.report()
        assert live.watch is not None
        for number in range(6):
            await client.get(f"/items/{number}")
            await client.post(f"/items/{number}")
            await client.get(f"/files/{number}")
            await client.get(f"/missing/{number}")
            await client.request(f"INVENTED{number}", "/files/x")
        await reporter.report()
        said = (await FleetView(middleware.limiter).read()).as_dict()
        assert said["app_routes_since"] is not None
        rows = [
            (each["route"], each["rule"], each["admitted"], each["refused"]["rate"])
            for each in said["app_routes"]
        ]
        assert rows == [
            # Late refusals stand beside the admission of their request, as in all figures.
            ("POST /items/{id}", "", 6, 3),
            ("GET /items/{id}", "GET /items/{id}", 3, 3),
            ("(other) /files/{rest:path}", "", 6, 0),
            ("GET (no route)", "", 6, 0),
            ("GET /files/{rest:path}", "", 6, 0),
        ]
        assert [each["route"] for each in said["routes"]] == ["", "GET /items/{id}"]
        await reporter.store.watch(ROUTES, 0.001)
        await client.get("/items/1")
        await asyncio.sleep(0.01)
        await reporter.report()
        assert live.watch is None


async def test_an_app_that_shows_no_routes_is_told_by_rule_and_method(url: str) -> None:
    """The path of the rule stands for routes that can't be read."""
    settings = settings_of(url, routes=[{"path": "/a/{rest:path}", "requests": ["9/hour"]}])
    middleware = RateLimitMiddleware(PlainTextResponse("ok"), settings=settings)
    async with middleware.limiter, client_of(middleware) as client:
        await FleetView(middleware.limiter).read()
        await client.get("/a/1")
        await middleware.limiter.engine.reporter.report()
        for method, path in (("GET", "/a/1"), ("PUT", "/a/2"), ("GET", "/b/3")):
            await client.request(method, path)
        await middleware.limiter.engine.reporter.report()
        said = (await FleetView(middleware.limiter).read()).app_routes
    assert [(each.route, each.rule) for each in said] == [
        ("GET (any path)", ""),
        ("GET /a/{rest:path}", "/a/{rest:path}"),
        ("PUT /a/{rest:path}", "/a/{rest:path}"),
    ]  # fmt: skip


async def test_where_a_caller_comes_from_is_told_while_somebody_looks(url: str) -> None:
    """Addresses and routes of a caller are counted for it alone, and only while somebody looks."""
    middleware = RateLimitMiddleware(ok_app(), settings=settings_of(url))
    live, reporter = middleware.limiter.engine.live, middleware.limiter.engine.reporter
    name = middleware.limiter.engine.identity_of(api_key="a").partition

    def is_watching() -> bool:
        return live.watch is not None

    async def call(key: str, address: str, path: str) -> None:
        async with client_of(middleware, address=address) as client:
            await client.get(path, headers={"X-API-Key": key})

    async with middleware.limiter:
        await call("a", "192.0.2.7", "/before")
        await reporter.report()
        view = FleetView(middleware.limiter)
        assert (await view.caller(name)).addresses == ()
        assert not is_watching()
        await reporter.store.write(Report("w", "{}"))
        await call("a", "192.0.2.7", "/before")
        await reporter.report()
        assert is_watching()
        for address, path in (("192.0.2.8", "/x"), ("192.0.2.8", "/x"), ("192.0.2.9", "/y")):
            await call("a", address, path)
        await call("b", "192.0.2.10", "/z")
        await reporter.report()
        detail = (await view.caller(name)).as_dict()
        assert detail["addresses"] == [
            {"address": "192.0.2.8", "requests": 2}, {"address": "192.0.2.9", "requests": 1},
        ]  # fmt: skip
        assert detail["routes"] == [{"route": "GET /x", "requests": 2}, {"route": "GET /y", "requests": 1}]
        for each in (name, ROUTES):
            await reporter.store.watch(each, 0.001)
        await call("a", "192.0.2.8", "/x")
        await asyncio.sleep(0.01)
        await reporter.report()
        assert not is_watching()


async def test_at_most_so_many_callers_are_watched(url: str) -> None:
    """Workers watch a bounded number of callers, however many pages are open."""
    store = open_figures_store(settings_of(url).backend)
    for number in range(3 * MOST_WATCHED):
        await store.watch(f"i:{number}", 30)
    assert len(await store.write(Report("w", "{}"))) == MOST_WATCHED
    await store.close()


async def test_a_caller_has_a_history_of_its_own(url: str) -> None:
    """Ten minutes of one caller alone, and the hash under which its plan can be set."""
    async with Limiter(settings_of(url)) as limiter:
        await ask(limiter, "a", 6)
        await ask(limiter, "b", 3)
        await limiter.engine.reporter.report()
        identity = limiter.engine.identity_of(api_key="a")
        detail = (await FleetView(limiter).caller(identity.partition)).as_dict()
        nobody = (await FleetView(limiter).caller("i:nobody")).as_dict()
    assert len(detail["series"]) == 120
    assert sum(point["admitted"] for point in detail["series"]) == 5
    assert sum(point["refused"]["rate"] for point in detail["series"]) == 1
    assert detail["known_as"] == [identity.api_key_hash]
    assert detail["plans"] == ["default", "anonymous"]
    assert (nobody["plan"], nobody["known_as"], nobody["limits"]) == (None, [], [])


async def test_keys_of_an_account_are_one_caller(url: str) -> None:
    """An account whose keys share is shown with all of them."""
    keys = [{"key": key, "plan": "team", "account": "acme"} for key in ("a", "b")]
    plans = {"team": {"requests": ["5/hour"], "share": "account"}}
    async with Limiter(settings_of(url, plans=plans, keys=keys)) as limiter:
        await ask(limiter, "a", 1)
        await ask(limiter, "b", 2)
        await limiter.engine.reporter.report()
        detail = (await FleetView(limiter).caller("a:acme")).as_dict()
    assert (detail["admitted"], detail["account"], detail["limits"][0]["used"]) == (3, "acme", 3)
    assert detail["known_as"] == [hash_api_key(key, "") for key in (b"a", b"b")]


async def test_a_budget_tells_how_long_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the pace of what was seen; without spending there is nothing to tell."""
    monkeypatch.setattr("ratelimit_mw._internal.fleet.limit_figures.PACE_AFTER", 0.0)
    monkeypatch.setattr("ratelimit_mw._internal.fleet.view.KEPT_SECONDS", -1.0)
    plans = {"default": {"spending": {"daily": "1000.00"}}}
    routes = [{"path": "/{rest:path}", "price": "100.00"}]
    async with Limiter(settings_of("memory://", plans=plans, routes=routes)) as limiter:
        view = FleetView(limiter)

        async def forecast() -> float | None:
            await limiter.engine.reporter.report()
            return (await view.read()).callers[0].limits[0].forecast

        await ask(limiter, "a", 1)
        await eventually(lambda: _is_reported(view, limiter))
        assert await forecast() is None
        start = time.monotonic()
        await ask(limiter, "a", 1)
        left = await forecast()
        assert left is not None
        assert left <= 8 * (time.monotonic() - start) + 1


async def _is_reported(view: FleetView, limiter: Limiter) -> bool:
    await limiter.engine.reporter.report()
    return bool((await view.read()).callers)


async def test_who_looks_again_later_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point that was still growing when somebody looked is read again, however much later."""
    monkeypatch.setattr("ratelimit_mw._internal.fleet.view.KEPT_SECONDS", -1.0)
    now = 1_800_000_000.0
    async with Limiter(settings_of("memory://", plans={"default": {}})) as limiter:
        limiter.engine.reporter.store = MemoryFiguresStore(lambda: now)
        view = FleetView(limiter)
        for later in (0.1, 60.0, 3_000.0):
            for _ in range(2):
                await ask(limiter, "a", 5)
                await limiter.engine.reporter.report()
                now += 0.1
                await view.read()
            await ask(limiter, "a", 3)
            await limiter.engine.reporter.report()
            now += later
        points = (await view.read()).series
        assert sum(point.outcomes.admitted for point in points) == 39
        now += 570.0
        await limiter.engine.reporter.report()
        points = (await view.read()).series
        assert sum(point.outcomes.admitted for point in points) == 13


async def test_many_who_look_cost_as_much_as_one(redis_server: StoreServer) -> None:
    """A hundred pages within a second are one reading of the backend."""
    async with Limiter(settings_of(redis_server.url)) as limiter:
        view = FleetView(limiter)
        await view.read()
        with redis_server.client() as client:
            client.config_resetstat()
            found = await asyncio.gather(*[view.read() for _ in range(100)])
            assert all(each is found[0] for each in found)
            assert client.info("commandstats").get("cmdstat_zrange", {"calls": 0})["calls"] < 1_000


async def test_old_points_are_read_once(redis_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only buckets that may still grow are read again."""
    monkeypatch.setattr("ratelimit_mw._internal.fleet.view.KEPT_SECONDS", -1.0)
    async with Limiter(settings_of(redis_server.url)) as limiter:
        view = FleetView(limiter)
        await view.read()
        with redis_server.client() as client:
            client.config_resetstat()
            await view.read()
            assert client.info("commandstats")["cmdstat_zrange"]["calls"] < 20


async def test_a_report_is_sent_by_the_digest_of_its_script(server: StoreServer) -> None:
    """A server gets the script once, and again after it has lost it; else 40 bytes stand for 2,000."""
    store = open_figures_store(settings_of(server.url).backend)
    with server.client() as client:
        client.script_flush()
        client.config_resetstat()
        for _ in range(3):
            await store.write(Report("w:1", "{}", callers={"admitted k:a": 1}))
        client.script_flush()
        await store.write(Report("w:1", "{}", callers={"admitted k:a": 1}))
        calls = {name: figures["calls"] for name, figures in client.info("commandstats").items()}
    await store.close()
    assert calls["cmdstat_eval"] == 2
    assert calls["cmdstat_evalsha"] == 4


async def test_a_process_keeps_one_connection(start_server: StartServer) -> None:
    """The documentation tells how many, by which `maxclients` is set: one for decisions, keys and reports."""
    server = start_server("redis")
    async with Limiter(settings_of(server.url)) as limiter:
        await ask(limiter, "k", 20)
        await limiter.engine.live.read_keys()
        for _ in range(3):
            await limiter.engine.reporter.report()
        await asyncio.sleep(1)
        with server.client() as client:
            names = [each["name"] for each in client.client_list()]
    assert names.count("ratelimit_mw") == 1
