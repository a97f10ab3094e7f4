"""Jobs that the API and its workers share, in a Redis, and a queue of those that wait."""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from redis.asyncio import Redis

from ratelimit_mw import Settings

SETTINGS = Settings.load(Path(__file__).with_name("ratelimit.toml"))
QUEUE = "predictions:queue"
KEPT_SECONDS = 86_400
"""Seconds for which a job can be read after the last news of it."""
TAKE_SECONDS = 1
"""Seconds that a worker waits for a job before it looks whether it is to stop."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prediction. Its token stands for the slot and the price that it holds."""

    id: str
    prompt: str
    token: str
    status: str = "queued"
    output: str = ""


class Jobs:
    """Jobs by id, and the queue."""

    def __init__(self) -> None:
        # Waiting for a job takes longer than an answer may.
        self._redis = Redis.from_url(SETTINGS.backend.url.get_secret_value(), socket_timeout=5 * TAKE_SECONDS)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def add(self, prompt: str, token: str) -> Job:
        """Put a new job into the queue."""
        job = Job(secrets.token_hex(8), prompt, token)
        await self.write(job)
        await self._redis.lpush(QUEUE, job.id)
        return job

    async def read(self, job_id: str) -> Job | None:
        """The job with this id, if there is one."""
        written = await self._redis.get(_key(job_id))
        return Job(**json.loads(written)) if written else None

    async def write(self, job: Job) -> None:
        """Say how far a job is."""
        await self._redis.set(_key(job.id), json.dumps(asdict(job)), ex=KEPT_SECONDS)

    async def take(self, worker: str) -> Job | None:
        """The next job, if one comes soon. It stays in a list of the worker's, in case the worker dies."""
        job_id = await self._redis.blmove(QUEUE, _taken(worker), TAKE_SECONDS, "RIGHT", "LEFT")
        return await self.read(job_id.decode()) if isinstance(job_id, bytes) else None

    async def done(self, worker: str, job: Job) -> None:
        """Take a job off the worker's list."""
        await self._redis.lrem(_taken(worker), 0, job.id)

    async def put_back(self, worker: str) -> None:
        """Queue again what a worker of this name had left when it died."""
        while await self._redis.lmove(_taken(worker), QUEUE, "LEFT", "RIGHT"):
            pass


def _key(job_id: str) -> str:
    return f"predictions:job:{job_id}"


def _taken(worker: str) -> str:
    return f"predictions:taken:{worker}"
