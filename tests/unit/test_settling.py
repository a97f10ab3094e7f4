"""Settles of requests and jobs: what they ask of the backend, and what is left to renew or to end."""

import asyncio
import logging

import pytest

from ratelimit_mw import BackendError, Lease, Limiter
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.backend import EstimateAction, UnderWay
from ratelimit_mw._internal.model.charge import Charge
from ratelimit_mw._internal.model.outcome import Outcome
from ratelimit_mw._internal.model.reservation import Reservation
from ratelimit_mw._internal.model.status import BudgetStatus
from tests.support.asgi import FakeClock, settings_of
from tests.support.conformance import eventually

TOKENS = """
plans.default = { units = { tokens = ["1000/minute"] }, spending = { daily = "1.00" } }
plans.busy = { units = { tokens = ["1000/minute"] }, concurrent = 5 }
keys = [{ key = "busy", plan = "busy" }]
[[routes]]
path = "/chat"
units = { tokens = 100 }
slot = true
[[routes]]
path = "/draw"
units = { tokens = 100 }
price = "0.10"
"""


class Watched(MemoryBackend):
    """Counts what is asked of it, and can't be asked for an estimate when told so."""

    def __init__(self) -> None:
        super().__init__(clock=FakeClock())
        self.opened = 0
        self.finished: list[EstimateAction] = []
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def acquire(self, charge: Charge, lease_id: bytes, price: int = 0) -> Outcome:
        """Charge, once the answer may come."""
        self.opened += 1
        await self.gate.wait()
        if self.away:
            raise BackendError("nobody answers")
        return await super().acquire(charge, lease_id, price)

    async def restore(self, charge: Charge, lease_id: bytes, price: int) -> Outcome:
        """Charge what was admitted elsewhere, where anybody answers."""
        if self.away:
            raise BackendError("nobody answers")
        return await super().restore(charge, lease_id, price)

    def finish(self, reservation: Reservation, action: EstimateAction) -> UnderWay[object]:
        """End a reservation, and remember how."""
        self.finished.append(action)
        return super().finish(reservation, action)


def limiter_of(backend: MemoryBackend) -> Limiter:
    """A limiter on a backend."""
    return Limiter(settings_of(TOKENS), backend=backend)


async def spent(limiter: Limiter) -> tuple[int, int]:
    """The amounts that the caller has spent and that are held for it."""
    policy = limiter.engine.policies.match(limiter.engine.identity_of(api_key="a"), "GET", "/draw")
    (budget,) = [
        each for _, each in (await limiter.engine.peek(policy)).limits if isinstance(each, BudgetStatus)
    ]
    return budget.spent, budget.held


async def has_spent(limiter: Limiter, amounts: tuple[int, int]) -> bool:
    """Whether the caller has spent so much, and so much is held for it."""
    return await spent(limiter) == amounts


def end(limiter: Limiter, lease: Lease) -> None:
    """End a request as the middleware does."""
    limiter.engine.leases.end(lease, failed=False, status=200)


async def test_the_end_of_a_settled_request_asks_nothing_of_the_backend() -> None:
    """An end has nothing to say where all units are settled and nothing else is held."""
    limiter = limiter_of(backend := Watched())
    settled, unsettled = [await limiter.acquire(api_key="a", path="/chat") for _ in range(2)]
    await settled.settle(units={"tokens": 70})
    end(limiter, settled)
    assert backend.finished == []
    end(limiter, unsettled)
    assert backend.finished == [EstimateAction.KEEP]


@pytest.mark.parametrize(
    ("api_key", "path", "left"), [("a", "/chat", [0, 0]), ("a", "/draw", [1, 0]), ("busy", "/chat", [1, 1])]
)
async def test_what_is_settled_is_renewed_no_more(api_key: str, path: str, left: list[int]) -> None:
    """A lease is renewed as long as it holds a slot, or an estimate of units or of money."""
    limiter = limiter_of(Watched())
    lease = await limiter.acquire(api_key=api_key, path=path)
    leases = limiter.engine.leases
    assert leases.number == 1
    await lease.settle(units={"tokens": 70})
    after_units = leases.number
    await lease.settle("0.05")
    assert [after_units, leases.number] == left


async def test_slots_are_released_once() -> None:
    """A second release asks nothing of the backend; the estimate is renewed on, and without the slots."""
    limiter = limiter_of(backend := Watched())
    lease = await limiter.acquire(api_key="busy", path="/chat")
    lease.is_acquired = False  # as a request, which somebody ends
    for _ in range(2):
        await lease.release()
    assert backend.finished == [EstimateAction.UNTOUCHED]
    assert limiter.engine.leases.number == 1
    assert not limiter.engine.leases.renewing().leases
    assert lease.reservation.slots == ()


async def test_nothing_is_renewed_of_a_request_that_has_freed_all() -> None:
    """A request that held a slot alone has nothing left after its release."""
    limiter = limiter_of(Watched())
    lease = await limiter.acquire(api_key="busy")
    lease.is_acquired = False  # as a request, which somebody ends
    await lease.release()
    assert limiter.engine.leases.number == 0


async def test_settles_at_once_open_one_estimate() -> None:
    """A request without a price gets one record, however many settles come before it is there."""
    limiter = limiter_of(backend := Watched())
    lease = await limiter.acquire(api_key="a", path="/chat")
    before = backend.opened
    backend.gate.clear()
    settles = [asyncio.ensure_future(lease.settle("0.30")) for _ in range(3)]
    await asyncio.sleep(0.01)
    backend.gate.set()
    await asyncio.gather(*settles)
    assert backend.opened - before == 1
    assert await spent(limiter) == (300_000, 0)


async def test_a_price_that_the_backend_could_not_take_is_kept_until_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A settle of a request without a price in an outage is written later, once, however often it comes."""
    limiter = limiter_of(backend := Watched())
    lease = await limiter.acquire(api_key="a", path="/chat")
    backend.away = True
    await lease.settle("0.30")
    assert await spent(limiter) == (0, 0)
    backend.away = False
    await lease.settle("0.30")
    await eventually(lambda: has_spent(limiter, (300_000, 0)))
    await lease.settle("0.30")
    assert caplog.messages == []
    await lease.settle("0.40")
    assert limiter.stats().settles_ignored == 1
    assert await spent(limiter) == (300_000, 0)


async def test_a_job_without_a_price_holds_no_money() -> None:
    """The estimate that a detached request without a price gets is one of nothing."""
    limiter = limiter_of(Watched())
    lease = await limiter.acquire(api_key="a", path="/chat")
    token = await lease.detach(ttl=60)
    assert await spent(limiter) == (0, 0)
    await limiter.settle(token, "0.30")
    assert await spent(limiter) == (300_000, 0)


async def test_a_price_is_read_in_the_currency_of_the_budget() -> None:
    """A settle of tokens counts whole tokens, with an estimate and without one."""
    text = """
        plans.default.spending = { daily = "1000", currency = "token" }
        routes = [{ path = "/priced", price = "100" }]
    """
    limiter = Limiter(settings_of(text), backend=MemoryBackend(clock=FakeClock()))
    for path in ("/priced", "/"):
        lease = await limiter.acquire(api_key="a", path=path)
        await lease.settle("399.5")
    (budget,) = (await limiter.acquire(api_key="a", path="/priced")).decision.limits
    assert budget.remaining == 100


@pytest.mark.parametrize("amount", ["0.40", None])
async def test_an_ignored_settle_is_logged(amount: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Another amount than the first is told in the log, of money as of units, with the lease."""
    limiter = limiter_of(Watched())
    lease = await limiter.acquire(api_key="a", path="/draw")
    await lease.settle("0.30", units={"tokens": 70})
    with caplog.at_level(logging.WARNING, "ratelimit_mw"):
        await lease.settle(amount, units={"tokens": 70 if amount else 80})
    (record,) = caplog.records
    assert record.__dict__["ratelimit"] == {
        "event": "settle_ignored",
        "lease": lease.id,
        "reason": "different",
    }
    assert limiter.stats().settles_ignored == 1
