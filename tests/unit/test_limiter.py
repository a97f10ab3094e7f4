"""The limiter without HTTP: the same decisions, for a queue consumer or a message on a WebSocket."""

import time
from decimal import Decimal
from typing import Any

import pytest

from ratelimit_mw import BackendError, Decision, Lease, LeaseError, Limiter, RateLimited, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from tests.support.asgi import Counting, Down, FakeClock, client_of, limiter_of, ok_app, settings_of, shown
from tests.support.statuses import counted

ONE_SLOT = "plans.default.concurrent = 1\n"


def remaining(lease: Lease) -> int | None:
    """Return the number of units left in the caller's nearest window; None without a window."""
    nearest = lease.decision.nearest()
    return nearest and nearest[0].quota - nearest[1].used


async def test_acquire_by_api_key_counts_as_over_http() -> None:
    """A key has one quota, whether a request or a job uses it, and however it is written."""
    limiter = limiter_of('keys = [{key = "ключ", plan = "default"}]', FakeClock())
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    for key in ("a", "ключ"):
        async with client_of(app) as client:
            headers = [(b"authorization", b"Bearer " + key.encode())]
            assert shown(await client.get("/", headers=headers))[1] == "59"
        assert remaining(await limiter.acquire(api_key=key)) == 58
        assert remaining(await limiter.acquire(api_key=key.encode())) == 57
        assert remaining(await limiter.acquire(api_key=f" {key}\t", address="192.0.2.1")) == 56


async def test_acquire_by_address_counts_as_over_http() -> None:
    """An address counts as the client's of a request, by /64 where it is IPv6."""
    limiter = limiter_of("plans.anonymous.requests = ['9/minute']", FakeClock())
    app = RateLimitMiddleware(ok_app(), limiter=limiter)
    for address, other in [("192.0.2.1", "::ffff:192.0.2.1"), ("2001:db8::1", "2001:db8::2")]:
        async with client_of(app, address=address) as client:
            assert shown(await client.get("/"))[1] == "8"
        assert remaining(await limiter.acquire(address=address)) == 7
        assert remaining(await limiter.acquire(address=other)) == 6


async def test_counts_of_a_process_go_by_its_own_clock() -> None:
    """Without a server, decisions are made at this machine's time, and nothing is ever away."""
    limiter = Limiter(settings_of(""))
    before = time.time_ns() // 1_000
    lease = await limiter.acquire(api_key="a")
    assert before <= lease.decision.now_us <= time.time_ns() // 1_000
    assert limiter.stats().backend_up


async def test_acquire_by_identity() -> None:
    """An identity, such as a handler finds one, is counted where its requests are."""
    limiter = limiter_of("", FakeClock())
    identity = limiter.engine.identity_of(api_key="a")
    assert remaining(await limiter.acquire(identity)) == 59
    assert remaining(await limiter.acquire(api_key="a")) == 58


async def test_acquire_needs_to_know_who() -> None:
    """Nobody is not a caller: there is no quota that all who are not named would share."""
    limiter = limiter_of('plans.anonymous.requests = ["20/minute"]', FakeClock())
    with pytest.raises(ValueError, match="needs an identity, an api_key or an address"):
        await limiter.acquire()
    for empty in ("", " \t", b""):
        with pytest.raises(ValueError, match="needs an identity, an api_key or an address"):
            await limiter.acquire(api_key=empty)
        assert remaining(await limiter.acquire(api_key=empty, address="192.0.2.1")) is not None
    assert remaining(await limiter.acquire(address="192.0.2.1")) == 16


async def test_unknown_keys_without_an_address_share_no_cap() -> None:
    """A caller without an address is capped by no `per_address`: it would cap all callers together."""
    limiter = limiter_of('identity.per_address = ["1/minute"]', FakeClock())
    assert (await limiter.acquire(api_key="a")).allowed
    assert (await limiter.acquire(api_key="b")).allowed
    assert (await limiter.acquire(api_key="a", address="192.0.2.1")).allowed
    assert not (await limiter.acquire(api_key="b", address="192.0.2.1")).allowed


async def test_acquire_follows_the_routes() -> None:
    """With a method and a path the route's rule holds, exemption and all."""
    text = """
        routes = [
            {path = "/v1/batch", methods = ["POST"], cost = 10, requests = ["15/minute"]},
            {path = "/health", exempt = true},
        ]
    """
    limiter = limiter_of(text, FakeClock())
    assert remaining(await limiter.acquire(api_key="a", method="POST", path="/v1/batch")) == 5
    assert remaining(await limiter.acquire(api_key="a", path="/v1/batch")) == 49
    exempt = await limiter.acquire(api_key="a", path="/health")
    assert (exempt.allowed, remaining(exempt)) == (True, None)
    refused = await limiter.acquire(api_key="a", method="POST", path="/v1/batch")
    assert refused.decision.refusal is not None
    assert refused.decision.refusal.reason == "rate"


async def test_cost_takes_the_place_of_the_routes() -> None:
    """A cost that is named counts instead of the route's; one that never fits says so."""
    limiter = limiter_of('routes = [{path = "/", cost = 10}]', FakeClock())
    assert remaining(await limiter.acquire(api_key="a", cost=25)) == 35
    assert remaining(await limiter.acquire(api_key="a")) == 25
    never = (await limiter.acquire(api_key="a", cost=61)).decision.refusal
    assert never is not None
    assert (never.reason, never.retry_after) == ("cost", None)
    assert remaining(await limiter.acquire(api_key="a", cost=25)) == 0


@pytest.mark.parametrize("cost", [0, -1, True, 1.0, "1", Decimal(1), float("nan")])
async def test_bad_costs_are_refused(cost: Any) -> None:
    """A cost is a whole number of at least 1: nothing is free, and nothing is given back by it."""
    with pytest.raises(ValueError, match="cost must be a whole number, at least 1"):
        await limiter_of("", FakeClock()).acquire(api_key="a", cost=cost)


async def test_price_takes_the_place_of_the_routes() -> None:
    """A price that is named is held instead of the route's; where there is no budget it means nothing."""
    text = 'plans.default.spending = {daily = "1.00"}\nroutes = [{path = "/", price = "0.10"}]'
    limiter = limiter_of(text, FakeClock())
    assert (await limiter.acquire(api_key="a", price="0.8999999")).allowed
    assert (await limiter.acquire(api_key="a")).allowed
    refused = (await limiter.acquire(api_key="a", price="0.000001")).decision.refusal
    assert refused is not None
    assert refused.reason == "spending"
    assert (await limiter.acquire(address="192.0.2.1", price="1000")).allowed


@pytest.mark.parametrize("price", ["-1", "NaN", "", 0.5, True])
async def test_bad_prices_are_refused(price: Any) -> None:
    """A price that is not an amount is an error, not a free pass."""
    limiter = limiter_of('plans.default.spending = {daily = "1.00"}', FakeClock())
    with pytest.raises(ValueError, match="an amount"):
        await limiter.acquire(api_key="a", price=price)


async def test_lease_is_left_with_async_with() -> None:
    """`async with` frees the slot at the end, also when the work raises; `release` does it by hand."""
    limiter = limiter_of(ONE_SLOT, FakeClock())
    async with await limiter.acquire(api_key="a") as lease:
        assert lease.allowed
        assert not (await limiter.acquire(api_key="a")).allowed
    with pytest.raises(RuntimeError, match="broken"):
        async with await limiter.acquire(api_key="a"):
            raise RuntimeError("broken")
    lease = await limiter.acquire(api_key="a")
    await lease.release()
    await lease.release()
    assert (await limiter.acquire(api_key="a")).allowed


async def test_a_refused_lease_runs_no_body() -> None:
    """`async with` raises `RateLimited` with the decision in place of running the body of a refused lease."""
    limiter = limiter_of(ONE_SLOT, FakeClock())
    held = await limiter.acquire(api_key="a")
    with pytest.raises(RateLimited) as raised:
        async with await limiter.acquire(api_key="a"):
            pytest.fail("the body of a refused lease runs")
    assert raised.value.decision.refusal is not None
    assert raised.value.decision.refusal.reason == "concurrency"
    assert limiter.engine.leases.number == 1
    await held.release()
    async with await limiter.acquire(api_key="a") as lease:
        assert lease.allowed


async def test_refused_lease_holds_nothing() -> None:
    """Leaving, releasing, settling or detaching a refused lease takes nothing from whoever has the slot."""
    limiter = limiter_of(ONE_SLOT, FakeClock())
    await limiter.acquire(api_key="a")
    refused = await limiter.acquire(api_key="a")
    await refused.settle("1")
    await refused.release()
    await limiter.release(await refused.detach(ttl=60))
    assert (refused.allowed, refused.id) == (False, "")
    assert not (await limiter.acquire(api_key="a")).allowed


async def test_peek_charges_nothing() -> None:
    """A look at the limits shows all of them, and costs nothing."""
    text = 'plans.default = {requests = ["9/minute"], concurrent = 2, spending = {daily = "1"}}'
    limiter = limiter_of(text, FakeClock())
    await limiter.acquire(api_key="a")
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
    looks = [await limiter.engine.peek(policy) for _ in range(20)]
    assert isinstance(looks[0], Decision)
    assert [counted(each) for each in looks[-1].limits] == [1, 1, 0]


async def test_reset_forgets_the_callers_own_counts() -> None:
    """After a reset the caller starts anew; what all callers share stays counted."""
    text = 'plans.default.requests = ["2/minute"]\napplication.requests = ["3/minute"]'
    limiter = limiter_of(text, FakeClock())
    assert [(await limiter.acquire(api_key="a")).allowed for _ in range(3)] == [True, True, False]
    await limiter.engine.reset(
        limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
    )
    decisions = [(await limiter.acquire(api_key="a")).decision for _ in range(2)]
    assert [decision.allowed for decision in decisions] == [True, False]
    assert decisions[1].refusal is not None
    assert decisions[1].refusal.reason == "capacity"


@pytest.mark.parametrize(
    ("text", "allowed", "by"),
    [
        ('backend.on_failure = "deny"', [False, False, False], "deny"),
        ('backend.on_failure = "allow"', [True, True, True], "allow"),
        ('backend.on_failure = "local"', [True, True, False], "local"),
        ("backend = {on_failure = 'local', local_share = 0.3}", [True, False, False], "local"),
        ('plans.default = {on_failure = "deny", requests = ["2/minute"]}', [False, False, False], "deny"),
    ],
)
async def test_backend_away(text: str, allowed: list[bool], by: str) -> None:
    """While the backend is away a decision follows `on_failure` and never raises; a look at it does."""
    if "plans" not in text:
        text += '\nplans.default.requests = ["2/minute"]'
    limiter = limiter_of(text, FakeClock(), Down())
    leases = [await limiter.acquire(api_key="a") for _ in range(3)]
    assert [lease.allowed for lease in leases] == allowed
    assert {lease.decision.policy for lease in leases} == {by}
    with pytest.raises(BackendError):
        await limiter.engine.peek(
            limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/")
        )


async def test_exempt_asks_nobody() -> None:
    """An exempt route's decision needs no backend."""
    backend = Counting()
    limiter = limiter_of('routes = [{path = "/", exempt = true}]', FakeClock(), backend)
    assert (await limiter.acquire(api_key="a")).allowed
    assert backend.asked == 0


async def test_limiter_is_a_context() -> None:
    """`async with` opens and closes the backend."""
    calls: list[str] = []

    class Noted(MemoryBackend):
        async def open(self) -> None:
            calls.append("open")

        async def close(self) -> None:
            calls.append("close")

    async with Limiter(backend=Noted()) as limiter:
        assert (await limiter.acquire(api_key="a")).allowed
    assert calls == ["open", "close"]


async def test_garbage_is_no_token() -> None:
    """Garbage in place of a token raises `LeaseError`, whichever verb it is handed to."""
    limiter = limiter_of("", FakeClock())
    for token in ("", "garbage", "rl1.a.b", "rl1.."):
        for verb in (limiter.release, limiter.renew):
            with pytest.raises(LeaseError):
                await verb(token)


@pytest.mark.parametrize("wrong", [None, 1, b"rl1.a.b", {}, ["rl1.a.b"], Decimal(1)], ids=repr)
async def test_what_is_neither_lease_nor_token_is_a_lease_error(wrong: Any) -> None:
    """Every verb says what it needs, whatever it is handed."""
    limiter = limiter_of(ONE_SLOT, FakeClock())
    expected = f"a lease token must be a string, not {type(wrong).__name__}"
    with pytest.raises(LeaseError, match=expected):
        await limiter.release(wrong)
    with pytest.raises(LeaseError, match=expected):
        await limiter.renew(wrong)
    with pytest.raises(LeaseError, match=expected):
        await limiter.settle(wrong, "1")
    with pytest.raises(LeaseError, match=expected):
        async with limiter.resume(wrong):
            pass
