"""Every backend against a brute-force oracle: whatever happens, both give the same answers."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ratelimit_mw._internal.model.backend import EstimateAction, Settlement
from ratelimit_mw._internal.model.charge import Charge, Counter
from ratelimit_mw._internal.model.limits import Allowance, Slots, Window
from ratelimit_mw._internal.model.periods import KEPT_AFTER_END
from ratelimit_mw._internal.model.reservation import Reservation
from tests.support.conformance import KINDS, Bench, SharedServer, instant, new_id
from tests.support.oracle import Oracle

QUOTAS = st.sampled_from([1, 3, 10, 10, 10, 40, 2_000])
ZONES = st.sampled_from(
    ["UTC", "UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Auckland"]
)
STARTS = [
    "2026-11-21T12:00:00+00:00",
    "2026-10-24T21:59:59+00:00",
    "2026-10-31T23:59:59+00:00",
    "2028-02-28T23:00:00+00:00",
    "2026-12-31T22:00:00+00:00",
]
ACTIONS = st.sampled_from(list(EstimateAction))
# Keys of a server live by its own clock, which an example must not outlast: nothing shorter than this.
LEASES = st.sampled_from([30.0, 45.5, 61.0])
PRICES = st.sampled_from([0, 1, 7, 100_000, 300_000])
AMOUNTS = st.sampled_from([0, 1, 3, 3, 9, 40, 3_000])
UNITS = st.dictionaries(st.sampled_from(["tokens", "images"]), AMOUNTS)


@st.composite
def shared_counters(draw: st.DrawFn) -> list[Counter]:
    """Some of the limits that all callers share."""
    found: list[Counter] = []
    if draw(st.booleans()):
        found.append(Counter("app", "app", Window(draw(QUOTAS), 1, "hour"), "everyone"))
    if draw(st.booleans()):
        found.append(Counter("app", "app:tokens", Window(draw(QUOTAS), 1, "minute", "tokens"), "everyone"))
    if draw(st.booleans()):
        found.append(
            Counter("app", "app", Slots(draw(st.integers(1, 5)), lease_seconds=draw(LEASES)), "everyone")
        )
    return found


@st.composite
def counters(draw: st.DrawFn) -> list[Counter]:
    """One charge's limits: some of the caller's own and some of everyone's, each drawn anew."""
    found: list[Counter] = []
    caller = draw(st.sampled_from(["a", "a", "b"]))
    for scope, multiple, unit in (("p", 1, "minute"), ("p", 7, "minute"), ("r", 1, "minute")):
        if draw(st.booleans()):
            found.append(Counter(caller, scope, Window(draw(QUOTAS), multiple, unit)))
    for unit, multiples in (("tokens", (1,) if caller == "a" else (1, 7)), ("images", (1,))):
        if draw(st.booleans()):
            lengths = [Window(draw(QUOTAS), multiple, "minute", unit) for multiple in multiples]
            found += [Counter(caller, f"p:{unit}", length) for length in lengths]
    if draw(st.booleans()):
        found.append(Counter(caller, "p", Slots(draw(st.integers(1, 4)), lease_seconds=draw(LEASES))))
    if draw(st.booleans()):
        zone = draw(ZONES)
        daily = draw(st.sampled_from([100_000, 300_000, 1_000_000]))
        found.append(Counter(caller, "p", Allowance(daily, "daily", "USD", zone)))
        found.append(Counter(caller, "p", Allowance(1_500_000, "monthly", "USD", zone)))
    found += draw(shared_counters())
    return found or [Counter(caller, "p", Window(draw(QUOTAS), 2, "minute"))]


class Comparison(RuleBasedStateMachine):
    """Does the same with a backend and with the oracle."""

    def __init__(self, bench: Bench, runner: asyncio.Runner, name: str) -> None:
        super().__init__()
        self.bench = bench
        self.runner = runner
        self.name = name
        self.reservations: list[Reservation] = []
        self.oracle = Oracle(0)

    @initialize(start=st.sampled_from(STARTS))
    def begin(self, start: str) -> None:
        """Set the clock."""
        self.set_clock(instant(start))

    @rule(charges=st.lists(st.tuples(counters(), st.integers(1, 12), PRICES, UNITS), min_size=1, max_size=4))
    def acquire(self, charges: list[tuple[list[Counter], int, int, dict[str, int]]]) -> None:
        """Make some charges in the same moment: they are decided one after the other."""
        calls = [(self.mine(found), cost, price, units, new_id()) for found, cost, price, units in charges]
        backend = self.backend()

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(
                *[
                    backend.acquire(Charge(each, cost, estimates=units), id_, price)
                    for each, cost, price, units, id_ in calls
                ]
            )

        for (each, cost, price, units, id_), got in zip(calls, self.runner.run(all_at_once()), strict=True):
            self.oracle.check(each, cost, price, id_, got, units)
            if got.reservation.slots or got.reservation.periods or got.reservation.meters:
                self.reservations.append(got.reservation)

    @rule(found=counters(), cost=st.integers(1, 12), units=UNITS, times=st.integers(2, 30))
    def acquire_often(self, found: list[Counter], cost: int, units: dict[str, int], times: int) -> None:
        """Make the same charge a number of times, some microseconds apart."""
        for _ in range(times):
            self.acquire([(found, cost, 0, units)])
            self.wait(1)

    @rule(found=counters(), cost=st.integers(1, 12), price=PRICES, units=UNITS)
    def peek(self, found: list[Counter], cost: int, price: int, units: dict[str, int] | None = None) -> None:
        """Ask, and change nothing."""
        mine, units = self.mine(found), units or {}
        got = self.runner.run(self.backend().peek(Charge(mine, cost, estimates=units), price))
        self.oracle.check(mine, cost, price, None, got, units)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), lease=LEASES)
    def renew(self, data: st.DataObject, lease: float) -> None:
        """Renew the slots of some charge, however late."""
        self.renew_reservation(data.draw(st.sampled_from(self.reservations)), lease)

    def renew_reservation(self, reservation: Reservation, lease: float) -> None:
        """Renew the slots of one charge."""
        kept = self.runner.run(self.backend().renew(reservation, lease))
        self.oracle.check_renewed([held[:2] for held in reservation.slots], reservation.id, lease, kept)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), action=ACTIONS, times=st.integers(1, 2))
    def finish(self, data: st.DataObject, action: EstimateAction, times: int) -> None:
        """End some charge, again perhaps."""
        reservation = data.draw(st.sampled_from(self.reservations))
        for _ in range(times):
            self.finish_reservation(reservation, action)

    def finish_reservation(self, reservation: Reservation, action: EstimateAction) -> None:
        """End one charge."""
        self.runner.run(self._finish(reservation, action))
        self.oracle.finish([held[:2] for held in reservation.slots], reservation.id, action)

    @precondition(lambda self: any(reservation.periods for reservation in self.reservations))
    @rule(data=st.data(), amount=st.sampled_from([0, 1, 99_999, 100_000, 600_000]), replace=st.booleans())
    def settle(self, data: st.DataObject, amount: int, replace: bool) -> None:
        """Settle some charge, again perhaps or with another amount, while its periods are remembered."""
        reservation = data.draw(
            st.sampled_from([reservation for reservation in self.reservations if reservation.periods])
        )
        past = min(held.ends for held in reservation.periods) + KEPT_AFTER_END
        if self.oracle.now < past and self.oracle.can_be_settled(reservation.id):
            met = self.runner.run(self._settle(reservation, amount, replace=replace))
            assert met is self.oracle.settle(reservation.id, amount, replace=replace)

    @precondition(lambda self: any(reservation.meters for reservation in self.reservations))
    @rule(data=st.data(), amount=AMOUNTS, other=AMOUNTS, replace=st.booleans())
    def settle_units(self, data: st.DataObject, amount: int, other: int, replace: bool) -> None:
        """Settle the units of some charge: one or all, again perhaps, also when it has left its windows."""
        reservation = data.draw(
            st.sampled_from([reservation for reservation in self.reservations if reservation.meters])
        )
        units = {meter.unit: amount if meter.unit == "tokens" else other for meter in reservation.meters}
        if data.draw(st.booleans()):
            units.popitem()
        if units and self.oracle.knows_units(reservation.id):
            self.settle_reservation(reservation, units, replace=replace)

    def settle_reservation(self, reservation: Reservation, units: dict[str, int], *, replace: bool) -> None:
        """Settle units of one charge."""
        met = self.runner.run(self._settle_units(reservation, units, replace=replace))
        assert met is self.oracle.settle_units(reservation.id, units, replace=replace)

    @precondition(lambda self: any(reservation.meters for reservation in self.reservations))
    @rule(data=st.data())
    def hold_units(self, data: st.DataObject) -> None:
        """Hold the estimates of some charge until they are settled."""
        reservation = data.draw(
            st.sampled_from([reservation for reservation in self.reservations if reservation.meters])
        )
        if self.oracle.knows_units(reservation.id):
            self.hold_estimate(reservation)

    def hold_estimate(self, reservation: Reservation) -> None:
        """Hold the estimates of one charge."""
        self.runner.run(
            self._hold(
                reservation.with_keys(reservation.slots, (), reservation.meters, reservation.estimates)
            )
        )
        if any(reservation.estimates):
            self.oracle.hold_units(reservation.id)

    @precondition(lambda self: any(reservation.periods for reservation in self.reservations))
    @rule(data=st.data())
    def hold_price(self, data: st.DataObject) -> None:
        """Hold the estimate of some charge, while its periods are remembered."""
        reservation = data.draw(
            st.sampled_from([reservation for reservation in self.reservations if reservation.periods])
        )
        if self.oracle.now < min(held.ends for held in reservation.periods) + KEPT_AFTER_END:
            self.runner.run(self._hold(reservation.without_meters()))
            self.oracle.hold_estimate(reservation.id)

    @rule(microseconds=st.one_of(st.integers(0, 3), st.integers(0, 200_000_000), st.integers(0, 10**11)))
    def wait(self, microseconds: int) -> None:
        """Let time pass."""
        self.set_clock(self.oracle.now + microseconds)

    @rule(data=st.data(), off=st.sampled_from([-1, 0, 1]))
    def wait_for_an_edge(self, data: st.DataObject, off: int) -> None:
        """Go to where something changes, or a microsecond beside it."""
        edges = self.oracle.edges()
        moment = edges[data.draw(st.integers(0, min(len(edges) - 1, 12)))]
        self.set_clock(max(moment + off, self.oracle.now))

    @rule(microseconds=st.one_of(st.integers(1, 3), st.integers(1, 70_000_000)))
    def step_back(self, microseconds: int) -> None:
        """Let the backend's clock step back."""
        self.set_clock(self.oracle.now - microseconds)

    def set_clock(self, now: int) -> None:
        """Set both clocks."""
        self.oracle.steps += now < self.oracle.now
        self.oracle.now = self.bench.clock.now = now
        self.oracle.latest = max(self.oracle.latest, now)

    def mine(self, found: list[Counter]) -> list[Counter]:
        """Return the limits under partitions that only this example uses."""
        return [
            Counter(f"{self.name}:{each.partition}", each.scope, each.limit, each.owner) for each in found
        ]

    def backend(self) -> Any:
        """One of two objects on the same counts, in turn."""
        self.bench.backends.rotate()
        return self.bench.backends[0]

    async def _hold(self, reservation: Reservation) -> None:
        await self.backend().hold_estimate(reservation)

    async def _settle(self, reservation: Reservation, amount: int, *, replace: bool) -> Settlement:
        met: Settlement = await self.backend().settle(reservation, amount, replace=replace)
        return met

    async def _settle_units(
        self, reservation: Reservation, units: dict[str, int], *, replace: bool
    ) -> Settlement:
        met: Settlement = await self.backend().settle_units(reservation, units, replace=replace)
        return met

    async def _finish(self, reservation: Reservation, action: EstimateAction) -> None:
        await self.backend().finish(reservation, action)


@pytest.fixture(params=KINDS)
def bench(
    request: pytest.FixtureRequest, shared_server: SharedServer
) -> Iterator[tuple[Bench, asyncio.Runner]]:
    """Each kind of backend in turn, and the event loop it runs in."""
    with asyncio.Runner() as runner:
        bench = Bench(request.param, None if request.param == "memory" else shared_server(request.param))
        bench.another()
        yield bench, runner
        runner.run(bench.close())


def compare(bench: tuple[Bench, asyncio.Runner], **tried: Any) -> None:
    """Run the comparison; counts of one example are nobody else's."""
    numbers = itertools.count()
    run_state_machine_as_test(  # which calls a factory as well as a class
        lambda: Comparison(*bench, f"example {next(numbers)}"),  # type: ignore[arg-type]
        settings=settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, **tried),
    )


def test_a_backend_and_the_oracle_give_the_same_answers(bench: tuple[Bench, asyncio.Runner]) -> None:
    """Charges, renewals, ends, settles, changed limits, time that passes and steps back: one answer."""
    compare(bench, max_examples=60, stateful_step_count=25, derandomize=True, database=None)


def test_a_slot_that_is_left_of_two_is_renewed_and_counts(bench: tuple[Bench, asyncio.Runner]) -> None:
    """A clock steps back after one of two expired slots was forgotten: the other lives."""
    one, other = [Counter(of, "p", Slots(1, lease_seconds=30.0), "everyone") for of in ("a", "b")]
    state = Comparison(*bench, "left of two")
    state.set_clock(instant(STARTS[0]))
    state.acquire([([one, other], 1, 0, {})])
    state.wait(31_000_000)
    state.acquire([([one], 1, 0, {})])
    state.step_back(2_000_000)
    state.renew_reservation(state.reservations[0], 30.0)
    state.peek([other], 1, 0)
    state.wait(29_000_000)
    state.peek([other], 1, 0)


@pytest.mark.slow
def test_the_same_for_much_longer(bench: tuple[Bench, asyncio.Runner]) -> None:
    """With other examples each time, `ORACLE_EXAMPLES` of them; a failure prints how to repeat it."""
    compare(bench, max_examples=int(os.environ.get("ORACLE_EXAMPLES", "40")), stateful_step_count=40)
