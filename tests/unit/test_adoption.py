"""Identities that an app names: one caller by hook and by hand, hashed, with limits of its own."""

from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from ratelimit_mw import Identity, KeyEntry, Lease, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.live.adoption import adopt
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.policy.identity import partition_of
from ratelimit_mw._internal.settings import Settings
from tests.support.asgi import FakeClock, client_of, limiter_of, ok_app, settings_of, shown, statuses

TEXT = """
plans.pro = { requests = ["100/minute"], units = { tokens = ["1000/minute"] } }
plans.team = { requests = ["9/minute"], share = "account" }
"""
EMAIL = "ann@example.com"


def settings() -> Settings:
    """Settings with two more plans."""
    return settings_of(TEXT)


def remaining(lease: Lease) -> int | None:
    """Units that the caller's nearest window has left."""
    return lease.decision.remaining


@pytest.mark.parametrize("account", [None, "acme"])
@pytest.mark.parametrize("plan", ["pro", "team"])
async def test_one_caller_by_hook_and_by_hand(plan: str, account: str | None) -> None:
    """An identity that a hook returns and that is handed to `acquire` draws on one count."""
    identity = Identity(EMAIL, plan, account=account)
    limiter = limiter_of(TEXT, FakeClock())
    app = RateLimitMiddleware(ok_app(), limiter=limiter, identify=lambda _: identity)
    async with client_of(app) as client:
        first = int((await client.get("/")).headers["x-ratelimit-remaining"])
        assert remaining(await limiter.acquire(identity)) == first - 1
        assert shown(await client.get("/"))[1] == str(first - 2)


@pytest.mark.parametrize("kind", ["api key", "address", "hook", "per address"])
async def test_a_request_s_own_identity_is_the_same_caller(kind: str) -> None:
    """A lease's identity can be handed to `acquire`: nothing is hashed twice."""
    own = 'identity.per_address = ["50/minute"]\n' if kind == "per address" else ""
    limiter = limiter_of(own + TEXT + 'plans.anonymous.requests = ["60/minute"]', FakeClock())
    left: list[int | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        identity = scope["state"]["ratelimit"].identity
        left.append(remaining(await limiter.acquire(identity)))
        left.append(remaining(await limiter.acquire(replace(identity, plan="pro"))))
        await ok_app()(scope, receive, send)

    identify = (lambda _: Identity(EMAIL, "pro")) if kind == "hook" else None
    headers = {} if kind == "address" else {"x_api_key": "a"}
    async with client_of(RateLimitMiddleware(app, limiter=limiter, identify=identify), **headers) as client:
        before = int(shown(await client.get("/"))[1] or 0)
    assert left == [before - 1, 97]


async def test_a_handed_out_identity_with_another_name_is_another_caller() -> None:
    """A partition counts as one only as the package wrote it: a changed one is a name, and hashed."""
    limiter = limiter_of(TEXT, FakeClock())
    known = (await limiter.acquire(address="192.0.2.1")).identity
    other = (await limiter.acquire(replace(known, partition="ip:192.0.2.2"))).identity
    assert other.partition == partition_of("ip:192.0.2.2", "")
    forged = Identity(known.partition, known.plan, address=known.address)
    assert (await limiter.acquire(forged)).identity.partition == partition_of(known.partition, "")


def test_adopted_identity_keeps_what_it_says_but_not_its_name() -> None:
    """An identity of the app is counted under a hash of its name, with plan, account and address kept."""
    digest = hash_api_key(b"A", "")
    adopted = adopt(Identity("user:42", "pro", digest, "acme", "2001:db8:1:2::9"), settings())
    assert adopted == Identity(partition_of("user:42", ""), "pro", digest, "acme", "2001:db8:1:2::/64")
    assert adopt(adopted, settings()) == adopted


def test_adopted_identity_never_carries_a_key_in_the_clear() -> None:
    """A hook that mistakes the key for its hash doesn't bring it into logs and metrics."""
    adopted = adopt(Identity("A", "pro", api_key_hash="my-key"), settings())
    assert adopted.api_key_hash == hash_api_key(b"my-key", "")


def test_adopted_identity_shares_its_account() -> None:
    """On a plan that shares by account the app's callers draw on the account's counts, like listed keys."""
    assert adopt(Identity("user-42", "team", account="acme"), settings()).partition == "a:acme"
    assert adopt(Identity("user-42", "team"), settings()).partition == partition_of("user-42", "")
    entry = KeyEntry("team", account="acme")
    by_entry = adopt(Identity("user-42", "team", overrides=entry), settings())
    assert (by_entry.partition, by_entry.account) == ("a:acme", "acme")


async def test_an_identity_needs_a_plan_that_exists() -> None:
    """A typing error is named with the nearest plan, not counted on some other."""
    with pytest.raises(ValueError, match=r"plan 'Pro', which doesn't exist; did you mean 'pro'\?"):
        adopt(Identity("user-42", "Pro"), settings())
    with pytest.raises(ValueError, match=r"plan 'zzz', which doesn't exist$"):
        await limiter_of(TEXT, FakeClock()).acquire(Identity("user-42", "zzz"))


# limits of its own ----------------------------------------------------------------------------------

OWN = {
    "requests": KeyEntry("pro", requests=["3/minute"]),
    "slots": KeyEntry("pro", concurrent=3),
    "units": KeyEntry("pro", units={"tokens": ["3/minute"]}),
    "money": KeyEntry("pro", daily="3.00"),
}


@pytest.mark.parametrize("own", OWN)
async def test_overrides_are_an_entry_of_a_key(own: str) -> None:
    """Rates, slots, units and money of a `KeyEntry` take the place of the plan's, by hook and by hand."""
    identity = Identity("user:42", "pro", overrides=OWN[own])
    limiter = limiter_of(TEXT, FakeClock())
    leases = [await limiter.acquire(identity, price="1.00", units={"tokens": 1}) for _ in range(4)]
    assert [lease.allowed for lease in leases] == [True, True, True, False]
    for lease in leases:
        await lease.release()
    app = RateLimitMiddleware(
        ok_app(), limiter=limiter, identify=lambda _: identity, price=lambda *_: "1", estimate=tokens
    )
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == (200 if own == "slots" else 429)


def tokens(_: Scope, __: Identity) -> dict[str, int]:
    """An estimate of one token."""
    return {"tokens": 1}


async def test_overrides_that_change_hold_at_once() -> None:
    """A known caller whose limits change is limited by the new ones, and counts are kept."""
    limiter = limiter_of(TEXT, FakeClock())
    left = [
        remaining(await limiter.acquire(Identity("user:42", "pro", overrides=entry)))
        for entry in (KeyEntry("pro", requests=["9/minute"]), KeyEntry("pro", requests=("5/minute",)), None)
    ]
    assert left == [8, 3, 97]
    plain = KeyEntry("pro", label="nothing of its own")
    assert remaining(await limiter.acquire(Identity("user:42", "pro", overrides=plain))) == 96


WRONG: list[tuple[Any, type[Exception], str]] = [
    (Identity("a", "pro", overrides=KeyEntry("pro", requests=["often"])), ValueError, r"requests\[0\]"),
    (Identity("a", "pro", overrides=KeyEntry("pro", concurrent=0)), ValueError, "concurrent"),
    (Identity("a", "pro", overrides=KeyEntry("team")), ValueError, "name the plan 'team', .* 'pro'"),
    (
        Identity("a", "pro", account="b", overrides=KeyEntry("pro", account="c")),
        ValueError,
        "name the account 'c', .* 'b'",
    ),
    (
        Identity("a", "team", account="b", overrides=KeyEntry("team", requests=["1/minute"])),
        ValueError,
        "is set, though plan 'team' has share",
    ),
    (Identity("a", "pro", overrides={"requests": ["1/minute"]}), TypeError, "must be a KeyEntry, not dict"),  # type: ignore[arg-type]
    (Identity(42, "pro"), TypeError, "Identity.partition must be a string, not int"),  # type: ignore[arg-type]
    (Identity("a", None), TypeError, "Identity.plan must be a string, not NoneType"),  # type: ignore[arg-type]
    (Identity("a", "pro", account=1), TypeError, "Identity.account must be a string"),  # type: ignore[arg-type]
    ("user:42", TypeError, "an Identity, not( by)? str"),
    ({"partition": "a"}, TypeError, "an Identity, not( by)? dict"),
]


@pytest.mark.parametrize(("named", "error", "text"), WRONG)
async def test_what_is_no_identity_is_said(named: Any, error: type[Exception], text: str) -> None:
    """An identity that can't be used is an error that says what is wrong, by hook and by hand."""
    limiter = limiter_of(TEXT, FakeClock())
    with pytest.raises(error, match=text):
        await limiter.acquire(named)
    async with client_of(RateLimitMiddleware(ok_app(), limiter=limiter, identify=lambda _: named)) as client:
        with pytest.raises(error, match=text):
            await client.get("/")


# callers whom the hook doesn't know -----------------------------------------------------------------

LISTED = TEXT + 'keys = [{key = "listed", plan = "pro"}]\n'


@pytest.mark.parametrize(
    ("headers", "limit"),
    [
        ({}, "20"),
        ({"x_api_key": "listed"}, "100"),
        ({"authorization": "Bearer known"}, "9"),
        ({"x_api_key": "invented"}, "60"),
    ],
)
async def test_none_leaves_it_to_the_headers(headers: dict[str, str], limit: str) -> None:
    """A caller whom `identify=` doesn't know is read from the headers, as without the hook."""

    async def resolve(key: str) -> KeyEntry | None:
        return KeyEntry("team", account="acme") if key == "known" else None

    limiter = Limiter(settings_of(LISTED))
    app = RateLimitMiddleware(ok_app(), limiter=limiter, identify=lambda _: None, resolve=resolve)
    async with client_of(app, **headers) as client:
        assert shown(await client.get("/"))[0] == limit


async def test_none_and_two_keys_is_still_ambiguous() -> None:
    """The headers are read as without a hook: two different keys are answered 400."""
    app = RateLimitMiddleware(ok_app(), limiter=limiter_of(TEXT, FakeClock()), identify=lambda _: None)
    async with client_of(app, x_api_key="a", authorization="Bearer b") as client:
        response = await client.get("/")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "AMBIGUOUS_API_KEY"


async def test_exempt_routes_ask_nobody_by_hand() -> None:
    """On an exempt route `acquire` looks no key up, as a request there asks no hook."""
    asked: list[str] = []

    async def resolve(key: str) -> None:
        asked.append(key)

    text = TEXT + 'routes = [{path = "/health", exempt = true}]'
    limiter = Limiter(settings_of(text), resolve=resolve)
    assert (await limiter.acquire(api_key="a", path="/health")).allowed
    assert asked == []
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    async with client_of(app, x_api_key="a") as client:
        assert await statuses(client, 1, "/health") == [200]
        assert asked == []
        assert await statuses(client, 1) == [200]
    assert asked == ["a"]
