"""Plans' shares of what all callers share, on every backend: one count, and a lower limit for some."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from ratelimit_mw._internal.model.backend import EstimateAction
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.limits import SECOND, Slots, Window
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import SlotStatus, WindowStatus
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.policy import Policies
from tests.support.asgi import settings_of
from tests.support.conformance import KINDS, STORES, Bench, SharedServer, new_id
from tests.support.statuses import acquired, peeked
from tests.support.topologies import Cluster

SETTINGS = """
[application]
requests = ["10/minute"]
concurrent = { limit = 5, lease = 1000 }
units = { tokens = ["50/minute"] }
[plans.paid]
[plans.some]
application_share = 0.7
[plans.free]
application_share = 0.3
[plans.least]
application_share = 0.01
[[routes]]
path = "/total"
total = ["7/minute"]
cost = 2
[[routes]]
path = "/light"
slot = false
"""
SHARES = {"paid": 100, "some": 70, "free": 30, "least": 1}
"""In hundredths."""
SEEDS = range(8)
STEPS = 60


def part(amount: int, plan: str) -> int:
    """A plan's share of an amount."""
    return max(amount * SHARES[plan] // 100, 1)


@pytest.fixture(params=[*KINDS, *[f"{kind} cluster" for kind in STORES]])
async def bench(
    request: pytest.FixtureRequest,
    shared_server: SharedServer,
    shared_cluster: Callable[[str], Cluster],
) -> AsyncIterator[Bench]:
    """Each kind of backend in turn, without any counts."""
    kind, _, is_cluster = request.param.partition(" ")
    server = shared_cluster(kind) if is_cluster else None if kind == "memory" else shared_server(kind)
    bench = Bench(request.param, server)
    yield bench
    await bench.close()


@dataclass
class Model:
    """A list of everything that was admitted, and the rule."""

    entries: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    slots: set[bytes] = field(default_factory=set)

    def statuses(self, charge: Charge, plan: str, now: int) -> list[tuple[int, int]]:
        """Units used of each limit, and how long it refuses the charge, in microseconds."""
        found = []
        for place, counter in enumerate(charge.counters):
            limit = counter.limit
            if isinstance(limit, Slots):
                found.append((len(self.slots), int(len(self.slots) >= part(5, plan))))
                continue
            assert isinstance(limit, Window)
            whole = {"t": 7, "app": 10, "app:tokens": 50}[counter.scope]
            live = [entry for entry in self.entries.get(counter.scope, ()) if entry[0] > now - 60 * SECOND]
            used, need, wait = sum(cost for _, cost in live), max(charge.cost_at(place), 1), 0
            over = used + need - part(whole, plan)
            for at, cost in live if over > 0 else ():
                over, wait = over - cost, at + 60 * SECOND - now
                if over <= 0:
                    break
            never = need > part(whole, plan)
            found.append((used, 60 * SECOND if never else wait))
        return found

    def admit(self, charge: Charge, now: int, reservation: Reservation) -> None:
        """Note what was admitted."""
        for place, counter in enumerate(charge.counters):
            if isinstance(counter.limit, Window):
                self.entries.setdefault(counter.scope, []).append((now, charge.cost_at(place)))
        if reservation.slots:
            self.slots.add(reservation.id)


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_plan_meets_its_share_of_one_count(bench: Bench, seed: int) -> None:
    """Against a list of all that was admitted: decisions, counts and waits of four plans, at any moment.

    A wait is true for the share: after it the same charge is admitted, and a microsecond earlier it is not.
    """
    chance, model, running = random.Random(f"{seed}"), Model(), list[Reservation]()
    policies = Policies(settings_of(SETTINGS))
    for _ in range(STEPS):
        bench.wait(chance.choice([0, 0.001, 3.0, 17.0]))
        if running and chance.random() < 0.4:
            reservation = running.pop(chance.randrange(len(running)))
            await bench.backend.finish(reservation, EstimateAction.KEEP)
            model.slots.discard(reservation.id)
            continue
        plan = chance.choice(["paid", "some", "free", "least"])
        policy = policies.at(Identity(f"k:{plan}", plan), chance.choice([None, 0, 1]))
        charge = policy.charge.with_estimates({"tokens": chance.choice([0, 1, 9])})
        if charge.too_small is not None:
            continue
        expected = model.statuses(charge, plan, bench.clock.now)
        answer = await acquired(bench.backend, charge, new_id())
        assert answer.admitted == (not any(wait for _, wait in expected))
        if answer.admitted:
            model.admit(charge, bench.clock.now, answer.reservation)
            if answer.reservation.slots:
                running.append(answer.reservation)
            else:  # before its estimate lapses
                await bench.backend.finish(answer.reservation, EstimateAction.KEEP)
            continue
        for status, (used, wait) in zip(answer.statuses, expected, strict=True):
            if isinstance(status, WindowStatus):
                assert (status.used, status.retry_after_us) == (used, wait)
            else:
                assert isinstance(status, SlotStatus)
                assert (status.active, status.is_full) == (used, bool(wait))
        longest = max(wait for _, wait in expected)
        if longest > 1 and not any(s.refuses for s in answer.statuses if isinstance(s, SlotStatus)):
            bench.wait(microseconds=longest - 1)
            assert not (await peeked(bench.backend, charge)).admitted
            bench.wait(microseconds=1)
            assert (await peeked(bench.backend, charge)).admitted


async def test_large_limits_are_shared_in_their_own_granules(bench: Bench) -> None:
    """If the whole limit shares entries, so does a part that is small enough not to."""
    text = '[application]\nunits = { tokens = ["1100/minute"] }\n'
    text += "[plans.paid]\n[plans.free]\napplication_share = 0.5\n"
    policies = Policies(settings_of(text))
    free, paid = [policies.at(Identity(f"k:{plan}", plan), None).charge for plan in ("free", "paid")]
    first = await bench.backend.acquire(free.with_estimates({"tokens": 400}), new_id())
    bench.wait(microseconds=7)
    second = await bench.backend.acquire(paid.with_estimates({"tokens": 300}), new_id())
    assert first.admitted
    assert second.admitted
    await bench.backend.settle_units(first.reservation, {"tokens": 10})
    assert (await peeked(bench.backend, paid)).counted == [310]
    assert (await peeked(bench.backend, free.with_estimates({"tokens": 240}))).admitted
    assert not (await peeked(bench.backend, free.with_estimates({"tokens": 241}))).admitted
    assert (await peeked(bench.backend, paid.with_estimates({"tokens": 790}))).admitted


async def test_charges_that_come_together_meet_each_its_own_share(bench: Bench) -> None:
    """In one batch, decided in order on one count: a share refuses its own callers and nobody else."""
    policies = Policies(settings_of(SETTINGS))
    free, paid = [policies.at(Identity(f"k:{plan}", plan), 1).charge for plan in ("free", "paid")]
    order = [free, free, paid, free, free, paid, free, paid]
    answers = await asyncio.gather(*[bench.backend.acquire(each, new_id()) for each in order])
    admitted = [answer.admitted for answer in answers]
    assert all(found for found, charge in zip(admitted, order, strict=True) if charge is paid)
    assert sum(admitted) <= 6
    assert sum(found for found, charge in zip(admitted, order, strict=True) if charge is free) <= 3
