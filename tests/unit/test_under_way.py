"""Operations that are under way to the backend: who is told of their answers, and how often."""

import asyncio
import logging

import pytest

from ratelimit_mw import Limiter
from ratelimit_mw._internal.backends.cluster.steps import ByAll, MetByAll
from ratelimit_mw._internal.backends.redis.operations import ALWAYS, Operation, Template
from ratelimit_mw._internal.lease.background import Arrival
from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.token import JOB
from ratelimit_mw._internal.model.backend import BackendError, Known, Settlement

AWAY = BackendError("away")


def operation() -> Operation:
    """An operation that is sent until it arrives."""
    return Operation(Template(b"", 0, b""), b"", ALWAYS)


def a_lease() -> Lease:
    """A lease that holds nothing."""
    engine = Limiter().engine
    return Lease(engine.leases, engine.backend, JOB, JOB.identity, JOB.charge)


def test_a_listener_is_told_once() -> None:
    """The answer comes to the listener when it is there; what comes after it does not."""
    told: list[object] = []
    sent = operation()
    sent.tell(told.append)
    assert told == []
    sent.answer(b"\1")
    sent.fail(AWAY)
    assert told == [b"\1"]


@pytest.mark.parametrize("is_failed", [False, True])
def test_a_listener_who_comes_late_is_told_at_once(is_failed: bool) -> None:
    """Of an operation that is over the listener is told before `tell` returns."""
    told: list[object] = []
    sent = operation()
    if is_failed:
        sent.fail(AWAY)
    else:
        sent.answer(b"\1")
    sent.tell(told.append)
    assert told == [AWAY if is_failed else b"\1"]


def test_listeners_of_an_event_loop_that_has_ended_are_not_told() -> None:
    """They wait in that loop, and nothing may be done there any more."""
    told: list[object] = []
    sent = operation()
    sent.tell(told.append)
    sent.forget_loop()
    sent.answer(b"\1")
    assert told == []


def test_parts_are_told_of_together() -> None:
    """The listener is told once all parts have answered, whose order counts, not that of the answers."""
    told: list[object] = []
    parts = [operation(), operation(), operation()]
    MetByAll(parts).tell(told.append)
    parts[2].answer(Settlement.SETTLED)
    parts[1].answer(Settlement.DIFFERENT)
    assert told == []
    parts[0].answer(Settlement.REPEATED)
    assert told == [Settlement.DIFFERENT]


def test_an_error_of_a_part_is_the_error_of_all() -> None:
    """The listener is told of it, but not before the other parts are over."""
    told: list[object] = []
    parts = [operation(), operation()]
    ByAll(parts).tell(told.append)
    parts[0].fail(AWAY)
    assert told == []
    parts[1].answer(b"\1")
    assert told == [AWAY]


async def test_parts_that_are_awaited() -> None:
    """Awaiting them gives what a listener is told, or raises the error."""
    assert await MetByAll([Known(Settlement.REPEATED), Known(Settlement.SETTLED)]) is Settlement.SETTLED
    assert await MetByAll([]) is Settlement.UNKNOWN
    failed = operation()
    failed.fail(AWAY)
    with pytest.raises(BackendError, match="away"):
        await ByAll[object]([Known(None), failed])


async def test_a_wait_ends_with_the_last_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Each answer is taken in with its lease and amount, and an error is logged. Both are waited for."""
    lease = a_lease()
    taken: list[object] = []
    first, second = operation(), operation()
    arrival = Arrival(lease, "a settle")
    arrival.add(first, lambda *said: taken.append(said), lease, 7)
    arrival.add(second, lambda *said: taken.append(said), lease, 8)
    waiting = asyncio.ensure_future(arrival.wait(30.0))
    await asyncio.sleep(0)
    first.answer(b"\1")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    with caplog.at_level(logging.ERROR):
        second.fail(AWAY)
    await waiting
    assert taken == [(lease, 7, b"\1")]
    assert [record.getMessage() for record in caplog.records] == [
        "a settle of lease  did not reach the backend: away"
    ]


async def test_a_wait_ends_in_time(caplog: pytest.LogCaptureFixture) -> None:
    """An operation that gets no answer is waited for as long as was said, and taken in when that comes."""
    lease = a_lease()
    taken: list[object] = []
    sent = operation()
    arrival = Arrival(lease, "a settle")
    arrival.add(sent, lambda *said: taken.append(said), lease, 7)
    await arrival.wait(0.001)
    assert caplog.messages == ["a settle of lease  waits for the backend"]
    sent.answer(b"\1")
    assert taken == [(lease, 7, b"\1")]
