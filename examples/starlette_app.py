"""A job API in Starlette: a slot and a price that outlive their request, and a WebSocket limited by message.

    uvicorn examples.starlette_app:app

Jobs are kept in this process, so run one worker. Where jobs wait in a queue, the token goes with them, and
any other process can resume it.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratelimit_mw import Limiter, RateLimitMiddleware

limiter = Limiter.from_settings(Path(__file__).with_name("starlette_app.toml"))
"""One for the middleware and for the app's own questions."""
jobs: dict[str, str] = {}
"""State of each job: `running`, or its output."""
queue: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()
"""Id, text and lease token of the jobs to come."""


async def create_job(request: Request) -> Response:
    """Answer at once; the job keeps the request's slot and estimate."""
    text = (await request.body()).decode(errors="replace")
    token = await request.state.ratelimit.detach(ttl=600)
    job_id = uuid.uuid4().hex
    jobs[job_id] = "running"
    queue.put_nowait((job_id, text, token))
    return JSONResponse({"id": job_id}, status_code=202)


async def read_job(request: Request) -> Response:
    """Answer with the state of a job."""
    output = jobs.get(request.path_params["id"])
    if output is None:
        raise HTTPException(404)
    return JSONResponse({"id": request.path_params["id"], "output": output})


async def work() -> None:
    """Stands for a worker process: renews each job's slot while it runs, and frees it at the end."""
    while True:
        job_id, text, token = await queue.get()
        async with limiter.resume(token) as lease:
            await asyncio.sleep(1)
            jobs[job_id] = text[::-1]
            await lease.settle("0.01")


async def chat(socket: WebSocket) -> None:
    """Echo, with a limit on messages: the handshake alone was limited by the middleware."""
    await socket.accept()
    api_key = socket.headers.get("x-api-key")
    address = socket.client.host if socket.client else "unknown"
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            message = await socket.receive_text()
            lease = await limiter.acquire(api_key=api_key, address=address, path="/v1/chat/messages")
            await socket.send_text(message[::-1] if lease.allowed else "slow down")


async def health(_request: Request) -> Response:
    """For a balancer; exempt from all limits."""
    return JSONResponse({"status": "ok"})


@contextlib.asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    """Work while the app is up."""
    worker = asyncio.create_task(work())
    yield
    worker.cancel()


app = Starlette(
    routes=[
        Route("/health", health),
        Route("/v1/jobs", create_job, methods=["POST"]),
        Route("/v1/jobs/{id}", read_job),
        WebSocketRoute("/v1/chat", chat),
    ],
    middleware=[Middleware(RateLimitMiddleware, limiter=limiter)],
    lifespan=lifespan,
)
