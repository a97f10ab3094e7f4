"""`max_wait`: calls that wait where they are refused, in turn, until the promised moment."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratelimit_mw import DecisionMade, Identity, Lease, LeaseError, Limit, Limiter, RateLimited, by
from ratelimit_mw._internal.limiter import waiting_lines
from tests.support.asgi import Counting, Down, FakeClock, limiter_of, settings_of
from tests.support.virtual_time import in_virtual_time

RATE = Limit("rate", "2/10 seconds")
SLOT = Limit("slot", concurrent=1)


def now() -> float:
    """Return the time by the event loop's clock."""
    return asyncio.get_running_loop().time()


async def admitted_at(limiter: Limiter, *limits: Any, **options: Any) -> float | None:
    """Acquire and release; return after how many seconds that was admitted, None where it was refused."""
    start = now()
    lease = await limiter.acquire(*limits, **options)
    await lease.release()
    return round(now() - start, 2) if lease.allowed else None


async def hold(lease: Lease, seconds: float) -> None:
    """Hold a lease for so long."""
    async with lease:
        await asyncio.sleep(seconds)


async def ended(tasks: list["asyncio.Task[Any]"]) -> list[tuple[float, int]]:
    """Return when each of the tasks was done, with its number, in that order."""
    start, done = now(), list[tuple[float, int]]()
    for task in tasks:
        task.add_done_callback(lambda task: done.append((round(now() - start, 2), tasks.index(task))))
    await asyncio.wait(tasks)
    return done


def test_a_call_waits_until_the_promised_moment() -> None:
    """Two calls of ten seconds are admitted at once, the next two when these have left the window."""

    async def run(limiter: Limiter) -> list[float | None]:
        return [await admitted_at(limiter, RATE.on("x"), max_wait=10) for _ in range(4)]

    assert in_virtual_time("", run) == [0, 0, 10, 0]


def test_a_moment_beyond_the_bound_refuses_at_once() -> None:
    """A call that may wait for less than the promise waits for nothing, and is told the true wait."""

    async def run(limiter: Limiter) -> tuple[float, float | None]:
        for _ in range(2):
            await limiter.acquire(RATE.on("x"))
        lease = await limiter.acquire(RATE.on("x"), max_wait=9.9)
        with pytest.raises(RateLimited):
            lease.raise_for_refusal()
        return now(), lease.decision.retry_after

    assert in_virtual_time("", run) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("", {"cost": 61}, "cost"),
        ("plans.default.blocked = true", {}, "blocked"),
        ('plans.default.spending = { daily = "1.00" }', {"price": "1.01"}, "cost"),
        ('plans.default.spending = { daily = "1.00" }', {"price": "1.00"}, "spending"),
    ],
)
def test_what_is_never_lifted_refuses_at_once(text: str, options: Any, reason: str) -> None:
    """A cost beyond the limit, a blocked caller and a spent day are refused without a wait."""

    async def run(limiter: Limiter) -> tuple[float, str]:
        if reason == "spending":
            await (await limiter.acquire(api_key="a", price="1.00")).settle("1.00")
        lease = await limiter.acquire(api_key="a", max_wait=600, **options)
        refusal = lease.decision.refusal
        assert refusal is not None
        return now(), refusal.reason

    assert in_virtual_time(text, run) == (0.0, reason)


def test_calls_are_served_in_the_order_in_which_they_came() -> None:
    """First come, first served, two in each window, whatever they cost."""

    async def run(limiter: Limiter) -> list[tuple[float, int]]:
        tasks = []
        for _ in range(8):
            tasks.append(asyncio.create_task(admitted_at(limiter, RATE.on("x"), max_wait=40)))
            await asyncio.sleep(0)
        return await ended(tasks)

    assert in_virtual_time("", run) == [(10.0 * (n // 2), n) for n in range(8)]


def test_a_small_call_overtakes_no_large_one() -> None:
    """A call of cost 2 waits for two units; one of cost 1 that comes later waits behind it."""
    limit = Limit("mixed", "3/10 seconds")

    async def run(limiter: Limiter) -> list[tuple[float, int]]:
        await limiter.acquire(limit.on("x"))
        await asyncio.sleep(5)
        await limiter.acquire(limit.on("x"))
        costs = [3, 1, 1]
        tasks = []
        for cost in costs:
            tasks.append(asyncio.create_task(admitted_at(limiter, limit.on("x", cost=cost), max_wait=60)))
            await asyncio.sleep(0.1)
        return await ended(tasks)

    assert [(round(at), n) for at, n in in_virtual_time("", run)] == [(10, 0), (20, 1), (20, 2)]


def test_other_keys_do_not_wait() -> None:
    """A key that is full holds up nobody of another key, nor of another limit that they share."""

    async def run(limiter: Limiter) -> tuple[float | None, ...]:
        for _ in range(2):
            await limiter.acquire(RATE.on("x"))
        waiting = asyncio.create_task(admitted_at(limiter, RATE.on("x"), SLOT.on("s"), max_wait=20))
        await asyncio.sleep(1)
        others = [
            await admitted_at(limiter, *limits, max_wait=20)
            for limits in ([RATE.on("y")], [SLOT.on("s")], [RATE.on("y"), SLOT.on("s")])
        ]
        return *others, await waiting

    assert in_virtual_time("", run) == (0, 0, 0, 10)


def test_a_slot_is_handed_on_at_once() -> None:
    """A call that waits for a slot has it in the moment in which it is free, and not at its next look."""

    async def run(limiter: Limiter) -> list[tuple[float, int]]:
        async def work(seconds: float) -> None:
            lease = await limiter.acquire(SLOT.on("gpu"), max_wait=60)
            lease.raise_for_refusal()
            await hold(lease, seconds)

        tasks = []
        for _ in range(5):
            tasks.append(asyncio.create_task(work(3.21)))
            await asyncio.sleep(0)
        return await ended(tasks)

    assert in_virtual_time("", run) == [(round(3.21 * (n + 1), 2), n) for n in range(5)]


@pytest.mark.parametrize("how", ["release", "end", "late", "resume", "job"])
def test_every_way_to_free_a_slot_wakes(how: str) -> None:
    """A slot may be freed by hand, by a block, with its request, or by the worker of a job."""

    async def run(limiter: Limiter) -> float:
        limits = [] if how == "late" else [SLOT.on("gpu")]
        lease = await limiter.acquire(*limits, Limit("other", "9/minute").on("x"))
        if how == "late":
            await lease.charge(SLOT.on("gpu"))
        waiting = asyncio.create_task(limiter.acquire(SLOT.on("gpu"), max_wait=60))
        await asyncio.sleep(20.001)
        if how == "release":
            await lease.release()
        elif how in ("end", "late"):
            async with lease:
                pass
        else:
            token = await lease.detach(ttl=60)
            if how == "job":
                await limiter.release(token)
            else:
                async with limiter.resume(token):
                    await asyncio.sleep(1)
        assert (await waiting).allowed
        return now()

    assert in_virtual_time("", run) == pytest.approx(21.001 if how == "resume" else 20.001, abs=0.0001)


def test_a_slot_that_stays_taken_refuses_at_the_end_of_the_wait() -> None:
    """A call that waited for a slot in vain is refused when its time is over, and told a hint."""

    async def run(limiter: Limiter) -> tuple[float, str]:
        await limiter.acquire(SLOT.on("gpu"))
        lease = await limiter.acquire(SLOT.on("gpu"), max_wait=7)
        refusal = lease.decision.refusal
        assert refusal is not None
        assert 1 <= (refusal.retry_after or 0) <= 3
        return round(now(), 2), refusal.reason

    assert in_virtual_time("", run) == (7.0, "concurrency")


def test_a_slot_whose_holder_died_is_found() -> None:
    """Nobody tells of a slot that lapses: it is looked for again and again, but not often."""

    async def run(limiter: Limiter) -> tuple[float, int]:
        slot = Limit("dies", concurrent={"limit": 1, "lease": 5})
        lease = await limiter.acquire(slot.on("gpu"))
        lease.stop_renewing()
        assert (await limiter.acquire(slot.on("gpu"), max_wait=60)).allowed
        backend = limiter.engine.backend
        assert isinstance(backend, Counting)
        return now(), backend.asked

    at, asked = in_virtual_time("", run, Counting)
    assert 5 <= at <= 5.6
    assert asked <= 30


def test_a_line_asks_one_question_at_a_time() -> None:
    """A hundred calls that wait for one key ask about twice as often as they are admitted."""

    async def run(limiter: Limiter) -> int:
        limit, backend = Limit("line", "10/second"), limiter.engine.backend
        assert isinstance(backend, Counting)
        await asyncio.gather(*[limiter.acquire(limit.on("x")) for _ in range(10)])
        first = asyncio.create_task(limiter.acquire(limit.on("x"), max_wait=60))
        await asyncio.sleep(0.1)
        before = backend.asked
        calls = [limiter.acquire(limit.on("x"), max_wait=60) for _ in range(99)]
        assert all([lease.allowed for lease in await asyncio.gather(first, *calls)])
        return backend.asked - before

    assert in_virtual_time("", run, Counting) <= 115


def test_those_who_would_wait_in_vain_are_refused_at_once() -> None:
    """Of fifty calls that wait for 11 seconds those are let in for whom that suffices."""

    async def run(limiter: Limiter) -> list[tuple[float, bool]]:
        limit, start = Limit("short", "3/5 seconds"), now()

        async def call() -> tuple[float, bool]:
            lease = await limiter.acquire(limit.on("x"), max_wait=11)
            if not lease.allowed:
                assert 11 < (lease.decision.retry_after or 0) <= 60
            return round(now() - start, 1), lease.allowed

        await asyncio.gather(*[limiter.acquire(limit.on("x")) for _ in range(3)])
        waiting = [asyncio.create_task(call()) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return await asyncio.gather(*waiting, *[call() for _ in range(47)])

    found = in_virtual_time("", run)
    assert found[:6] == [(5.0, True)] * 3 + [(10.0, True)] * 3
    assert found[6:] == [(0.0, False)] * 44


@pytest.mark.parametrize("amount", [0, 40])
def test_a_settle_wakes(amount: int) -> None:
    """Units that others give back let a call in before its promised moment."""

    async def run(limiter: Limiter) -> float:
        tokens = Limit("tokens", "100/minute", unit="tokens", cost=60)
        lease = await limiter.acquire(tokens.on("m"))
        waiting = asyncio.create_task(limiter.acquire(tokens.on("m"), max_wait=60))
        await asyncio.sleep(7)
        await lease.settle(units={"tokens": amount})
        assert (await waiting).allowed
        return round(now(), 2)

    assert in_virtual_time("", run) == 7.0


def test_a_success_lets_in_who_waits_for_failures() -> None:
    """Tries under way may all fail; the first that succeeds makes room for the next."""

    async def run(limiter: Limiter) -> tuple[float, bool]:
        login = Limit("login", "2/minute", count="failures")
        tries = [await limiter.acquire(login.on("ann")) for _ in range(2)]
        waiting = asyncio.create_task(limiter.acquire(login.on("ann"), max_wait=90))
        await asyncio.sleep(3)
        with pytest.raises(ZeroDivisionError):
            async with tries[0]:
                raise ZeroDivisionError
        await asyncio.sleep(1)
        assert not waiting.done()
        async with tries[1]:
            pass
        return round(now(), 2), (await waiting).allowed

    assert in_virtual_time("", run) == (4.0, True)


def test_an_estimate_of_money_that_is_settled_lets_in() -> None:
    """A settle lets the next one in if only estimates stand in the way of its price."""

    async def run(limiter: Limiter) -> float:
        lease = await limiter.acquire(api_key="a", price="0.80")
        waiting = asyncio.create_task(limiter.acquire(api_key="a", price="0.80", max_wait=60))
        await asyncio.sleep(9.01)
        await lease.settle("0.10")
        assert (await waiting).allowed
        return round(now(), 2)

    assert in_virtual_time('plans.default.spending = { daily = "1.00" }', run) == 9.01


def test_only_the_last_answer_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """A call that waits and is let in is one admission; one that waits in vain is one refusal."""
    told: list[bool] = []

    def on_decision(made: DecisionMade) -> None:
        told.append(made.decision.allowed)

    async def run(limiter: Limiter) -> dict[str, int]:
        lease = await limiter.acquire(SLOT.on("gpu"))
        task = asyncio.create_task(hold(lease, 3))
        (await limiter.acquire(SLOT.on("gpu"), max_wait=9)).raise_for_refusal()
        await task
        assert not (await limiter.acquire(SLOT.on("gpu"), max_wait=9)).allowed
        await asyncio.sleep(0)
        totals: dict[str, int] = {}
        for (_, _, outcome, _), number in limiter.stats().totals.items():
            totals[outcome] = totals.get(outcome, 0) + number
        return totals

    assert in_virtual_time("", run, on_decision=on_decision) == {"admitted": 2, "concurrency": 1}
    assert told == [True, True, False]
    assert caplog.text.count("slot") <= 1


def test_a_limit_that_only_reports_makes_nobody_wait() -> None:
    """Shadow mode lets in at once; beside it the limits that are enforced are waited for."""
    text = "limits.silent.shadow = true"
    silent = Limit("silent", "1/hour")

    async def run(limiter: Limiter) -> tuple[list[float | None], dict[str, int]]:
        await limiter.acquire(silent.on("x"))
        found = [await admitted_at(limiter, silent.on("x"), max_wait=5)]
        found += [await admitted_at(limiter, silent.on("x"), RATE.on("x"), max_wait=20) for _ in range(3)]
        totals: dict[str, int] = {}
        for (_, _, outcome, _), number in limiter.stats().totals.items():
            totals[outcome] = totals.get(outcome, 0) + number
        return found, totals

    found, totals = in_virtual_time(text, run)
    assert found == [0, 0, 0, 10]
    assert totals["shadow"] == 4


# ends -------------------------------------------------------------------------------------------


def test_a_cancelled_call_leaves_its_place() -> None:
    """A call that is cancelled while it waits, first or not, holds nothing and holds up nobody."""

    async def run(limiter: Limiter) -> tuple[float, int]:
        lease = await limiter.acquire(SLOT.on("gpu"))
        waiting = [asyncio.create_task(limiter.acquire(SLOT.on("gpu"), max_wait=60)) for _ in range(4)]
        await asyncio.sleep(1)
        for number in (0, 2):
            waiting[number].cancel()
        await asyncio.sleep(1)
        await lease.release()
        first = await waiting[1]
        assert first.allowed
        await first.release()
        assert (await waiting[3]).allowed
        await asyncio.sleep(1)
        return round(now(), 2), len(limiter.engine.turns)

    assert in_virtual_time("", run) == (3.0, 0)


def test_closing_the_limiter_ends_every_wait() -> None:
    """Nobody waits for a limiter that is closed: all are refused."""

    async def run(limiter: Limiter) -> tuple[float, list[bool]]:
        await limiter.acquire(SLOT.on("gpu"))
        waiting = [asyncio.create_task(limiter.acquire(SLOT.on("gpu"), max_wait=600)) for _ in range(3)]
        await asyncio.sleep(1)
        await limiter.close()
        leases = await asyncio.gather(*waiting)
        assert [lease.decision.refusal is not None for lease in leases] == [True] * 3
        return round(now()), [lease.allowed for lease in leases]

    at, allowed = in_virtual_time("", run)
    assert at <= 3
    assert allowed == [False] * 3


@pytest.mark.parametrize("name", ["MOST_IN_LINE", "MOST"])
def test_too_many_who_wait_are_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line has an end, and so have all lines together."""
    monkeypatch.setattr(waiting_lines, name, 3)

    async def run(limiter: Limiter) -> list[float]:
        keys = "ggggg" if name == "MOST_IN_LINE" else "abcde"
        leases = [await limiter.acquire(SLOT.on(key)) for key in dict.fromkeys(keys)]
        waiting = [asyncio.create_task(limiter.acquire(SLOT.on(key), max_wait=9)) for key in keys]
        done = await ended(waiting)
        assert not any([task.result().allowed for task in waiting])
        assert all([task.result().decision.retry_after for task in waiting])
        assert leases
        return [at for at, _ in done]

    assert in_virtual_time("", run) == [0, 0, 9, 9, 9]


def test_calls_that_do_not_wait_stand_in_no_line() -> None:
    """Without `max_wait`, or with 0, a call is decided about at once, by what is free."""
    limit = Limit("mixed", "3/10 seconds")

    async def run(limiter: Limiter) -> list[bool]:
        await limiter.acquire(limit.on("x"))
        waiting = asyncio.create_task(limiter.acquire(limit.on("x", cost=3), max_wait=60))
        await asyncio.sleep(1)
        allowed = [(await limiter.acquire(limit.on("x"), max_wait=each)).allowed for each in (None, 0)]
        return [*allowed, (await waiting).allowed]

    assert in_virtual_time("", run) == [True, True, True]


@pytest.mark.parametrize(
    "max_wait", [-1, -0.001, float("nan"), float("inf"), "5", True, False, [], 10**400, 2_592_001, 5j]
)
async def test_a_bound_has_to_be_one(max_wait: Any) -> None:
    """Anything but a number of seconds from nothing to thirty days is an error that says so."""
    limiter = limiter_of("", FakeClock())
    with pytest.raises(ValueError, match="max_wait must be a number of seconds from 0 to 2592000, not"):
        await limiter.acquire(RATE.on("x"), max_wait=max_wait)
    lease = await limiter.acquire(api_key="a")
    with pytest.raises(ValueError, match="max_wait must be a number of seconds"):
        await lease.charge(RATE.on("x"), max_wait=max_wait)


# settings, callers, outages ---------------------------------------------------------------------


def test_a_change_of_the_settings_is_seen_at_the_next_try() -> None:
    """A limit that is raised or switched off while somebody waits lets in at the next look."""
    for change in ("off = true", "concurrent = 2"):

        async def run(limiter: Limiter, change: str = change) -> float:
            await limiter.acquire(SLOT.on("gpu"))
            waiting = asyncio.create_task(limiter.acquire(SLOT.on("gpu"), max_wait=60))
            await asyncio.sleep(10)
            limiter.apply(settings_of(f"limits.slot.{change}"))
            assert (await waiting).allowed
            return now()

        assert 10 <= in_virtual_time("", run) <= 10.6


def test_limits_of_the_plan_are_waited_for_too() -> None:
    """A caller's own windows and slots, and shared ones, are waited for as limits in code are."""
    text = """
        plans.default.requests = ["1/10 seconds"]
        plans.anonymous.concurrent = 1
        application.requests = ["3/minute"]
    """

    async def run(limiter: Limiter) -> list[float | None]:
        who = Identity("ann", "default")
        found = [await admitted_at(limiter, identity=who, max_wait=10) for _ in range(2)]
        lease = await limiter.acquire(address="192.0.2.1")
        task = asyncio.create_task(hold(lease, 2))
        found.append(await admitted_at(limiter, address="192.0.2.1", max_wait=100))
        await task
        return found

    assert in_virtual_time(text, run) == [0, 10, 50]


def test_while_the_backend_is_away() -> None:
    """Local decisions are waited for; where outages refuse, the backend is asked again each second."""

    async def run(limiter: Limiter) -> list[float | None]:
        return [await admitted_at(limiter, RATE.on("x"), max_wait=10) for _ in range(3)]

    text = "backend = { on_failure = '%s', local_share = 1.0 }"
    assert in_virtual_time(text % "local", run, Down)[:2] == [0, 0]
    assert in_virtual_time(text % "allow", run, Down) == [0, 0, 0]
    assert in_virtual_time(text % "deny", run, Down) == [None] * 3


def test_identities_on_a_plan_that_is_gone_end_the_wait() -> None:
    """An error that the start would raise is raised at the next try, and the place in line is free."""

    async def run(limiter: Limiter) -> int:
        who = Identity("ann", "gold")
        await limiter.acquire(SLOT.on("x"), identity=who)
        waiting = asyncio.create_task(limiter.acquire(SLOT.on("x"), identity=who, max_wait=60))
        await asyncio.sleep(1)
        limiter.apply(settings_of(""))
        with pytest.raises(ValueError, match="gold"):
            await waiting
        return len(limiter.engine.turns)

    assert in_virtual_time("plans.gold.requests = ['9/minute']", run) == 0


# requests ---------------------------------------------------------------------------------------


def test_a_handler_waits_with_its_request() -> None:
    """`lease.charge` waits too, and what it has waited for ends with the request."""

    async def run(limiter: Limiter) -> list[float]:
        async def handler() -> float:
            async with await limiter.acquire(api_key="a") as lease:
                await lease.charge(SLOT.on("gpu"), max_wait=30)
                await asyncio.sleep(2)
                return round(now(), 1)

        return await asyncio.gather(*[handler() for _ in range(3)])

    assert in_virtual_time("plans.default.concurrent = 9", run) == [2, 4, 6]


def test_a_handler_that_has_waited_in_vain_costs_nothing() -> None:
    """After a wait in vain the request is given back as after any late refusal."""

    async def run(limiter: Limiter) -> tuple[float, int | None]:
        await limiter.acquire(SLOT.on("gpu"))
        lease = await limiter.acquire(api_key="a")
        with pytest.raises(RateLimited) as refused:
            await lease.charge(SLOT.on("gpu"), max_wait=3)
        assert refused.value.decision.refusal is not None
        other = await limiter.acquire(api_key="a")
        return round(now(), 1), other.decision.remaining

    assert in_virtual_time("", run) == (3.0, 59)


def test_a_wait_ends_with_its_request() -> None:
    """A task that is left behind by a request that is over raises at its next try, and takes nothing."""

    async def run(limiter: Limiter) -> bool:
        await limiter.acquire(SLOT.on("gpu"))
        lease = await limiter.acquire(api_key="a")
        left = asyncio.create_task(lease.charge(SLOT.on("gpu"), max_wait=600))
        await asyncio.sleep(1)
        async with lease:
            pass
        with pytest.raises(LeaseError, match="the request is over"):
            await left
        return now() < 3

    assert in_virtual_time("", run)


def test_everyone_is_served_in_several_event_loops() -> None:
    """One limiter in two threads: a slot that one frees wakes a call of the other at once."""
    limiter = Limiter(settings_of(""))
    slot = Limit("threads", concurrent=1, by=by.everyone)
    waits = threading.Event()

    async def second() -> bool:
        asyncio.get_running_loop().call_later(0.2, waits.set)
        return (await limiter.acquire(slot.on("x"), max_wait=60)).allowed

    async def first() -> float:
        lease = await limiter.acquire(slot.on("x"))
        with ThreadPoolExecutor() as pool:
            other = asyncio.get_running_loop().run_in_executor(pool, asyncio.run, second())
            await asyncio.to_thread(waits.wait)
            await lease.release()
            start = time.monotonic()
            assert await other
            return time.monotonic() - start

    assert asyncio.run(first()) < 30
