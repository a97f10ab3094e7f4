"""Plans by network, blocked plans and blocked networks: who has them, and what a refusal says."""

import json
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Scope

from ratelimit_mw import Identity, KeyEntry, Limit, Limiter, RateLimitMiddleware
from ratelimit_mw import limited as limited_by
from ratelimit_mw._internal.policy.client_address import AddressReader
from ratelimit_mw._internal.policy.networks import NetworkTable
from ratelimit_mw._internal.settings.values import parse_network
from tests.support.asgi import Counting, Down, FakeClock, client_of, limited, limiter_of, ok_app, settings_of
from tests.support.commands import Commands
from tests.support.settings_files import written

PLANS = """
[plans.internal]
[plans.office]
requests = ["5/minute"]
[plans.blocked]
blocked = true
"""
BLOCKED = """
identity.blocked_networks = ["192.0.2.0/24"]
[plans.blocked]
blocked = true
[[keys]]
key = "stolen"
plan = "blocked"
"""


def entries(*networks: tuple[str, str]) -> str:
    """The settings of these networks and their plans, and the plans."""
    return PLANS + "".join(
        f'[[addresses]]\nnetwork = "{network}"\nplan = "{plan}"\n' for network, plan in networks
    )


def plan_at(text: str, address: str) -> str:
    """The plan of a caller without a key at an address."""
    return Limiter(settings_of(text)).engine.identify.of_address(address).plan


@pytest.mark.parametrize(
    ("address", "plan"),
    [
        ("10.1.2.3", "internal"),
        ("10.20.1.1", "office"),
        ("10.20.0.0", "office"),
        ("10.20.255.255", "office"),
        ("10.21.0.0", "internal"),
        ("9.255.255.255", "anonymous"),
        ("11.0.0.0", "anonymous"),
        ("::ffff:10.1.2.3", "internal"),
        ("::ffff:a14:101", "office"),
        ("64:ff9b::10.20.1.1", "office"),
        ("64:ff9b:1::10.1.1.1", "internal"),
        ("2002:a01:203::1", "internal"),
        ("2001:db8:7:1::9", "office"),
        ("2001:db8:8::1", "anonymous"),
        ("2001:db8:7:2::5", "internal"),
        ("2001:db8:7:2::6", "office"),
        ("192.0.2.7", "office"),
        ("192.0.2.8", "anonymous"),
        ("unix", "anonymous"),
        ("testclient", "anonymous"),
    ],
)
def test_the_longest_prefix_counts(address: str, plan: str) -> None:
    """A caller has the plan of the smallest network that holds its address, however that is written."""
    text = entries(
        ("10.0.0.0/8", "internal"),
        ("::ffff:10.20.0.0/112", "office"),
        ("2001:db8:7::/48", "office"),
        ("2001:db8:7:2::5", "internal"),
        ("192.0.2.7", "office"),
    )
    assert plan_at(text, address) == plan


def test_networks_of_no_length_are_everybody() -> None:
    """`0.0.0.0/0` holds all of IPv4, carried addresses included, and `::/0` all else."""
    text = entries(("0.0.0.0/0", "office"), ("::/0", "internal"), ("2001:db8::/32", "office"))
    callers = ["203.0.113.9", "::ffff:203.0.113.9", "64:ff9b::203.0.113.9", "2001:db9::1", "2001:db8::1"]
    assert [plan_at(text, each) for each in callers] == ["office", "office", "office", "internal", "office"]
    assert plan_at(text, "unix") == "anonymous"


def test_a_network_of_translated_addresses_holds_what_is_in_none_smaller() -> None:
    """A network of NAT64 addresses counts by its own prefix, and an IPv4 network within it is longer."""
    text = entries(("64:ff9b::/96", "internal"), ("10.0.0.0/8", "office"))
    assert plan_at(text, "64:ff9b::203.0.113.9") == "internal"
    assert plan_at(text, "64:ff9b::10.0.0.1") == "office"


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_a_look_up_finds_what_a_search_of_all_finds(networks: list[tuple[int, int]], number: int) -> None:
    """The table's answer is that of a comparison with every network."""
    found = {
        IPv4Network((base >> (32 - size) << (32 - size), size)): place
        for place, (base, size) in enumerate(networks)
    }
    address = IPv4Address(number)
    holding = [network for network in found if address in network]
    expected = found[max(holding, key=lambda each: each.prefixlen)] if holding else None
    assert NetworkTable(found.items()).find(address) == expected


async def test_callers_of_a_network_are_counted_one_by_one() -> None:
    """Each address has its own counts; keys have plans of their own, unless they count by address."""
    text = entries(("10.0.0.0/8", "office")) + '[[keys]]\nkey = "own"\nplan = "default"\n'
    app = limited(text, FakeClock())
    for address, headers, expected in [
        ("10.0.0.1", {}, ("5", "4")),
        ("10.0.0.1", {}, ("5", "3")),
        ("10.0.0.2", {}, ("5", "4")),
        ("192.0.2.1", {}, ("20", "19")),
        ("10.0.0.1", {"x_api_key": "own"}, ("60", "59")),
        ("10.0.0.1", {"x_api_key": "unknown"}, ("60", "59")),
    ]:
        async with client_of(app, address=address, **headers) as client:
            response = await client.get("/")
        names = ("x-ratelimit-limit", "x-ratelimit-remaining")
        assert tuple(response.headers[name] for name in names) == expected
    by_address = limited('identity.unknown_keys = "anonymous"\n' + text, FakeClock())
    async with client_of(by_address, address="10.0.0.1", x_api_key="unknown") as client:
        left = [(await client.get("/")).headers["x-ratelimit-remaining"] for _ in range(3)]
    async with client_of(by_address, address="192.0.2.1", x_api_key="unknown") as client:
        assert (await client.get("/")).headers["x-ratelimit-limit"] == "20"
    assert left == ["4", "3", "2"]


async def test_neighbours_in_one_64_may_differ_in_plan_and_share_counts() -> None:
    """A network longer than /64 gives its plan to its own addresses alone; the count is that of the /64."""
    text = 'identity.unknown_keys = "anonymous"\n' + entries(("2001:db8::5", "office"))
    app = limited(text, FakeClock())
    seen = []
    for address in ("2001:db8::5", "2001:db8::6", "2001:db8::5", "2001:db8::6"):
        async with client_of(app, address=address, x_api_key="unknown") as client:
            response = await client.get("/")
        seen.append((response.headers["x-ratelimit-limit"], response.headers["x-ratelimit-remaining"]))
    assert seen == [("5", "4"), ("20", "18"), ("5", "2"), ("20", "16")]


@pytest.mark.parametrize(
    ("forwarded", "plan"),
    [
        (None, "internal"),
        ("10.1.1.1", "internal"),
        ("192.0.2.9", "anonymous"),
        ("10.1.1.1, 192.0.2.9", "anonymous"),
        ("no address", "anonymous"),
        ("x" * 9_000, "anonymous"),
        (", ".join(["10.0.0.5"] * 65), "anonymous"),
    ],
)
def test_no_client_gets_the_plan_of_its_proxy(forwarded: str | None, plan: str) -> None:
    """A header that can't be read leaves a caller on the proxy's address, without the plan of its network."""
    text = entries(("10.0.0.0/8", "internal")) + '[identity]\ntrusted_proxies = ["10.0.0.5"]\n'
    identify = Limiter(settings_of(text)).engine.identify
    headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded.encode())]
    scope = {"type": "http", "client": ("10.0.0.5", 1), "headers": headers}
    assert identify(scope).plan == plan


def test_what_an_address_is_counted_under_is_an_address() -> None:
    """The name of a caller, given to a command, has the plan that the caller has."""
    reader = AddressReader(
        settings_of("").identity, settings_of(entries(("2001:db8::/48", "office"))).addresses
    )
    for text in ("2001:db8:0:1::/64", "2001:db8:0:1::9", "2001:db8:0:1::"):
        assert reader.written(text)[0::2] == ("2001:db8:0:1::/64", "office", None)


# blocks -----------------------------------------------------------------------------------------


async def test_a_blocked_caller_is_refused_without_asking_the_backend() -> None:
    """The 403 has a type and a code, no rate limit headers and no wait, and the backend is not asked."""
    backend = Counting(clock=FakeClock())
    async with client_of(
        limited(BLOCKED, FakeClock(), backend=backend), x_api_key="stolen", address="198.51.100.1"
    ) as client:
        response = await client.get("/")
    assert response.status_code == 403
    error = {"type": "permission_error", "code": "CALLER_BLOCKED", "message": "This caller is blocked."}
    assert response.json() == {"error": {**error, "details": {}}}
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-should-retry"] == "false"
    assert not [name for name in response.headers if "ratelimit" in name or name == "retry-after"]
    assert backend.asked == 0


@pytest.mark.parametrize(
    "headers", [{}, {"x_api_key": "unknown"}, {"x_api_key": "good"}, {"x_api_key": "a", "authorization": "b"}]
)
async def test_a_blocked_network_is_refused_with_a_key_or_without(headers: dict[str, str]) -> None:
    """Whoever calls from there is refused alike: no key is read, no hook and no backend asked."""
    asked: list[object] = []

    def hook(scope: Any) -> Identity:
        asked.append(scope)
        return Identity("somebody", "default")

    backend = Counting(clock=FakeClock())
    text = BLOCKED + '[[keys]]\nkey = "good"\nplan = "default"\n'
    for app in (
        limited(text, FakeClock(), backend=backend),
        limited(text, FakeClock(), backend=backend, identify=hook),
        limited(text, FakeClock(), backend=backend, resolve=hook),
    ):
        async with client_of(app, address="192.0.2.77", **headers) as client:
            assert (await client.get("/")).json()["error"]["code"] == "CALLER_BLOCKED"
    assert not asked
    assert backend.asked == 0


async def test_others_are_served_as_if_nothing_was_blocked() -> None:
    """A block touches nobody outside of it."""
    for address in ("192.0.1.255", "192.0.3.0", "::1", "unix"):
        async with client_of(limited(BLOCKED, FakeClock()), address=address) as client:
            response = await client.get("/")
        assert (response.status_code, response.headers["x-ratelimit-remaining"]) == (200, "19")


async def test_a_block_is_for_every_path() -> None:
    """Exempt routes, the usage path by any method, and the dashboard of a blocked network answer 403."""
    text = BLOCKED.replace(
        "identity.",
        '[operations]\nusage_path = "/usage"\ndashboard_path = "/d"\ndashboard_token = "t"\n[identity]\n',
    )
    app = limited(text + '[[routes]]\npath = "/health"\nexempt = true\n', FakeClock())
    async with (
        client_of(app, address="192.0.2.1") as network,
        client_of(app, address="198.51.100.1", x_api_key="stolen") as key,
    ):
        for method, path in [
            ("GET", "/"),
            ("POST", "/x"),
            ("GET", "/health"),
            ("GET", "/usage"),
            ("POST", "/usage"),
        ]:
            assert (await network.request(method, path)).status_code == 403
            assert (await key.request(method, path)).status_code == 403
        assert (await network.get("/d", headers={"authorization": "Bearer t"})).status_code == 403
        assert (await key.get("/d", headers={"authorization": "Bearer t"})).status_code == 200


@pytest.mark.parametrize("hook", ["identify", "resolve"])
async def test_no_hook_is_asked_about_a_blocked_key(hook: str) -> None:
    """A key of the settings whose plan is blocked is refused everywhere, whatever hooks say of others."""
    asked: list[object] = []

    def answer(given: Any) -> Any:
        asked.append(given)

    text = BLOCKED + '[[routes]]\npath = "/health"\nexempt = true\n'
    hooks: dict[str, Any] = {hook: answer}
    app = limited(text, FakeClock(), **hooks)
    async with client_of(app, address="198.51.100.1", x_api_key="stolen") as client:
        assert [(await client.get(path)).status_code for path in ("/", "/health")] == [403, 403]
    assert asked == []
    for headers in ({"x_api_key": "another"}, {}):
        async with client_of(app, address="198.51.100.1", **headers) as client:
            assert [(await client.get(path)).status_code for path in ("/", "/health")] == [200, 200]
    assert len(asked) == (2 if hook == "identify" else 1)


async def test_a_hook_is_asked_about_a_key_that_only_the_default_plan_blocks() -> None:
    """Unknown keys are blocked then; which are known is for the hook to say."""
    text = 'identity.default_plan = "blocked"\n[plans.default]\n[plans.blocked]\nblocked = true\n'
    app = limited(text, FakeClock(), resolve=lambda _: KeyEntry(plan="default"))
    async with client_of(app, address="198.51.100.1", x_api_key="of the database") as client:
        assert (await client.get("/")).status_code == 200


async def test_a_block_holds_while_the_backend_is_away() -> None:
    """No outage and no `on_failure` lets a blocked caller in."""
    text = 'backend.on_failure = "allow"\n' + BLOCKED
    async with client_of(
        limited(text, FakeClock(), backend=Down(clock=FakeClock())), address="192.0.2.1"
    ) as client:
        assert (await client.get("/")).status_code == 403


async def test_a_websocket_of_a_blocked_caller_is_refused() -> None:
    """The handshake gets the same 403, or is closed for policy where the server has no denial response."""
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = limited(BLOCKED, FakeClock())
    scope = {"type": "websocket", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    await app({**scope, "extensions": {"websocket.http.response": {}}}, receive, send)
    assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 403)
    await app(scope, receive, send)
    assert sent[-1] == {"type": "websocket.close", "code": 1008, "reason": ""}


@pytest.mark.parametrize("address", ["192.0.2.1", "198.51.100.1"])
async def test_shadow_lets_the_blocked_through_and_counts_them(address: str) -> None:
    """A would-be refusal charges nothing, and shows as shadow."""
    backend = Counting(clock=FakeClock())
    app = limited("shadow = true\n" + BLOCKED, FakeClock(), backend=backend)
    async with client_of(app, address=address, x_api_key="stolen") as client:
        assert (await client.get("/")).text == "ok"
    assert backend.asked == 0
    ((_, _, outcome, limit), number), *others = app.limiter.stats().totals.items()
    assert (outcome, limit, number, others) == ("shadow", "", 1, [])


async def test_refusals_of_blocked_callers_are_counted() -> None:
    """They have an outcome of their own, under the plan that the caller has by its address."""
    app = limited(BLOCKED, FakeClock())
    async with client_of(app, address="192.0.2.1") as client:
        await client.get("/")
        await client.get("/")
    assert app.limiter.stats().totals == {("anonymous", "", "blocked", ""): 2}


async def test_an_anonymous_plan_may_be_blocked() -> None:
    """Without a key nobody gets in; with one the key's own plan counts."""
    app = limited('identity.anonymous_plan = "blocked"\n[plans.blocked]\nblocked = true\n', FakeClock())
    async with client_of(app) as client, client_of(app, x_api_key="k") as known:
        assert (await client.get("/")).status_code == 403
        assert (await known.get("/")).status_code == 200


async def test_problem_details_of_a_block() -> None:
    """With `body = "problem"` the answer is a problem without a type of the draft."""
    text = 'response.body = "problem"\nresponse.documentation_url = "https://example.com/d"\n' + BLOCKED
    async with client_of(limited(text, FakeClock()), address="192.0.2.1") as client:
        response = await client.get("/")
    assert response.headers["content-type"] == "application/problem+json"
    expected = {
        "type": "about:blank",
        "title": "Forbidden",
        "status": 403,
        "code": "CALLER_BLOCKED",
        "details": {},
    }
    assert response.json() == {
        **expected,
        "detail": "This caller is blocked.",
        "documentation_url": "https://example.com/d",
    }


async def test_acquire_knows_blocks() -> None:
    """A limiter in code refuses as the middleware does: by key, by address, and by a key from an address."""
    limiter = limiter_of(BLOCKED, FakeClock())
    leases = [
        await limiter.acquire(api_key="stolen"),
        await limiter.acquire(address="192.0.2.9"),
        await limiter.acquire(api_key="other", address="192.0.2.9"),
    ]
    for lease in leases:
        refusal = lease.decision.refusal
        assert refusal is not None
        assert (lease.allowed, refusal.reason, refusal.retry_after) == (False, "blocked", None)
    assert (await limiter.acquire(api_key="other", address="192.0.3.9")).allowed


async def test_a_key_of_a_blocked_plan_draws_on_no_limits() -> None:
    """Limits that a blocked plan or its key writes are not charged."""
    text = '[plans.blocked]\nblocked = true\nrequests = ["1/minute"]\n'
    text += '[[keys]]\nkey = "a"\nplan = "blocked"\nconcurrent = 1\n'
    backend = Counting(clock=FakeClock())
    async with client_of(limited(text, FakeClock(), backend=backend), x_api_key="a") as client:
        assert [(await client.get("/")).status_code for _ in range(3)] == [403] * 3
    assert backend.asked == 0


@pytest.mark.parametrize("headers", [{"x_api_key": "stolen"}, {}])
async def test_limits_in_code_let_no_blocked_caller_in(headers: dict[str, str]) -> None:
    """A block holds on routes with limits in code, and no function of theirs and no price hook is asked."""
    asked: list[object] = []

    def key(scope: Scope, identity: Identity) -> str:
        asked.append(identity)
        return "everyone"

    def price(scope: Scope, identity: Identity) -> str:
        asked.append(identity)
        return "1"

    @limited_by("10/minute")
    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    @limited_by(Limit("by-key", "10/minute", by=key))
    async def keyed(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/plain", plain), Route("/keyed", keyed)]
    text = BLOCKED.replace("blocked = true", 'blocked = true\nspending = { daily = "5" }')
    app = limited(text, FakeClock(), Starlette(routes=routes), price=price)
    address = "198.51.100.1" if headers else "192.0.2.1"
    async with client_of(app, address=address, **headers) as client:
        assert [(await client.get(path)).status_code for path in ("/plain", "/keyed")] == [403, 403]
    assert not asked


async def test_acquire_with_limits_in_code_lets_no_blocked_caller_in() -> None:
    """Limits that a job names beside its caller don't lift the caller's block, and are not charged."""
    backend = Counting(clock=FakeClock())
    limiter, jobs = limiter_of(BLOCKED, FakeClock(), backend), Limit("jobs", "10/minute")
    leases = [
        await limiter.acquire(jobs.on("x"), api_key="stolen"),
        await limiter.acquire(jobs.on("x"), address="192.0.2.9"),
        await limiter.acquire(jobs.on("x"), api_key="other", address="192.0.2.9"),
    ]
    assert [lease.allowed for lease in leases] == [False] * 3
    refusals = [lease.decision.refusal for lease in leases]
    assert {refusal.reason for refusal in refusals if refusal is not None} == {"blocked"}
    assert backend.asked == 0
    assert (await limiter.acquire(jobs.on("x"), api_key="other")).allowed
    keys_only = limiter_of(
        'identity.anonymous_plan = "blocked"\n[plans.blocked]\nblocked = true\n', FakeClock()
    )
    assert (await keys_only.acquire(jobs.on("x"))).allowed  # nobody's job
    assert not (await keys_only.acquire(jobs.on("x"), address="192.0.2.9")).allowed


async def test_a_change_of_the_settings_blocks_and_frees() -> None:
    """Settings put in force hold from the next request on."""
    app = RateLimitMiddleware(ok_app(), settings=settings_of(""))
    async with client_of(app, address="192.0.2.1") as client:
        seen = [(await client.get("/")).status_code]
        for text in ('identity.blocked_networks = ["192.0.2.1"]', ""):
            app.limiter.engine.apply(settings_of(text))
            seen.append((await client.get("/")).status_code)
    assert seen == [200, 403, 200]


def test_explain_and_show_name_the_block(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command says who is blocked and by which setting; with shadow that nobody is refused for it."""
    commands = Commands(capsys)
    text = BLOCKED + '[[addresses]]\nnetwork = "10.0.0.0/8"\nplan = "default"\n'
    path = str(written(tmp_path / "limits.toml", text))
    explained = commands.good("explain", "GET", "/", "--address", "192.0.2.7", "--settings", path)
    assert "refused with 403 (identity.blocked_networks[0]: 192.0.2.0/24)" in explained
    explained = commands.good("explain", "GET", "/", "--key", "stolen", "--settings", path)
    assert "refused with 403 (plans.blocked.blocked)" in explained
    told = json.loads(
        commands.good("explain", "GET", "/", "--address", "10.1.1.1", "--json", "--settings", path)
    )
    assert told["plan"] == {"name": "default", "from": "no API key: addresses[0]: 10.0.0.0/8"}
    assert told["blocked"] == {"value": False, "from": None}
    both = ("explain", "GET", "/", "--key", "other", "--address", "192.0.2.7", "--json", "--settings", path)
    assert json.loads(commands.good(*both))["blocked"]["value"] is True
    summary = commands.good("check", path)
    assert "10.0.0.0/8 has plan default" in summary
    assert "blocked (blocked)" in summary


@pytest.mark.parametrize(
    "text", ["", "192.0.2.0/24/24", "10/8", "192.0.2.0/-1", "::/129", "1.2.3.4 ", "0x7f000001"]
)
def test_what_is_no_network_is_an_error(text: str) -> None:
    """Nothing but a network in the usual notation is taken for one."""
    with pytest.raises(Exception, match="is not a network"):
        parse_network(text)
