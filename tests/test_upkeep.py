"""Jobs beside the requests stop when they are told to, whatever they do with it."""

import asyncio

from ratelimit_mw.live.upkeep import Job, Upkeep


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
