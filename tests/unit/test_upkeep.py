"""Jobs beside the requests stop when they are told to, whatever they do with it."""

import asyncio
import logging

import pytest

from ratelimit_mw._internal.runtime.upkeep import Job, Upkeep


async def test_a_job_that_loses_its_cancellation_stops() -> None:
    """redis-py loses one now and then; waiting for such a job would keep the process from ending."""
    started = asyncio.Event()

    async def stubborn() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    upkeep = Upkeep([Job("stubborn", 60, stubborn)])
    upkeep.start()
    await started.wait()
    async with asyncio.timeout(10):
        await upkeep.stop()


async def test_a_job_that_keeps_failing_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """The log has one traceback for each reason, not one for each time; after a success it may come again."""
    reasons = ["a", "a", "a", "b", "b", "", "b"]
    done = asyncio.Event()

    async def failing() -> None:
        if not reasons:
            done.set()
            return
        if reason := reasons.pop(0):
            raise ZeroDivisionError(reason)

    upkeep = Upkeep([Job("a job", 0.001, failing)])
    upkeep.start()
    async with asyncio.timeout(10):
        await done.wait()
        await upkeep.stop()
    said = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert said == ["a", "b", "b"]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
