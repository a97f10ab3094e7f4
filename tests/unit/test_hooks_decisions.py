"""`on_decision`: the app is told of every decision, and can neither delay nor break one by that."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest

from ratelimit_mw import Decision, Identity, Limiter, RateLimitMiddleware
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.limiter.observers import DecisionMade
from ratelimit_mw._internal.model.api_key_hash import hash_api_key
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.observe.events import BudgetWarning, Event
from tests.support.asgi import Down, FakeClock, client_of, limiter_of, ok_app, settings_of, statuses
from tests.support.statuses import counted

SETTINGS = """
operations = { usage_path = "/limits" }
plans.default = { requests = ["2/minute"] }
plans.trial = { requests = ["1/minute"], shadow = true }
keys = [{ key = "trial", plan = "trial" }]
routes = [
  { path = "/v1/{x}", cost = 2 },
  { path = "/huge", cost = 3 },
  { path = "/health", exempt = true },
]
"""


def limiter_with(on_decision: Callable[[DecisionMade], object]) -> Limiter:
    """A limiter with this hook."""
    return Limiter(settings_of(SETTINGS), on_decision=on_decision)


def reason(made: DecisionMade) -> str | None:
    """Return the reason of a refusal; None for an admission."""
    return None if made.decision.refusal is None else made.decision.refusal.reason


async def ended_turn() -> None:
    """Let what was put off to the end of the turn happen."""
    await asyncio.sleep(0)


async def test_every_decision_is_told_with_caller_and_rule() -> None:
    """Admitted, refused, never admitted, and let through by shadow mode; what is exempt is not a decision."""
    told: list[DecisionMade] = []
    limiter = limiter_with(told.append)
    for key, path in [
        ("a", "/v1/x"),
        ("a", "/v1/y"),
        ("a", "/huge"),
        ("a", "/health"),
        ("trial", "/"),
        ("trial", "/"),
    ]:
        await limiter.acquire(api_key=key, path=path)
    await ended_turn()
    assert [(made.identity.plan, made.route, made.decision.allowed, reason(made)) for made in told] == [
        ("default", "/v1/{x}", True, None),
        ("default", "/v1/{x}", False, "rate"),
        ("default", "/huge", False, "cost"),
        ("trial", None, True, None),
        ("trial", None, True, "rate"),
    ]
    assert told[0].identity.partition.startswith("k:")


async def test_keys_of_one_account_are_told_apart() -> None:
    """Callers who are counted together are told by the key that each of them has."""
    told: list[DecisionMade] = []
    text = """plans.team = {share = "account", requests = ["9/minute"]}
    keys = [{key = "a", plan = "team", account = "acme"}, {key = "b", plan = "team", account = "acme"}]"""
    limiter = Limiter(settings_of(text), on_decision=told.append)
    leases = [await limiter.acquire(api_key=key) for key in ("a", "b", "a")]
    await ended_turn()
    assert [made.identity.api_key_hash for made in told] == [
        hash_api_key(key, "") for key in (b"a", b"b", b"a")
    ]
    assert [counted(lease.decision.limits[0]) for lease in leases] == [1, 2, 3]


async def test_what_is_told_is_what_the_request_was_told() -> None:
    """The decision is the lease's own, and neither it nor what names its caller can be changed."""
    told: list[DecisionMade] = []
    limiter = limiter_with(told.append)
    lease = await limiter.acquire(api_key="a")
    await ended_turn()
    (made,) = told
    assert made.decision == lease.decision
    for target, name in [(made, "decision"), (made.decision, "allowed"), (made.identity, "plan")]:
        with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
            setattr(target, name, None)


async def test_refusals_that_are_remembered_are_told_too() -> None:
    """Also where this process refuses by itself, nothing goes unsynced."""
    told: list[DecisionMade] = []
    limiter = limiter_with(told.append)
    limiter.engine.decider.remembers = True  # as with any backend but memory
    for _ in range(6):
        await limiter.acquire(api_key="a")
    await ended_turn()
    assert [made.decision.allowed for made in told] == [True, True, *[False] * 4]


async def test_decisions_without_the_backend_are_told() -> None:
    """A decision without the backend tells who decided."""
    told: list[DecisionMade] = []
    clock = FakeClock()
    limiter = limiter_of(SETTINGS, clock, Down(clock=clock))
    app = RateLimitMiddleware(ok_app(), limiter=limiter, on_decision=told.append)
    async with client_of(app, x_api_key="a") as client:
        await statuses(client, 3)
    await ended_turn()
    assert [made.decision.policy for made in told] == ["local"] * 3
    await limiter.close()


async def test_the_hook_is_called_after_the_decision() -> None:
    """A caller that waits for the decision has it first: the hook's turn is later."""
    told: list[DecisionMade] = []
    limiter = limiter_with(told.append)
    await limiter.engine.live.get_ready()
    await limiter.acquire(api_key="a")
    assert told == []
    await ended_turn()
    assert len(told) == 1


async def test_a_hook_that_fails_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged, once a minute and without the key, and requests are served as ever."""

    def fail(made: DecisionMade) -> None:
        raise RuntimeError("no disk")

    app = RateLimitMiddleware(ok_app(), settings=settings_of(SETTINGS), on_decision=fail)
    async with client_of(app, x_api_key="secret-key") as client:
        assert await statuses(client, 4) == [200, 200, 429, 429]
    await ended_turn()
    (record,) = [each for each in caplog.records if "on_decision" in each.message]
    assert record.exc_info is not None
    assert "secret-key" not in caplog.text


async def test_hooks_of_the_middleware_and_of_its_limiter_are_both_called() -> None:
    """A limiter that is handed to a middleware keeps its own hook."""
    told: list[str] = []
    limiter = limiter_with(lambda _: told.append("limiter"))
    app = RateLimitMiddleware(ok_app(), limiter=limiter, on_decision=lambda _: told.append("middleware"))
    async with client_of(app, x_api_key="a") as client:
        await client.get("/")
    await ended_turn()
    assert sorted(told) == ["limiter", "middleware"]


async def test_reading_the_usage_is_told_under_its_path() -> None:
    """Whether the usage may be read is a decision like any other."""
    told: list[DecisionMade] = []
    app = RateLimitMiddleware(ok_app(), settings=settings_of(SETTINGS), on_decision=told.append)
    async with client_of(app, x_api_key="a") as client:
        await client.get("/limits")
    await ended_turn()
    assert [made.route for made in told] == ["/limits"]


async def test_an_observer_sees_decisions_in_the_requests_own_turn() -> None:
    """An observer is shown decisions at once, in the request's own context, such as its span."""
    seen: list[Decision] = []

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    def see(lease: Lease) -> None:
        seen.append(lease.decision)

    limiter = Limiter(settings_of(SETTINGS))
    limiter.engine.observe(fail)
    limiter.engine.observe(see)
    logging.getLogger("ratelimit_mw").setLevel(logging.CRITICAL)
    try:
        lease = await limiter.acquire(api_key="a")
    finally:
        logging.getLogger("ratelimit_mw").setLevel(logging.NOTSET)
    assert seen == [lease.decision]


class Later:
    """An outcome that comes a little later."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __await__(self) -> Generator[Any, None, Outcome]:
        yield from asyncio.sleep(0.01).__await__()
        return self.outcome

    def give_up(self) -> None:
        """Nobody is cancelled here."""


class Slow(MemoryBackend):
    """A backend that answers a little later, as one behind a network does."""

    def ask(self, charge: Charge, lease_id: bytes, price: int = 0) -> Any:
        """Answer after others had a turn."""
        return Later(super().ask(charge, lease_id, price))

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Answer after others had a turn."""
        return await Later(super().ask(charge, lease_id, price))

    async def peek(self, charge: Charge, price: int = 0) -> Outcome:
        """Answer after others had a turn."""
        await asyncio.sleep(0.01)
        return await super().peek(charge, price)


@pytest.mark.parametrize(
    "text",
    [
        'identity.unknown_keys = "anonymous"',
        'identity.unknown_keys = "anonymous"\nplans.anonymous.requests = ["2/minute"]',
        """plans.team = {share = "account", requests = ["1/minute"]}
        keys = [{key = "a", plan = "team", account = "acme"}, {key = "b", plan = "team", account = "acme"},
          {key = "c", plan = "team", account = "acme"}]""",
    ],
)
@pytest.mark.parametrize("is_by_hook", [False, True])
@pytest.mark.parametrize("cost", [1, 999])
async def test_requests_at_once_are_told_with_the_key_of_each(
    text: str, cost: int, *, is_by_hook: bool
) -> None:
    """Callers who share limits, decided about at the same time, are never told under another's key."""
    told: list[DecisionMade] = []
    limiter = Limiter(settings_of(text), backend=Slow(), on_decision=told.append)

    async def ask(key: str) -> None:
        who: dict[str, Any] = {"api_key": key, "address": "192.0.2.1"}
        if is_by_hook:
            plan = "team" if "team" in text else "anonymous"
            who = {"identity": Identity("i:one", plan, hash_api_key(key.encode(), ""))}
        await limiter.acquire(**who, cost=cost)

    await asyncio.gather(*[ask(key) for key in ("a", "b", "c")])
    await ended_turn()
    assert sorted(made.identity.api_key_hash or "" for made in told) == sorted(
        hash_api_key(key, "") for key in (b"a", b"b", b"c")
    )


async def test_requests_at_once_over_http_are_told_with_the_key_of_each() -> None:
    """Requests at once through the middleware are told with the key of each."""
    told: list[DecisionMade] = []
    settings = settings_of('identity.unknown_keys = "anonymous"\nplans.anonymous.requests = ["2/minute"]')
    limiter = Limiter(settings, backend=Slow(), on_decision=told.append)
    app = RateLimitMiddleware(ok_app(), limiter=limiter)

    async def ask(key: str) -> int:
        async with client_of(app, x_api_key=key) as client:
            return (await client.get("/")).status_code

    assert sorted(await asyncio.gather(*[ask(key) for key in ("a", "b", "c")])) == [200, 200, 429]
    await ended_turn()
    assert {made.identity.api_key_hash for made in told} == {hash_api_key(k, "") for k in (b"a", b"b", b"c")}


async def test_a_budget_near_its_end_is_told_with_the_key_of_the_request() -> None:
    """A warning names the caller whose request it came with."""
    told: list[Event] = []
    text = """identity.unknown_keys = "anonymous"
    plans.anonymous.spending = {daily = "1.00", warn_at = 0.5}"""
    limiter = Limiter(settings_of(text), backend=Slow(), on_event=told.append)

    async def ask(key: str, price: str) -> None:
        await limiter.acquire(api_key=key, address="192.0.2.1", price=price)

    await asyncio.gather(ask("a", "0.60"), ask("b", "0.01"), ask("c", "0.01"))
    async with asyncio.timeout(10):
        while not told:
            await asyncio.sleep(0.01)
    (warning,) = told
    assert isinstance(warning, BudgetWarning)
    assert warning.identity.api_key_hash == hash_api_key(b"a", "")


async def test_events_reach_the_hooks_of_the_middleware_and_of_its_limiter() -> None:
    """A limiter that is handed to a middleware keeps its own hook, and the middleware's is called as well."""
    told: list[str] = []
    text = 'plans.default.spending = {daily = "1.00", warn_at = 0.5}'
    limiter = Limiter(settings_of(text), on_event=lambda _: told.append("limiter"))
    RateLimitMiddleware(ok_app(), limiter=limiter, on_event=lambda _: told.append("middleware"))
    await limiter.acquire(api_key="a", price="0.60")
    async with asyncio.timeout(10):
        while len(told) < 2:
            await asyncio.sleep(0.01)
    assert sorted(told) == ["limiter", "middleware"]


class AsyncCallable:
    """An object that is called like an async function."""

    async def __call__(self, *_: object) -> None:
        """Wait for nothing."""


async def late(*_: object) -> None:
    """A hook that would have to be awaited."""


@pytest.mark.parametrize("hook", [late, AsyncCallable(), partial(late, 1), AsyncCallable().__call__])
@pytest.mark.parametrize("name", ["on_event", "on_decision"])
def test_a_hook_that_would_have_to_be_awaited_is_an_error(hook: Any, name: str) -> None:
    """Nobody awaits what only listens: an async one says so when it is handed in, not by never running."""
    for make in (
        lambda: Limiter(**{name: hook}),
        lambda: Limiter.from_settings(settings_of(""), **{name: hook}),
        lambda: RateLimitMiddleware(ok_app(), settings=settings_of(""), **{name: hook}),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a plain function.*create_task"):
            make()


@pytest.mark.parametrize(
    "name", ["identify", "price", "estimate", "refusal", "resolve", "on_event", "on_decision"]
)
@pytest.mark.parametrize("hook", [3, "a name", ()])
def test_a_hook_that_is_no_function_is_an_error(hook: Any, name: str) -> None:
    """A hook that can't be called says so when it is handed in, not by a log line for each request."""
    hooks = {name: hook}
    makes: list[Callable[[], object]] = [
        lambda: RateLimitMiddleware(ok_app(), settings=settings_of(""), **hooks)
    ]
    if name in {"resolve", "on_event", "on_decision"}:
        makes.append(lambda: Limiter(settings_of(""), **hooks))
    for make in makes:
        with pytest.raises(TypeError, match=f"{name} must be a function, not "):
            make()


def test_an_observer_that_would_have_to_be_awaited_is_an_error() -> None:
    """An observer that would have to be awaited is an error."""
    with pytest.raises(TypeError, match="observer must be a plain function"):
        Limiter(settings_of("")).engine.observe(late)


@pytest.mark.parametrize("name", ["on_event", "on_decision"])
async def test_a_hook_that_returns_what_would_have_to_be_awaited_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that only looks like a plain function is found out at its first call, and breaks no request."""
    text = 'plans.default.spending = {daily = "1.00", warn_at = 0.5}'
    hooks: dict[str, Any] = {name: lambda made: late(made, 1)}
    limiter = Limiter(settings_of(text), **hooks)
    assert (await limiter.acquire(api_key="a", price="0.60")).allowed
    async with asyncio.timeout(10):
        while f"{name} failed" not in caplog.text:
            await asyncio.sleep(0.01)
    assert "must be a plain function" in caplog.text
