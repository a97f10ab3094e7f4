"""A prediction API that answers 202 at once; workers do the work.

uvicorn examples.predictions.api:app

A prediction counts as running from its creation until its worker has finished it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.predictions.jobs import SETTINGS, Job, Jobs
from ratelimit_mw import RateLimitMiddleware

MAX_WAIT_SECONDS = 600
"""Seconds that a job may wait for a worker before its slot is free again."""


async def create(request: Request) -> Response:
    """Queue a prediction and hand its slot and price over to whichever worker takes it."""
    prompt = (await request.body()).decode(errors="replace")
    lease = request.state.ratelimit
    token = await lease.detach(ttl=MAX_WAIT_SECONDS)
    job = await request.app.state.jobs.add(prompt, token)
    return _answer(job, 202, Location=f"/v1/predictions/{job.id}")


async def read(request: Request) -> Response:
    """Say how far a prediction is."""
    job = await request.app.state.jobs.read(request.path_params["id"])
    if job is None:
        return JSONResponse({"error": "no such prediction"}, status_code=404)
    return _answer(job, 200)


def _answer(job: Job, status: int, **headers: str) -> Response:
    body = {"id": job.id, "status": job.status, "output": job.output}  # and not the token: it is ours
    return JSONResponse(body, status_code=status, headers=headers)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open and close the queue."""
    app.state.jobs = Jobs()
    yield
    await app.state.jobs.close()


app = Starlette(
    routes=[
        Route("/v1/predictions", create, methods=["POST"]),
        Route("/v1/predictions/{id}", read),
    ],
    lifespan=lifespan,
)
app.add_middleware(RateLimitMiddleware, settings=SETTINGS)
