"""The four words of a decision: `limit`, `remaining`, `reset_after` and `retry_after`."""

from collections.abc import Callable
from decimal import Decimal

import pytest

from ratelimit_mw import Decision, Limiter, Settings
from ratelimit_mw._internal.backends.memory.backend import MemoryBackend
from ratelimit_mw._internal.model.charge import Counter
from ratelimit_mw._internal.model.limits import Allowance, Limit, Slots, Window
from ratelimit_mw._internal.model.status import BudgetStatus, SlotStatus, Status, WindowStatus
from ratelimit_mw._internal.policy.decision import LimitStatus
from tests.support.asgi import FakeClock, settings_of

PLAN = """
[plans.default]
requests = ["3/minute", "10/hour"]
concurrent = 2
spending = { daily = "1.00", currency = "EUR" }
[[routes]]
path = "/priced"
price = "0.25"
"""
SECONDS = 1_000_000


def limiter_of(clock: FakeClock, settings: Settings) -> Limiter:
    """Make a limiter on a clock that the test moves."""
    return Limiter(settings, backend=MemoryBackend(clock=clock))


async def test_an_admission_tells_of_the_nearest_window() -> None:
    """An admission tells limit, rest and the seconds until the rest grows, of the nearest window."""
    clock = FakeClock()
    async with limiter_of(clock, settings_of(PLAN)) as limiter:
        await limiter.acquire(api_key="a")
        clock.now += 10 * SECONDS
        decision = (await limiter.acquire(api_key="a")).decision
        assert (decision.limit, decision.remaining, decision.reset_after) == (3, 1, 50.0)
        assert decision.retry_after is None


async def test_a_refusal_tells_when_to_come_again() -> None:
    """A refusal tells the seconds until the request may succeed, on the decision and on the refusal."""
    clock = FakeClock()
    async with limiter_of(clock, settings_of(PLAN.replace("concurrent = 2", ""))) as limiter:
        for _ in range(3):
            await limiter.acquire(api_key="a")
        clock.now += 10 * SECONDS
        decision = (await limiter.acquire(api_key="a")).decision
        assert decision.refusal is not None
        assert decision.retry_after == decision.refusal.retry_after == 50.0
        assert (decision.limit, decision.remaining) == (3, 0)
        assert decision.refusal.limit is not None
        assert decision.refusal.limit.name == "3/minute"


async def test_every_limit_tells_its_amounts_in_its_own_measure() -> None:
    """Windows tell units, slots tell slots, and budgets tell money in their currency."""
    async with limiter_of(FakeClock(), settings_of(PLAN)) as limiter:
        lease = await limiter.acquire(api_key="a", path="/priced")
        told = [(each.name, each.limit, each.remaining, each.reset_after) for each in lease.decision.limits]
        assert told == [
            ("3/minute", 3, 2, 60.0),
            ("10/hour", 10, 9, 3600.0),
            ("slots", 2, 1, None),
            ("daily", Decimal("1.00"), Decimal("0.75"), None),
        ]


def test_without_windows_the_words_are_none() -> None:
    """A decision without a window of the caller tells None, not a number that means something else."""
    decision = Decision(True, 0)
    words = (decision.limit, decision.remaining, decision.reset_after, decision.retry_after)
    assert words == (None, None, None, None)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize(
    ("limit", "status"),
    [
        (Window(5, 1, "minute"), lambda over: WindowStatus(5 + over, SECONDS, SECONDS)),
        (Slots(5), lambda over: SlotStatus(5 + over, is_full=True)),
        (Allowance(5_000, "daily"), lambda over: BudgetStatus(4_000 + over, 1_000, is_short=True)),
    ],
    ids=["window", "slots", "budget"],
)
def test_a_limit_that_is_used_up_has_nothing_left(
    limit: Limit, status: Callable[[int], Status], over: int
) -> None:
    """Neither one unit more, nor less than nothing where it was passed or lowered."""
    counter = Counter("k", "p", limit)
    assert LimitStatus(counter, status(over)).remaining == 0
    assert Decision(False, 0, limits=(LimitStatus(counter, status(over)),)).remaining in {0, None}
