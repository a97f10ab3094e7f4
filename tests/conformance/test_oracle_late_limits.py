"""Requests with early, late and failure limits against the brute-force oracle, on every backend."""

import os
import random
from collections import Counter as Tally
from collections.abc import Sequence

import pytest

from ratelimit_mw import Lease, Limit, Limiter, RateLimited
from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import CODE_SCOPE, Charge, Counter
from ratelimit_mw._internal.model.limits import ANSWERS, SECOND
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import NO_RESERVATION
from ratelimit_mw._internal.policy.code_limits import KeyedLimit
from tests.support.asgi import settings_of
from tests.support.conformance import Bench, new_id
from tests.support.oracle import CounterKey, Oracle

SETTINGS = """
    backend.timeout = 10
    [plans.default]
    requests = ["12/minute"]
    concurrent = 4
    units = { tokens = ["300/minute"] }
    spending = { daily = "0.000060" }
    [application]
    requests = ["40/minute"]
"""
EARLY = Limit("early", "15/minute", cost=2)
FAILED = Limit("failed-late", "4/minute", count="failures")
LATE = Limit("late", "14/minute", cost=3)
LATE_FAILED = Limit("late-failed", "3/minute", "8/7 minutes", count="failures")
SUCCEEDED = Limit("succeeded", "6/minute", count=lambda status: status < 300, cost=2)
MODEL = Limit("model", "200/minute", unit="tokens", cost=60, concurrent=2)
STATUSES = (200, 200, 204, 302, 401, 500)
FAR = 20 * SECOND
"""The longest time between two renewals of what runs, in microseconds."""


class Request:
    """One request that runs, and the charges of the oracle that belong to it."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.charges: list[tuple[bytes, list[CounterKey]]] = []

    def note(self, lease: Lease) -> bytes:
        """Note one more charge; the id under which the oracle has it."""
        lease_id = lease.reservation.id or new_id()
        self.charges.append((lease_id, [held[:2] for held in lease.reservation.slots]))
        return lease_id


class Comparison:
    """Does the same with a limiter and with the oracle."""

    def __init__(self, bench: Bench, example: int) -> None:
        self.bench = bench
        self.chance = random.Random(example)
        self.name = f"late {example} "
        self.limiter = Limiter(settings_of(SETTINGS), backend=bench.backend)
        self.limiter.engine.decider.remembers = False  # by the clock on the wall, which is not the test's
        self.oracle = Oracle(bench.clock.now)
        self.requests: list[Request] = []
        self.counters: dict[Counter, None] = {}
        self.seen = Tally[str]()

    def keyed(self, limits: Sequence[Limit]) -> list[KeyedLimit]:
        """Return some of these limits, each with one of a few keys of this example."""
        return [
            limit.on(self.name + self.chance.choice("xy")) for limit in limits if self.chance.random() < 0.5
        ]

    async def begin(self) -> None:
        """A request comes, with early limits, an estimate and a price perhaps."""
        lease = await self.limiter.acquire(
            *self.keyed([EARLY, FAILED]),
            api_key=self.name + self.chance.choice("ab"),
            units={"tokens": self.chance.choice([0, 5, 90])} if self.chance.random() < 0.5 else None,
            price=self.chance.choice([None, "0.000007", "0"]),
        )
        request = Request(lease)
        price = lease.price if lease.initial_charge.allowances else 0
        self.check(lease, request.note(lease), lease.initial_charge, price)
        self.seen["admitted" if lease.allowed else "refused"] += 1
        if lease.allowed:
            self.requests.append(request)

    def check(self, lease: Lease, lease_id: bytes, charge: Charge, price: int = 0) -> None:
        """Compare one answer."""
        decision = lease.decision
        got = lease.outcome or Outcome.from_statuses(
            False, decision.now_us, [each.status for each in decision.limits], NO_RESERVATION
        )
        self.oracle.check(list(charge.counters), charge.cost, price, lease_id, got, charge.units)
        self.counters |= dict.fromkeys(charge.counters)

    async def charge(self, request: Request) -> None:
        """The handler of a request charges more; a refusal takes everything back."""
        limits = self.keyed([LATE, LATE_FAILED, SUCCEEDED, MODEL])
        lease, before = request.lease, len(request.lease.late)
        try:
            await lease.charge(*limits)
        except RateLimited as refused:
            late = refused.decision.limits[len(lease.initial_charge.counters) :]
            costs = {f"{CODE_SCOPE}{each.limit.name}": int(str(each.limit.cost)) for each in limits}
            statuses = [each.status for each in late]
            got = Outcome.from_statuses(False, refused.decision.now_us, statuses, NO_RESERVATION)
            self.oracle.check([each.counter for each in late], 1, 0, new_id(), got, costs)
            for lease_id, keys in request.charges:
                self.oracle.give_back(keys, lease_id)
            self.requests.remove(request)
            self.seen["taken back"] += 1
        else:
            for each in lease.late[before:]:
                self.check(each, request.note(each), each.initial_charge)
                self.seen["charged"] += 1

    async def settle(self, request: Request) -> None:
        """The handler says how many tokens were used, perhaps not for the first time."""
        used = self.chance.choice([0, 5, 60, 150])
        await request.lease.settle(units={"tokens": used})
        for lease_id, _ in request.charges:
            if "tokens" in self.oracle.estimates.get(lease_id, {}):
                self.oracle.settle_units(lease_id, {"tokens": used}, replace=False)

    def end(self, request: Request) -> None:
        """The request is answered."""
        status = self.chance.choice(STATUSES)
        self.seen["ended"] += 1
        failed = status >= 400
        self.limiter.engine.leases.end(request.lease, failed, status)
        counts = {
            f"{ANSWERS}{FAILED.name}": failed,
            f"{ANSWERS}{LATE_FAILED.name}": failed,
            f"{ANSWERS}succeeded": status < 300,
        }
        for lease_id, keys in request.charges:
            self.oracle.answer(lease_id, counts.get)
            action = EstimateAction.GIVE_BACK if failed else EstimateAction.KEEP
            self.oracle.finish(keys, lease_id, action)
        self.requests.remove(request)

    async def wait(self, microseconds: int) -> None:
        """Time passes, and what runs is renewed."""
        self.oracle.now = self.bench.clock.now = self.oracle.now + microseconds
        self.oracle.latest = self.oracle.now
        for request in self.requests:
            leases = [request.lease, *request.lease.late]
            for lease, (lease_id, keys) in zip(leases, request.charges, strict=True):
                if lease.reservation is not NO_RESERVATION:
                    kept = await self.bench.backend.renew(lease.reservation, lease.reservation.lease_seconds)
                    self.oracle.check_renewed(keys, lease_id, lease.reservation.lease_seconds, kept)

    async def look(self) -> None:
        """Compare how all limits stand; windows that are charged together are looked at together."""
        places: dict[tuple[str, str], list[Counter]] = {}
        for counter in self.counters:
            places.setdefault((counter.partition, counter.scope), []).append(counter)
        for counters in places.values():
            got = await self.bench.backend.peek(Charge(counters))
            self.oracle.check(counters, 1, 0, None, got)

    async def step(self) -> None:
        """Do something at random."""
        what, running = self.chance.random(), self.requests
        if what < 0.3 or not running:
            await self.begin()
        elif what < 0.55:
            await self.charge(self.chance.choice(running))
        elif what < 0.65:
            await self.settle(self.chance.choice(running))
        elif what < 0.85:
            self.end(self.chance.choice(running))
        elif what < 0.92:
            edge = min(self.oracle.edges()[0] - self.oracle.now, FAR)
            await self.wait(max(edge + self.chance.choice([-1, 0, 1]), 0))
        else:
            await self.wait(self.chance.choice([0, 1, 1_000_000, FAR, FAR]))
        await self.look()


async def compare(bench: Bench, examples: range, steps: int) -> Tally[str]:
    """Compare a backend and the oracle; how often each thing has happened."""
    seen = Tally[str]()
    for example in examples:
        bench.wait(3_600)  # what all callers share is empty again
        state = Comparison(bench, example)
        try:
            for _ in range(steps):
                await state.step()
            for request in list(state.requests):
                state.end(request)
            await state.look()
        except AssertionError as error:
            error.add_note(f"in example {example}")
            raise
        seen += state.seen
        await state.limiter.engine.live.close()
    return seen


async def test_late_limits_and_the_oracle_give_the_same_answers(bench: Bench) -> None:
    """Early and late limits, failures, settles, refusals in the midst of a request: the count is exact."""
    seen = await compare(bench, range(12), 70)
    assert min(seen[each] for each in ("admitted", "refused", "charged", "taken back", "ended")) > 20, seen


@pytest.mark.slow
async def test_the_same_of_late_limits_for_much_longer(bench: Bench) -> None:
    """With `ORACLE_EXAMPLES` other examples each time."""
    first = random.randrange(10**6, 10**9)
    await compare(bench, range(first, first + int(os.environ.get("ORACLE_EXAMPLES", "10"))), 120)
