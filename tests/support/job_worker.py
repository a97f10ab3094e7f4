"""A job's worker, a process of its own: `python -m tests.support.job_worker SETTINGS VERB TOKEN [ARGUMENT]`.

Prints what came of it. `resume` says so and then works for ARGUMENT seconds.
"""

import asyncio
import sys

from ratelimit_mw import LeaseError, Limiter


async def main(settings: str, verb: str, token: str, argument: str = "") -> str:
    """Do what is asked to the lease of a token."""
    async with Limiter.from_settings(settings) as limiter:
        try:
            if verb == "resume":
                async with limiter.resume(token) as job:
                    print("lost" if job.is_lost else "resumed", flush=True)  # noqa: T201
                    await asyncio.sleep(float(argument))
                    return "lost" if job.is_lost else "done"
            if verb == "settle":
                await limiter.settle(token, argument)
            if verb == "renew":
                return str(await limiter.renew(token))
            if verb == "release":
                await limiter.release(token)
        except LeaseError as error:
            return f"LeaseError: {error}"
    return "done"


if __name__ == "__main__":
    print(asyncio.run(main(*sys.argv[1:])))  # noqa: T201
