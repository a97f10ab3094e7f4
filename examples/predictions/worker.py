"""A worker: takes predictions from the queue, one at a time, until it is stopped.

python -m examples.predictions.worker worker-1

Give each worker a name of its own, and the same one again after a crash.
"""

import asyncio
import signal
import sys
from dataclasses import replace
from decimal import Decimal

from examples.predictions.jobs import SETTINGS, Job, Jobs
from ratelimit_mw import Lease, LeaseError, Limiter

PRICE_OF_WORD = Decimal("0.001")
SECONDS_OF_WORD = 0.2


async def predict(prompt: str) -> str:
    """Take the model's time, and turn the words round."""
    words = prompt.split()
    await asyncio.sleep(SECONDS_OF_WORD * len(words))
    return " ".join(reversed(words))


async def run(jobs: Jobs, job: Job, lease: Lease) -> None:
    """Do one job, and settle what it cost in place of the estimate."""
    await jobs.write(replace(job, status="running"))
    output = await predict(job.prompt)
    await lease.settle(PRICE_OF_WORD * len(output.split()))
    await jobs.write(replace(job, status="succeeded", output=output))


async def work(name: str, jobs: Jobs, limiter: Limiter, stopping: asyncio.Event) -> None:
    """Take jobs until it is time to stop; the one at hand is finished first."""
    await jobs.put_back(name)
    while not stopping.is_set():
        job = await jobs.take(name)
        if job is None:
            continue
        try:
            # The slot is renewed meanwhile, and freed at the end, however it ends.
            async with limiter.resume(job.token) as lease:
                await run(jobs, job, lease)
        except LeaseError as error:
            await jobs.write(replace(job, status="failed", output=str(error)))
        await jobs.done(name, job)
        print(f"{name} has done {job.id}", flush=True)


async def main(name: str) -> None:
    """Work until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    jobs = Jobs()
    try:
        async with Limiter.from_settings(SETTINGS) as limiter:
            print(f"{name} is ready", flush=True)
            await work(name, jobs, limiter, stopping)
    finally:
        await jobs.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
