"""Limits that a request meets: of its caller's plan, of the route's rule, and shared by all callers."""

import httpx
import pytest
from starlette.types import ASGIApp

from ratelimit_mw import Identity
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.backends.redis.backend import RedisBackend
from ratelimit_mw._internal.model.limits import Limit, Window
from ratelimit_mw._internal.policy.identity import Identifier
from ratelimit_mw._internal.policy.lookup import PolicyLookup
from ratelimit_mw._internal.policy.policy import Policies, Policy
from ratelimit_mw._internal.settings import KeySettings
from tests.support.asgi import (
    Down,
    FakeClock,
    client_of,
    limited,
    limited_client,
    limiter_of,
    scope_of,
    settings_of,
    shown,
    statuses,
)


async def left(app: ASGIApp, path: str = "/", *, address: str = "192.0.2.1", **headers: str) -> str | None:
    """Send one more request; return its `X-RateLimit-Remaining`."""
    async with client_of(app, address=address, **headers) as client:
        return shown(await client.get(path))[1]


async def test_first_matching_rule_wins() -> None:
    """Of several rules that match, the first in the file holds, and no other adds to it."""
    text = """
        plans.anonymous.requests = ["99/minute"]
        routes = [
            {path = "/v1/batch", cost = 10},
            {path = "/v1/{name}", cost = 3},
            {path = "/{rest:path}", cost = 2},
        ]
    """
    app = limited(text, FakeClock())
    assert await left(app, "/v1/batch") == "89"
    assert await left(app, "/v1/other") == "86"
    assert await left(app, "/v1/other/deeper") == "84"
    assert await left(app, "/v1/batch/") == "82"


async def test_rule_for_methods() -> None:
    """A rule holds for its methods only; HEAD counts as GET, and any other method by the plan."""
    text = 'plans.anonymous.requests = ["99/minute"]\nroutes = [{path = "/", methods = ["get"], cost = 10}]'
    async with limited_client(text, FakeClock()) as client:
        methods = ("GET", "HEAD", "POST", "BREW", "OPTIONS")
        remaining = [shown(await client.request(method, "/"))[1] for method in methods]
    assert remaining == ["89", "79", "78", "77", "76"]


async def test_head_and_get_share_a_route_limit() -> None:
    """HEAD draws on the count of GET; it is not a second quota."""
    text = 'routes = [{path = "/", methods = ["GET"], requests = ["2/minute"]}]'
    async with limited_client(text, FakeClock()) as client:
        seen = [(await client.request(method, "/")).status_code for method in ("GET", "HEAD", "GET")]
    assert seen == [200, 200, 429]


async def test_unmatched_paths_have_the_plan() -> None:
    """A path that no rule matches is limited by the plan, however it is spelled."""
    text = 'plans.anonymous.requests = ["9/minute"]\nroutes = [{path = "/health", exempt = true}]'
    app = limited(text, FakeClock())
    paths = ("/health/", "//health", "/Health", "/health/x", "/healthz", "/%2e/health", "/health%00")
    assert [await left(app, path) for path in paths] == ["8", "7", "6", "5", "4", "3", "2"]
    assert await left(app, "/%68ealth") is None


async def test_exempt_needs_no_quota() -> None:
    """An exempt route answers callers whose quota is used up, and uses none."""
    text = 'plans.anonymous.requests = ["1/minute"]\nroutes = [{path = "/health", exempt = true}]'
    async with limited_client(text, FakeClock()) as client:
        assert await statuses(client, 5, "/health") == [200] * 5
        assert await statuses(client, 2) == [200, 429]
        assert await statuses(client, 5, "/health") == [200] * 5


async def test_exempt_asks_nobody_who_he_is() -> None:
    """An exempt route refuses no caller over two keys."""
    app = limited('routes = [{path = "/health", exempt = true}]', FakeClock())
    async with client_of(app, x_api_key="a", authorization="Bearer b") as client:
        assert [(await client.get(path)).status_code for path in ("/health", "/")] == [200, 400]


async def test_route_limit_is_each_callers_own() -> None:
    """A route's `requests` is counted for each caller, on that route alone, on top of the plan."""
    text = 'routes = [{path = "/slow", requests = ["2/minute"]}, {path = "/too", requests = ["2/minute"]}]'
    app = limited(text, FakeClock())
    for key in ("a", "b"):
        async with client_of(app, x_api_key=key) as client:
            assert await statuses(client, 3, "/slow") == [200, 200, 429]
            assert await statuses(client, 3, "/too") == [200, 200, 429]
            assert shown(await client.get("/"))[:2] == ("60", "55")


async def test_route_limit_counts_the_cost() -> None:
    """A request counts its route's cost under the route's own limit and total, too."""
    text = 'routes = [{path = "/", cost = 4, requests = ["9/minute"], total = ["17/minute"]}]'
    app = limited(text, FakeClock())
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 3) == [200, 200, 429]
    async with client_of(app, x_api_key="b") as client:
        assert await statuses(client, 2) == [200, 200]
    async with client_of(app, x_api_key="c") as client:
        assert (await client.get("/")).json()["error"]["code"] == "CAPACITY_EXCEEDED"


@pytest.mark.parametrize(
    ("text", "elsewhere"),
    [
        ('routes = [{path = "/", total = ["3/minute"]}]', 200),
        ('application.requests = ["3/minute"]', 429),
    ],
    ids=["total", "application"],
)
async def test_shared_limits_count_all_callers(text: str, elsewhere: int) -> None:
    """A route's `total` counts all its callers together, the application's limits all requests."""
    app = limited(text, FakeClock())
    seen = []
    for key in "abcd":
        async with client_of(app, x_api_key=key) as client:
            seen += await statuses(client, 1)
    assert seen == [200, 200, 200, 429]
    async with client_of(app) as client:
        assert await statuses(client, 1, "/elsewhere") == [elsewhere]


async def test_callers_are_told_apart() -> None:
    """Each key has a quota of its own, and so has each address without a key."""
    app = limited("", FakeClock())
    assert [await left(app, x_api_key=key) for key in ("a", "a", "b")] == ["59", "58", "59"]
    assert [await left(app, address=f"192.0.2.{n}") for n in (1, 1, 2)] == ["19", "18", "19"]
    assert await left(app, authorization="Bearer a") == "57"


async def test_unknown_keys_can_be_anonymous() -> None:
    """With `unknown_keys = "anonymous"` inventing keys buys nothing: the address counts."""
    text = 'identity.unknown_keys = "anonymous"\nkeys = [{key = "known", plan = "default"}]'
    app = limited(text, FakeClock())
    assert [await left(app, x_api_key=key) for key in ("a", "b", "c")] == ["19", "18", "17"]
    assert await left(app) == "16"
    assert await left(app, x_api_key="known") == "59"


async def test_per_address_caps_unknown_and_anonymous_together() -> None:
    """`per_address` counts what an address sends without a key and under unknown ones; not listed ones."""
    text = 'identity.per_address = ["3/minute"]\nkeys = [{key = "known", plan = "default"}]'
    app = limited(text, FakeClock())
    seen = []
    for headers in (
        {},
        {"x_api_key": "a"},
        {"x_api_key": "b"},
        {"x_api_key": "c"},
        {},
        {"x_api_key": "known"},
    ):
        async with client_of(app, **headers) as client:
            seen += await statuses(client, 1)
    assert seen == [200, 200, 200, 429, 429, 200]
    async with client_of(app, address="192.0.2.9", x_api_key="a") as client:
        assert await statuses(client, 1) == [200]


@pytest.mark.parametrize(
    "text",
    ['identity.unknown_keys = "anonymous"', 'identity.per_address = ["4/minute"]'],
    ids=["alone", "cap"],
)
async def test_an_unknown_key_counts_where_it_comes_from(text: str) -> None:
    """One that comes again from another address is counted there, though it is known by then."""
    app = limited(f'{text}\nplans.anonymous.requests = ["4/minute"]', FakeClock())
    seen: dict[str, list[int]] = {"192.0.2.1": [], "192.0.2.2": []}
    for number in (1, 1, 1, 2, 2, 1, 2, 1, 2, 2):
        address = f"192.0.2.{number}"
        async with client_of(app, address=address, x_api_key="mine") as client:
            seen[address] += await statuses(client, 1)
    assert all(answers == [200, 200, 200, 200, 429] for answers in seen.values())


ACCOUNTS = """
    plans.team = {requests = ["9/minute"], share = "account"}
    keys = [
        {key = "a", plan = "team", account = "acme"},
        {key = "b", plan = "team", account = "acme"},
        {key = "c", plan = "team", account = "other"},
    ]
"""


async def test_keys_of_an_account_share_its_counts() -> None:
    """With `share = "account"` a second key of the account is not a second quota."""
    app = limited(ACCOUNTS, FakeClock())
    assert [await left(app, x_api_key=key) for key in "abc"] == ["8", "7", "8"]


async def test_sharing_plan_without_an_account_counts_by_key() -> None:
    """On a plan that shares by account, a caller that has none is counted by its key, or its address."""
    text = ACCOUNTS + 'identity = {default_plan = "team", anonymous_plan = "team"}'
    app = limited(text, FakeClock())
    assert [await left(app, x_api_key=key) for key in ("x", "y", "x")] == ["8", "8", "7"]
    assert [await left(app, address=f"192.0.2.{n}") for n in (1, 2)] == ["8", "8"]


async def test_listed_key_overrides_its_plan() -> None:
    """A key's own entry takes the place of that entry of its plan; the rest stays the plan's."""
    text = """
        plans.default = {requests = ["60/minute", "100/hour"], concurrent = 1}
        keys = [
            {key = "fast", plan = "default", requests = ["7/second"]},
            {key = "none", plan = "default", requests = []},
            {key = "wide", plan = "default", concurrent = 9},
        ]
    """
    app = limited(text, FakeClock())
    assert await left(app, x_api_key="fast") == "6"
    assert await left(app, x_api_key="none") is None
    assert await left(app, x_api_key="wide") == "59"


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ('requests = ["3/minute"]', 'requests = ["7/minute"]'),
        ("concurrent = 2", "concurrent = 4"),
        ('spending.daily = "0.20"', 'spending.daily = "5.00"'),
    ],
    ids=["requests", "concurrent", "spending"],
)
def test_limits_of_a_key_are_its_own_whoever_came_before(own: str, other: str) -> None:
    """Keys of one plan that write the same entry differently don't get each other's limits."""
    text = f'keys = [{{ key = "a", plan = "default", {own} }}, {{ key = "b", plan = "default", {other} }}]'

    def limits_of(*keys: bytes) -> list[list[Limit]]:
        limiter = limiter_of(text, FakeClock())
        met = [
            limiter.engine.policies.match(limiter.engine.identify(scope_of(key)), "GET", "/") for key in keys
        ]
        return [[counter.limit for counter in policy.priced_charge.counters] for policy in met]

    (alone,) = limits_of(b"a")
    before, after = limits_of(b"b", b"a")
    assert after == alone != before


async def test_shadow_lets_through_and_charges_nothing() -> None:
    """In shadow a would-be refusal is let through, marked, and charged nowhere."""
    text = 'shadow = true\nplans.anonymous.requests = ["2/minute", "9/hour"]'
    clock = FakeClock()
    async with limited_client(text, clock) as client:
        responses = [await client.get("/") for _ in range(5)]
        assert [r.status_code for r in responses] == [200] * 5
        marks = [r.headers.get("x-ratelimit-shadow") for r in responses]
        assert marks == [None, None, "refused", "refused", "refused"]
        assert shown(responses[4])[:2] == ("2", "0")
        clock.set(60)
        await client.get("/")
        clock.set(120)
        assert shown(await client.get("/"))[:2] == ("2", "1")
        clock.set(180)
        assert [shown(await client.get("/"))[:2] for _ in range(2)] == [("2", "1"), ("2", "0")]


def shadowed(response: httpx.Response) -> bool:
    """Whether it was let through against a limit."""
    assert (response.status_code == 429) is ("retry-after" in response.headers)
    return "x-ratelimit-shadow" in response.headers


@pytest.mark.parametrize(
    ("text", "on_route", "elsewhere"),
    [
        ("shadow = true", True, True),
        ("plans.anonymous.shadow = true", True, True),
        ('routes = [{path = "/route", shadow = true}]', True, False),
        ('shadow = true\nroutes = [{path = "/route", shadow = false}]', False, True),
        ("shadow = true\nplans.anonymous.shadow = false", False, False),
        ('plans.anonymous.shadow = false\nroutes = [{path = "/route", shadow = true}]', True, False),
    ],
)
async def test_whose_shadow_counts(text: str, on_route: bool, elsewhere: bool) -> None:
    """The route's shadow before the plan's, the plan's before the global one."""
    text += '\nplans.anonymous.requests = ["1/minute"]'
    async with limited_client(text, FakeClock()) as client:
        await client.get("/")
        assert shadowed(await client.get("/route")) is on_route
        assert shadowed(await client.get("/elsewhere")) is elsewhere


async def test_shadow_of_capacity() -> None:
    """In shadow the limits that all callers share refuse nobody, either."""
    text = 'shadow = true\napplication.requests = ["1/minute"]'
    async with limited_client(text, FakeClock()) as client:
        await client.get("/")
        assert shadowed(await client.get("/"))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('plans.default.requests = ["60/minute"]', 'plans.default.requests = ["5/minute"]', ("5", "1")),
        ('plans.default.requests = ["60/minute"]', 'plans.default.requests = ["2/minute"]', ("2", "0")),
        ('plans.default.requests = ["5/minute"]', 'plans.default.requests = ["60/minute"]', ("60", "56")),
        (
            'plans.default.requests = ["5/minute"]',
            'plans.gold.requests = ["7/minute"]\nkeys = [{key = "a", plan = "gold"}]',
            ("7", "3"),
        ),
        (
            'routes = [{path = "/", requests = ["9/minute"]}]',
            'routes = [{path = "/first"}, {path = "/", requests = ["7/minute"]}]',
            ("7", "3"),
        ),
        (
            'plans.default.requests = ["60/minute"]',
            'plans.default.requests = ["60/1 minute", "9/hour"]',
            ("9", "8"),
        ),
    ],
    ids=["lowered", "lowered below use", "raised", "other plan", "route moved", "window added"],
)
async def test_changes_keep_what_was_counted(before: str, after: str, expected: tuple[str, str]) -> None:
    """A change of plan or amount keeps the counts: they belong to caller, scope and the window's length."""
    clock = FakeClock()
    backend = MemoryBackend(clock=clock)
    async with limited_client(before, clock, backend=backend, x_api_key="a") as client:
        assert await statuses(client, 3) == [200] * 3
    async with limited_client(after, clock, backend=backend, x_api_key="a") as client:
        assert shown(await client.get("/"))[:2] == expected


@pytest.mark.parametrize(
    ("text", "unpriced", "priced"),
    [
        ("", "local", "local"),
        ('backend.on_failure = "allow"', "allow", "allow"),
        ('backend.on_failure = "allow"\nplans.default.on_failure = "deny"', "deny", "deny"),
        (
            'plans.default.on_failure = "deny"\nroutes = [{path = "/", on_failure = "allow"}]',
            "allow",
            "allow",
        ),
        (
            'plans.default = {on_failure = "allow", spending = {daily = "9", on_failure = "deny"}}',
            "allow",
            "deny",
        ),
    ],
    ids=["built-in", "backend", "plan", "route", "spending"],
)
async def test_whose_on_failure_counts(text: str, unpriced: str, priced: str) -> None:
    """The route's before the plan's before the backend's; a budget's own before all where money is asked."""
    limiter = limiter_of(text, FakeClock(), Down())
    assert (await limiter.acquire(api_key="a")).decision.policy == unpriced
    assert (await limiter.acquire(api_key="a", price="1")).decision.policy == priced


def test_a_hook_may_make_its_callers_anew_each_time() -> None:
    """A caller with the same name and the same limits has one policy; with other limits another."""
    policies = Policies(settings_of(""))

    def match(requests: str) -> Policy:
        own = KeySettings.model_validate(
            {"hash": f"sha256:{64 * '0'}", "plan": "default", "requests": [requests]}
        )
        return policies.match(Identity("i:1", "default", limits=own), "GET", "/")

    first = match("5/minute")
    assert match("5/minute") is first
    assert match("6/minute").charge.counters != first.charge.counters


PARTITIONS = [
    "k:0123",
    "a:acme",
    "ip:192.0.2.9",
    "ip:address",
    "caller",
    "a {brace} of 100%d",
    "\u00e9\ud800",
    "",
]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("address", [None, "192.0.2.9", "address"])
@pytest.mark.parametrize("own", [None, (Window(7, 1, "minute"),)])
async def test_a_policy_made_from_another_is_as_if_it_was_made_alone(
    partition: str, address: str | None, own: tuple[Window, ...] | None
) -> None:
    """A policy made from another has limits, keys and slots of its own, as if it was made alone."""
    settings = settings_of("""
        identity.per_address = ["50/minute"]
        application = { requests = ["900/second"], concurrent = 70 }
        plans.default = { requests = ["9/minute", "90/hour"], concurrent = 3, spending.daily = "1.00" }
        routes = [{ path = "/", requests = ["2/second"], total = ["9/second"], price = "0.01" }]
    """)
    policies = Policies(settings)
    key = KeySettings(hash=f"sha256:{'0' * 64}", plan="default", requests=own) if own else None
    others = [Identity(f"k:{number}", "default", address="203.0.113.4") for number in range(3)]
    identity = Identity(partition, "default", address=address, limits=key)
    for index in (None, 0):
        for stranger in others:
            policies.at(stranger, index)
        made, alone = policies.at(identity, index), policies._compile(identity, index, None, is_blocked=False)
        backend = RedisBackend("redis://127.0.0.1:1")
        for one, other in ((made.charge, alone.charge), (made.priced_charge, alone.priced_charge)):
            assert one.counters == other.counters
            assert [one.slots, one.allowances] == [other.slots, other.allowances]
            assert [each.window for each in one.windows] == [each.window for each in other.windows]
            assert [one.lease_seconds, one.is_of_one, one.is_held] == [
                other.lease_seconds,
                other.is_of_one,
                other.is_held,
            ]
        packed, same = backend.prepare(made.charge), backend.prepare(alone.charge)
        assert (packed.keys, packed.head, packed.n_keys) == (same.keys, same.head, same.n_keys)
        assert (made.route, made.price, made.on_failure) == (alone.route, alone.price, alone.on_failure)


async def test_who_was_forgotten_is_decided_about_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of callers makes a process forget policies, and nothing that was counted."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_POLICIES", 50)
    app = limited('plans.default = { requests = ["3/minute"], concurrent = 2 }', FakeClock())
    policies = app.limiter.engine.policies
    for number in range(300):
        if number % 100 == 0:
            assert await left(app, x_api_key="mine") == str(2 - number // 100)
        assert await left(app, x_api_key=f"invented {number}") == "2"
        assert len(policies.latest) <= 50
    async with client_of(app, x_api_key="mine") as client:
        assert (await client.get("/")).status_code == 429


def test_callers_of_one_partition_keep_their_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that comes from several addresses in turn has one policy for each; so many are kept."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_POLICIES", 50)
    policies = Policies(settings_of('identity.per_address = ["5/minute"]'))
    here, there = [Identity("k:1", "default", address=f"192.0.2.{number}") for number in range(2)]
    first = [policies.at(identity, None) for identity in (here, there)]
    assert [policies.at(identity, None) for identity in (here, there, here)] == [*first, first[0]]
    assert [policy.is_latest for policy in first] == [True, False]
    for number in range(500):
        policies.at(Identity("k:1", "default", address=f"198.51.100.{number}"), None)
    assert len(policies.latest) == 1
    assert len(policies._others) <= 50


@pytest.mark.parametrize(
    ("plan", "route", "is_taken"),
    [
        ("", "", False),
        (", prefetch = true", "", True),
        (", prefetch = true, concurrent = 5", "", False),
        (', prefetch = true, spending.daily = "9.00"', "", True),
        (', prefetch = true, spending.daily = "9.00"', ', price = "0.01"', False),
        (", prefetch = true", ', total = ["9/second"]', False),
    ],
)
def test_which_requests_are_counted_ahead(plan: str, route: str, is_taken: bool) -> None:
    """On plans that say so, those without a price that need nothing but the caller's own rates."""
    text = f"""
        plans.default = {{ requests = ["9000/minute"]{plan} }}
        routes = [{{ path = "/"{route} }}]
    """
    policy = Policies(settings_of(text)).match(Identity("k:1", "default"), "GET", "/")
    assert (policy.prefetch_state is not None) is is_taken


def test_keys_that_come_again_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys come several times, the latest policies of so many are kept, of those seen last."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.lookup.MAX_REMEMBERED", 50)
    settings = settings_of("")
    lookup = PolicyLookup(Identifier(settings), Policies(settings))
    for number in range(300):
        found = [lookup.find(scope_of(f"key {number}".encode())) for _ in range(3)]
        assert found[2] is found[1]
    assert len(lookup._latest) <= 50


def test_limits_of_keys_are_compiled_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys have limits of their own, so many are kept to make policies from."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_MODELS", 10)
    policies = Policies(settings_of(""))
    for number in range(1, 50):
        own = KeySettings(hash=f"sha256:{'0' * 64}", plan="default", requests=(Window(number, 1, "minute"),))
        policy = policies.at(Identity(f"k:{number}", "default", limits=own), None)
        assert policy.charge.counters[0].limit == Window(number, 1, "minute")
    assert 0 < len(policies._models) <= 10


def test_who_comes_again_stays_the_latest_whoever_else_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is met again is not forgotten with those that were replaced."""
    monkeypatch.setattr("ratelimit_mw._internal.policy.policy.MAX_POLICIES", 50)
    policies = Policies(settings_of('identity.per_address = ["5/minute"]'))
    here, there = [Identity("k:1", "default", address=f"192.0.2.{number}") for number in range(2)]
    first, _, again = [policies.at(identity, None) for identity in (here, there, here)]
    for cost in range(2, 200):
        policies.at(Identity("k:2", "default"), None, cost)
    assert first is again is policies.at(here, None)
    assert first.is_latest
