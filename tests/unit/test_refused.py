"""Refusals that are answered without asking the backend again."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ratelimit_mw import Limiter, RateLimitMiddleware, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.cache.refusals import LONGEST, MOST, RefusalCache
from ratelimit_mw._internal.limiter.inspect_caller import forget
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import SECOND, Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.status import WindowStatus
from ratelimit_mw._internal.policy.decision import Decision, decision_of
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policies
from ratelimit_mw._internal.responses.refusals import RefusalWriter
from ratelimit_mw._internal.runtime.leaf import Numbers
from tests.conftest import StartServer
from tests.support.asgi import ok_app, settings_of, start_of
from tests.support.servers import StoreServer
from tests.support.slots import until_async
from tests.support.statuses import Answer, answer_of

START = 1_800_000_000 * SECOND
NO_LEASE = bytes(16)
KIND = ("rate", "1/minute")


@dataclass
class Clock:
    """One time for a backend, in microseconds, and for the table, in seconds since it started."""

    now: int = START

    def micros(self) -> int:
        """The backend's time."""
        return self.now

    def seconds(self) -> float:
        """The table's time."""
        return (self.now - START) / SECOND

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += round(seconds * SECOND)


@dataclass
class Bench:
    """A backend, a table in front of it, and a clock for both."""

    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.backend = MemoryBackend(clock=self.clock.micros)
        self.table = RefusalCache(self.clock.seconds)
        self.asked = 0

    def known(self, charge: Charge) -> Answer | None:
        """Return the refusal that the table knows; None without one."""
        refused = self.table.find(charge)
        return None if refused is None else answer_of(charge, refused.outcome_at(self.table.now()))

    def acquire(self, charge: Charge, lease_id: bytes = NO_LEASE) -> Answer:
        """Decide as the limiter does: by the table, else by the backend."""
        known = self.known(charge)
        if known is not None:
            return known
        self.asked += 1
        sent = self.table.now()
        outcome = self.backend.decide(charge, lease_id, 0)
        if outcome.admitted:
            self.table.admitted(charge, outcome)
        self.table.add(charge, outcome, sent, KIND)
        return answer_of(charge, outcome)


def charge(*limits: Limit, cost: int = 1) -> Charge:
    """A charge of one caller."""
    return Charge([Counter("caller", "p", limit) for limit in limits], cost)


def _settings(url: str, rate: str) -> Settings:
    return Settings.model_validate(
        {
            "backend": {"url": url, "timeout": 5},
            "identity": {"hash_secret": "a secret of some length, for tests alone"},
            "plans": {"default": {"requests": [rate]}},
        }
    )


def test_a_refused_charge_is_not_asked_about_again() -> None:
    """Once a window has refused, the backend is spared until the refusal is forgotten."""
    bench, one = Bench(), charge(Window(2, 1, "minute"))
    outcomes = [bench.acquire(one).admitted for _ in range(100)]
    assert outcomes == [True, True, *[False] * 98]
    assert bench.asked == 3


def test_a_refusal_is_remembered_for_a_second_at_most() -> None:
    """A reset, a raised limit or a give-back is seen after a second, whatever the refusal promised."""
    bench, one = Bench(), charge(Window(1, 1, "hour"))
    bench.acquire(one)
    bench.acquire(one)
    bench.backend = MemoryBackend(clock=bench.clock.micros)
    bench.clock.wait(LONGEST - 0.000_001)
    assert not bench.acquire(one).admitted
    bench.clock.wait(0.000_001)
    assert bench.acquire(one).admitted


def test_a_promise_is_kept_to_the_microsecond() -> None:
    """At the promised moment the charge is admitted, and a microsecond earlier it is refused by the table."""
    bench, one = Bench(), charge(Window(1, 1, "second"))
    bench.acquire(one)
    bench.clock.wait(0.25)
    wait = bench.acquire(one).window(0).retry_after_us
    assert wait == 750_000
    bench.clock.wait(0.749_999)
    assert not bench.acquire(one).admitted
    assert bench.asked == 2
    bench.clock.wait(0.000_001)
    assert bench.acquire(one).admitted


def test_no_promise_from_the_table_comes_too_early() -> None:
    """However long the answer was on its way, whoever waits as told is admitted."""
    bench, one = Bench(), charge(Window(1, 1, "second"))
    bench.acquire(one)
    refused = bench.backend.decide(one, NO_LEASE, 0)
    sent = bench.table.now()
    bench.clock.wait(0.05)
    bench.table.add(one, refused, sent, KIND)
    bench.clock.wait(0.2)
    known = bench.known(one)
    assert known is not None
    bench.clock.now += known.window(0).retry_after_us
    assert bench.acquire(one).admitted


@pytest.mark.parametrize("pause", [0.05, 0.1, 5])
def test_a_pause_after_a_refusal_was_found_lets_it_stand(pause: float) -> None:
    """It is told as of the last moment at which it held, at the latest: some wait is always left."""
    bench, one = Bench(), charge(Window(1, 1, "second"), Window(1, 1, "hour"))
    bench.acquire(one)
    bench.clock.wait(0.9)
    bench.acquire(one)
    found = bench.table.find(one)
    assert found is not None
    bench.clock.wait(pause)
    told = found.outcome_at(bench.table.now())
    left = max(SECOND - bench.clock.now + START, 1)
    assert told.now == START + SECOND - left
    assert one.statuses(told) == [
        WindowStatus(1, left, left),
        WindowStatus(1, left + 3_599 * SECOND, left + 3_599 * SECOND),
    ]


async def test_a_process_that_was_paused_while_it_refused_answers(server: StoreServer) -> None:
    """Time may pass, in a worker that is stopped or has to wait for the processor, between any two steps."""
    async with Limiter(_settings(server.url, "1/second")) as limiter:
        policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="k"), "GET", "/")
        while (await limiter.engine.charge(policy)).allowed:
            pass
        times = itertools.chain(
            [limiter.engine.refusals.now()], itertools.repeat(limiter.engine.refusals.now() + 2)
        )
        limiter.engine.refusals.now = lambda: next(times)
        asked = limiter.engine.backend.load.operations
        lease = await limiter.engine.charge(policy)
        assert not lease.allowed
        assert limiter.engine.backend.load.operations == asked
        assert lease.decision.refusal is not None
        assert lease.decision.refusal.retry_after_us == 1


def test_figures_are_those_of_the_moment() -> None:
    """Figures from the table are those that the backend would tell then: times go down, units stay."""
    bench, one = Bench(), charge(Window(2, 1, "minute"), Window(100, 1, "hour"))
    for _ in range(3):
        bench.acquire(one)
    for _ in range(5):
        bench.clock.wait(0.1)
        known = bench.known(one)
        assert known == bench.backend.decide(one, None, 0)


def test_a_refusal_is_forgotten_when_a_unit_leaves_any_of_its_windows() -> None:
    """The figures of a window that does not refuse are never stale either."""
    bench = Bench()
    bench.acquire(charge(Window(9, 1, "second")))
    bench.clock.wait(0.8)
    one = charge(Window(9, 1, "second"), Window(1, 1, "hour"))
    bench.acquire(one)
    assert not bench.acquire(one).admitted
    bench.clock.wait(0.2)
    assert bench.table.find(one) is None


def test_another_cost_is_asked_about() -> None:
    """A smaller cost may still fit, and a larger one has a later promise."""
    bench, window = Bench(), Window(5, 1, "minute")
    bench.acquire(charge(window, cost=4))
    assert not bench.acquire(charge(window, cost=2)).admitted
    assert bench.table.find(charge(window, cost=2)) is None
    assert bench.acquire(charge(window, cost=1)).admitted


@pytest.mark.parametrize("other", [Slots(1), Allowance(1, "daily")])
def test_only_refusals_by_windows_alone_are_remembered(other: Limit) -> None:
    """A slot may be free, and a price smaller, at any moment."""
    bench, one = Bench(), charge(Window(1, 1, "minute"), other)
    bench.backend.decide(one, b"a" * 16, 1)
    assert not bench.acquire(one, b"b" * 16).admitted
    assert len(bench.table) == 0


def test_a_window_with_a_free_slot_beside_it_is_remembered() -> None:
    """A limit that does not refuse does not stand in the way."""
    bench, one = Bench(), charge(Window(1, 1, "minute"), Slots(5))
    bench.acquire(one, b"a" * 16)
    bench.acquire(one, b"b" * 16)
    assert len(bench.table) == 1


def test_an_admission_makes_all_refusals_of_its_caller_untrue() -> None:
    """Units that are used since are in the figures of every cost that was refused, asked once or twice."""
    bench, window = Bench(), Window(5, 1, "minute")
    bench.acquire(charge(window, cost=3))
    refused = [charge(window, cost=cost) for cost in (3, 4, 5)]
    assert not any(bench.acquire(each).admitted for each in refused)
    bench.table.add(refused[0], bench.backend.decide(refused[0], NO_LEASE, 0), bench.table.now(), KIND)
    assert len(bench.table) == 3
    assert bench.acquire(charge(window, cost=1)).admitted
    assert [bench.table.find(each) for each in refused] == [None] * 3


def test_a_refusal_that_names_no_limit_is_not_remembered() -> None:
    """A refusal that says nothing of when it ends is not remembered: the backend is asked again."""
    bench, one = Bench(), charge(Window(1, 1, "minute"))
    unfounded = Outcome(False, START, Numbers((0, 0, 0)), bench.backend.decide(one, None, 0).reservation)
    bench.table.add(one, unfounded, bench.table.now(), KIND)
    assert bench.known(one) is None


def _clear(bench: Bench, refused: Charge) -> None:
    bench.table.clear()


def _fork(bench: Bench, refused: Charge) -> None:
    bench.table.after_fork()


def _outlive(bench: Bench, refused: Charge) -> None:
    bench.clock.wait(LONGEST)
    bench.table.find(refused)


def _admit(bench: Bench, refused: Charge) -> None:
    bench.acquire(Charge(refused.counters, 1))


@pytest.mark.parametrize("forget", [_clear, _fork, _outlive, _admit])
def test_nothing_is_kept_of_what_is_forgotten(forget: Callable[[Bench, Charge], None]) -> None:
    """A process that forked, a reset, the time and an admission leave no trace of a refusal in the table."""
    bench = Bench()
    one = Charge(
        [Counter("caller", "p", Window(5, 1, "hour")), Counter("app", "app", Window(9, 1, "hour"))], 3
    )
    assert bench.acquire(one).admitted
    assert not bench.acquire(one).admitted
    forget(bench, one)
    table = bench.table
    assert (table.by_charge, table._by_caller, table._by_shared) == ({}, {}, {})


def test_the_table_is_bounded() -> None:
    """However many callers are refused, so many are remembered, the latest."""
    bench = Bench()
    outcome = bench.backend.decide(charge(Window(1, 1, "minute"), cost=1), NO_LEASE, 0)
    refused = Outcome(False, outcome.now, Numbers((1, 60 * SECOND, 60 * SECOND)), outcome.reservation)
    charges = [charge(Window(1, 1, "minute")) for _ in range(MOST + 10)]
    for each in charges:
        bench.table.add(each, refused, 0.0, KIND)
    assert len(bench.table) == MOST
    assert bench.table.find(charges[-1]) is not None
    assert bench.table.find(charges[9]) is None


@given(
    quotas=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    cost=st.integers(1, 2),
    waits=st.lists(st.integers(0, 1_200_000), max_size=40),
)
def test_whoever_asks_the_table_gets_the_backends_own_answer(
    quotas: list[int], cost: int, waits: list[int]
) -> None:
    """While nobody resets or gives back, the table changes no answer, only who gives it."""
    one = charge(
        *[Window(quota, length, "second") for length, quota in enumerate(quotas, start=1)], cost=cost
    )
    bench = Bench()
    for wait in waits:
        bench.clock.now += wait
        expected = bench.backend.decide(one, None, 0)
        outcome = bench.acquire(one)
        assert outcome.admitted == expected.admitted
        assert outcome.admitted or outcome == expected


async def test_a_reset_by_this_process_is_seen_at_once(redis_server: StoreServer) -> None:
    """A reset in this process is in force at once, also within the second in which the server isn't asked."""
    async with Limiter(_settings(redis_server.url, "1/hour")) as limiter:
        assert (await limiter.acquire(api_key="k")).allowed
        assert not (await limiter.acquire(api_key="k")).allowed
        asked = limiter.engine.backend.load.operations
        assert not (await limiter.acquire(api_key="k")).allowed
        assert limiter.engine.backend.load.operations == asked
        identity = limiter.engine.identity_of(api_key="k")
        await limiter.engine.reset(limiter.engine.policies.match(identity, "GET", "/"))
        assert (await limiter.acquire(api_key="k")).allowed
        assert not (await limiter.acquire(api_key="k")).allowed
        await forget(limiter, identity)
        assert (await limiter.acquire(api_key="k")).allowed


@given(
    response=st.sampled_from(
        ["", 'body = "problem"', 'reset = "seconds"', 'headers = ["x-ratelimit", "ietf"]']
    ),
    first=st.integers(0, 999_999),
    ages=st.lists(st.integers(0, 999_999), min_size=1, max_size=8),
    windows=st.sampled_from([["1/second"], ["2/minute"], ["2/3 seconds", "2/hour"]]),
)
def test_an_answer_that_is_given_again_says_what_a_new_one_would(
    response: str, first: int, ages: list[int], windows: list[str]
) -> None:
    """However old a refusal is, the answer kept of it is the one that would be written then, or none."""
    rates = ", ".join(f'"{window}"' for window in windows)
    settings = settings_of(f"[response]\n{response}\n[plans.default]\nrequests = [{rates}]")
    policy = Policies(settings).match(Identity("k:1", "default"), "GET", "/")
    writer = RefusalWriter(settings.response)
    bench = Bench()
    while bench.acquire(policy.charge).admitted:
        bench.clock.wait(0.2)

    def decided() -> Decision:
        return decision_of(policy, policy.charge, bench.acquire(policy.charge), 0, None)

    start = bench.clock.now
    bench.clock.now = start + first
    refused = bench.table.find(policy.charge)
    assume(refused is not None and not decided().allowed)
    assert refused is not None
    writer.remember(refused, writer(decided()), decided())
    is_kept = writer.again(refused, refused.age(bench.table.now())) is not None
    assert is_kept == (response in {"", 'body = "problem"'}), "what tells of durations is written anew"
    for age in ages:
        bench.clock.now = start + first + age
        if bench.table.find(policy.charge) is refused:
            again = writer.again(refused, refused.age(bench.table.now()))
            assert again is None or again == writer(decided())


def test_what_is_added_to_one_answer_is_not_given_again() -> None:
    """Middleware outside of ours may add headers to the list that it is sent; the next answer has none."""
    settings = settings_of('plans.default.requests = ["1/minute"]')
    policy = Policies(settings).match(Identity("k:1", "default"), "GET", "/")
    writer = RefusalWriter(settings.response)
    bench = Bench()
    bench.acquire(policy.charge)
    decision = decision_of(policy, policy.charge, bench.acquire(policy.charge), 0, None)
    refused = bench.table.find(policy.charge)
    assert refused is not None
    first = writer(decision)
    writer.remember(refused, first, decision)
    second = writer.again(refused, 0)
    assert second is not None
    for sent in (first, second):
        sent.headers.append((b"x-request-id", b"another's"))
        third = writer.again(refused, 0)
        assert third is not None
        assert b"x-request-id" not in dict(third.headers)


@pytest.mark.parametrize("by_http", [False, True])
async def test_a_refusal_met_again_knows_what_was_admitted_meanwhile(
    redis_server: StoreServer, by_http: bool
) -> None:
    """Units that the caller's other requests have used since are in a refusal's figures and wait, at once."""
    text = """
        plans.default.requests = ["10/hour"]
        routes = [{ path = "/big", cost = 8 }]
    """
    backend = f'identity.hash_secret = "s"\nbackend = {{ url = "{redis_server.url}", timeout = 5.0 }}'
    app = RateLimitMiddleware(ok_app(), settings_of(backend + text))

    async def remaining(path: str) -> tuple[int, int]:
        if by_http:
            start = await start_of(app, b"one", path)
            return start["status"], int(dict(start["headers"])[b"x-ratelimit-remaining"])
        decision = (await app.limiter.acquire(api_key="one", path=path)).decision
        nearest = decision.nearest()
        assert nearest is not None
        return 200 if decision.allowed else 429, nearest[0].quota - nearest[1].used

    async with app.limiter:
        assert [await remaining("/") for _ in range(4)] == [(200, left) for left in (9, 8, 7, 6)]
        assert [await remaining("/big") for _ in range(3)] == [(429, 6)] * 3
        assert await remaining("/") == (200, 5)
        assert [await remaining("/big") for _ in range(3)] == [(429, 5)] * 3
        assert len(app.limiter.engine.refusals) == 1
        assert app.limiter.engine.decision_counts.totals() == {
            ("default", "", "admitted", ""): 5,
            ("default", "/big", "rate", "10/hour"): 6,
        }, "what is repeated is counted as well"


@pytest.mark.parametrize(("on_failure", "status"), [("allow", 200), ("deny", 503)])
async def test_once_the_backend_is_away_no_refusal_of_it_is_repeated(
    start_server: StartServer, on_failure: str, status: int
) -> None:
    """A caller that was just refused is answered as the settings say of an outage, like everybody else."""
    server = start_server("redis")
    text = f"""
        backend = {{ url = "{server.url}", timeout = 0.5, on_failure = "{on_failure}" }}
        identity.hash_secret = "s"
        plans.default.requests = ["2/hour"]
    """
    app = RateLimitMiddleware(ok_app(), settings_of(text))
    async with app.limiter:
        met = [(await start_of(app, b"one"))["status"] for _ in range(5)]
        assert met == [200, 200, 429, 429, 429]
        server.kill()
        await until_async(lambda: app.limiter.engine.backend.is_away)
        assert (await start_of(app, b"one"))["status"] == status
        assert (await app.limiter.acquire(api_key="one")).decision.policy == on_failure


@pytest.mark.parametrize("cost", [1, 3])
def test_a_shared_limit_that_fills_meanwhile_is_known(cost: int) -> None:
    """A shared limit that others fill through this process makes a wait longer, which is told at once."""
    bench = Bench()
    shared = Counter("app", "app", Window(10, 1, "hour"), "everyone")
    one = Charge([Counter("caller", "p", Window(3, 1, "minute")), shared], cost)
    other = Charge([Counter("other", "p", Window(99, 1, "minute")), shared])
    while bench.acquire(one).admitted:
        pass
    assert bench.acquire(one).window(1).retry_after_us == 0
    while bench.acquire(other).used(1) < 10 - cost:
        assert bench.known(one) is not None
    bench.acquire(other)
    assert bench.known(one) is None
    assert bench.acquire(one).window(1).retry_after_us > 60 * SECOND
    assert bench.known(one) is not None
    bench.table.clear()
    assert bench.known(one) is None


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_of_forgotten_refusals(seed: int) -> None:
    """Neither by caller nor by shared limit, however they were forgotten."""
    chance, bench = random.Random(seed), Bench()
    shared = [Counter(f"all {n}", "t", Window(30, 1, "second"), "everyone") for n in range(3)]
    charges = [
        Charge([Counter(f"caller {n}", "p", Window(2, 1, "second")), *chance.sample(shared, 2)], 1 + n % 3)
        for n in range(30)
    ]
    for _ in range(2_000):
        bench.acquire(chance.choice(charges))
        bench.clock.wait(chance.choice([0, 0.001, 0.1]))
        table = bench.table
        assert {each for found in table._by_caller.values() for each in found} == set(table.by_charge)
        by_shared = [
            each for costs in table._by_shared.values() for found in costs.values() for each in found
        ]
        assert sorted(map(id, by_shared)) == sorted(2 * list(map(id, table.by_charge)))
    bench.clock.wait(2)
    for each in charges:
        bench.table.find(each)
    assert [len(bench.table.by_charge), len(bench.table._by_caller), len(bench.table._by_shared)] == [0, 0, 0]


async def test_a_repeated_refusal_tells_of_a_shared_limit_that_is_full(redis_server: StoreServer) -> None:
    """Over HTTP: the wait that a refused caller is told includes what another caller filled just now."""
    settings = settings_of(
        f"""
        backend = {{url = "{redis_server.url}", timeout = 5.0}}
        plans.default = {{requests = ["5/minute"]}}
        application.requests = ["20/hour"]
        """
    )
    async with Limiter(settings) as limiter:
        app = RateLimitMiddleware(ok_app(), limiter=limiter)

        async def ask(key: str) -> int:
            start = await start_of(app, key.encode())
            return int(dict(start["headers"]).get(b"retry-after", 0))

        waits = [await ask("a") for _ in range(8)]
        assert waits[:5] == [0] * 5
        assert all(0 < wait <= 60 for wait in waits[5:])
        assert [await ask(f"b {n % 5}") for n in range(15)] == [0] * 15
        assert await ask("a") > 3_000


async def test_a_refusal_is_not_repeated_in_an_outage(start_server: StartServer) -> None:
    """Once the backend is known to be away the settings decide, also about who was refused a moment ago."""
    server = start_server("redis")
    settings = _settings(server.url, "1/hour")
    settings = settings.model_copy(
        update={"backend": settings.backend.model_copy(update={"on_failure": "allow"})}
    )
    async with Limiter(settings) as limiter:
        now = limiter.engine.refusals.now()
        limiter.engine.refusals.now = lambda: now  # so that it is remembered however slow the machine is
        assert [(await limiter.acquire(api_key="k")).allowed for _ in range(3)] == [True, False, False]
        server.kill()
        await until_async(lambda: limiter.engine.backend.is_away)
        assert (await limiter.acquire(api_key="k")).decision.policy == "allow"
