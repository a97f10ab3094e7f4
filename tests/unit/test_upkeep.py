"""Jobs beside the requests stop when they are told to, whatever they do with it."""

import asyncio
import logging
import time

import pytest

from ratelimit_mw._internal.runtime.upkeep import TICK, Job, Upkeep, until_next


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


async def test_jobs_with_one_period_are_done_together() -> None:
    """Jobs with the same period begin in the same turn of the event loop, however long each takes."""
    loop, turns = asyncio.get_running_loop(), dict[str, list[float]](quick=[], slow=[])
    turn = 0

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count_turns)

    async def quick() -> None:
        turns["quick"].append(turn)

    async def slow() -> None:
        turns["slow"].append(turn)
        await asyncio.sleep(0.05)

    count_turns()
    upkeep = Upkeep([Job("quick", 0.2, quick), Job("slow", 0.2, slow, waits=True)])
    upkeep.start()
    async with asyncio.timeout(30):
        while len(set(turns["quick"]) & set(turns["slow"])) < 3:
            await asyncio.sleep(0.01)
    await upkeep.stop()


async def test_the_moment_of_jobs_is_a_matter_of_chance() -> None:
    """Processes that start together do not keep in step: each has a moment of its own within the seconds."""
    begun, firsts, offsets = asyncio.get_running_loop().time(), dict[int, int](), dict[int, float]()

    def job_of(number: int) -> Job:
        async def note() -> None:
            firsts[number] = firsts.get(number, 0) + 1
            if firsts[number] == 2:
                offsets[number] = asyncio.get_running_loop().time() - begun

        return Job("note", 2, note)

    every = [Upkeep([job_of(number)]) for number in range(8)]
    for upkeep in every:
        upkeep.start()
    async with asyncio.timeout(30):
        while len(offsets) < len(every):
            await asyncio.sleep(0.01)
    for upkeep in every:
        await upkeep.stop()
    assert max(offsets.values()) - min(offsets.values()) > 0.2
    assert min(offsets.values()) >= 0.19


@pytest.mark.parametrize("seconds", [0.4, 1.0, 60.0])
@pytest.mark.parametrize("clock", [0.0, 1_800_000_000.123, 1_800_000_000.999, -5.5])
def test_jobs_begin_at_ticks_of_the_clock(
    seconds: float, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes begin at ticks that they share, never at once and never much later than a period."""
    monkeypatch.setattr(time, "time", lambda: clock)
    for share in (0.0, 0.31, 0.5, 0.9999):
        wait = until_next(seconds, share)
        assert seconds / 10 <= wait <= 1.1 * seconds
        assert (clock + wait) / TICK == pytest.approx(round((clock + wait) / TICK), abs=1e-3)
    # A job that begins at its tick is done again a period later, also where the clock runs a little ahead.
    begun = clock + until_next(seconds, 0.31)
    for late in (-0.001, 0.0, 0.003, seconds / 2):
        monkeypatch.setattr(time, "time", lambda: begun + late)  # noqa: B023 - called at once
        assert late + until_next(seconds, 0.31) == pytest.approx(seconds, abs=1e-5)
