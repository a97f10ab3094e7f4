"""Jobs beside the requests, run again and again in each event loop that serves some.

Jobs with the same number of seconds are done in the same turn of the event loop, so that what they ask a
server goes there together. Their moment within these seconds is a matter of chance, so that processes that
start together do not keep in step. But it is a tick of the clock, which is that of other processes, too: a
server that several of them ask at once wakes up once for all, and most of what a look costs it is to wake up.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from ratelimit_mw._internal.runtime.event_loop import take_ended
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

logger = logging.getLogger("ratelimit_mw")

TICK = 0.02
"""Seconds between the moments that jobs begin at: 500 processes come by tens, and 5,000 by hundreds."""


class Job(NamedTuple):
    """Something to do every so many seconds."""

    name: str
    seconds: float
    run: Callable[[], Awaitable[object]]
    close: Callable[[], Awaitable[object]] | None = None
    """Called in the end."""
    waits: bool = False
    """Whether it is first done after so many seconds, so that nobody waits for it."""


class Upkeep:
    """Runs each job again and again, from the start on, until it is stopped or its event loop ends."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._running: dict[asyncio.AbstractEventLoop, _Running] = {}
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the jobs to the parent process; each event loop of this one starts its own."""
        leave_to_parent(*self._running.values())
        self._running.clear()

    def start(self) -> None:
        """Start in the running event loop, unless that was done before."""
        loop = asyncio.get_running_loop()
        if loop not in self._running:
            take_ended(self._running)
            self._running[loop] = _Running(self._jobs)

    async def first_run(self, timeout: float) -> None:
        """Wait until each job has run once in this event loop, for at most so many seconds."""
        running = self._running.get(asyncio.get_running_loop())
        if running is not None and running.firsts:
            await asyncio.wait(running.firsts, timeout=timeout)

    async def stop(self) -> None:
        """Stop in the running event loop."""
        running = self._running.pop(asyncio.get_running_loop(), None)
        if running is not None:
            running.cancel()
            await asyncio.gather(*running.tasks, return_exceptions=True)


class _Running:
    """The jobs in one event loop."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        loop = asyncio.get_running_loop()
        self.firsts: list[asyncio.Future[None]] = [loop.create_future() for _ in jobs]
        """Each is done when its job has run once."""
        share = random.random()  # noqa: S311 - spreads the processes
        self.tasks = [
            loop.create_task(_repeat(job, first, share), name=f"ratelimit_mw {job.name}")
            for job, first in zip(jobs, self.firsts, strict=True)
        ]

    def cancel(self) -> None:
        for future in (*self.tasks, *self.firsts):
            future.cancel()


def until_next(seconds: float, share: float) -> float:
    """Seconds until a job is done next: a tenth of its period at least, a period more than that at most."""
    tick, least = round(share * seconds / TICK) * TICK, seconds / 10
    return least + (tick - time.time() - least) % seconds


async def _repeat(job: Job, first: "asyncio.Future[None]", share: float) -> None:
    task = asyncio.current_task()
    failure = ""
    try:
        if job.waits:
            first.set_result(None)
            await asyncio.sleep(job.seconds)
        # redis-py loses a cancellation that meets it at the wrong moment, so that it is asked for here.
        while task is not None and not task.cancelling():
            try:
                await job.run()
            except Exception as error:
                if failure != repr(error):  # said once, not as often as the job is done
                    logger.exception("%s failed", job.name)
                failure = repr(error)
            else:
                failure = ""
            if not first.done():
                first.set_result(None)
            if not task.cancelling():
                await asyncio.sleep(until_next(job.seconds, share))
    finally:
        if job.close is not None:
            await job.close()
