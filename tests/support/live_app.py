"""An app whose answers say which worker gave them, and by which settings."""

import asyncio
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware


async def say(request: Request) -> Response:
    """The worker, the settings in force and the limit of the caller, after as many seconds as asked for."""
    await asyncio.sleep(float(request.query_params.get("seconds", "0")))
    return JSONResponse({"worker": os.getpid(), "version": app.limiter.version})


app = RateLimitMiddleware(Starlette(routes=[Route("/{rest:path}", say, methods=["GET", "POST"])]))
