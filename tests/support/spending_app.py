"""An app whose only handler takes long before it settles, for tests that kill it meanwhile."""

import asyncio
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware
from ratelimit_mw._internal.settings import BackendSettings, SecretURL
from tests.support.asgi import settings_of

TABLES = """
[plans.default]
concurrent = { limit = 2, lease = 1 }
spending = { daily = "1.00" }
[[routes]]
path = "/{rest:path}"
price = "0.10"
"""
BACKEND = BackendSettings(url=SecretURL(os.environ.get("STORE", "memory://")), timeout=5.0)
SETTINGS = settings_of(TABLES).model_copy(update={"backend": BACKEND})


async def work(request: Request) -> Response:
    """Do what takes half a minute, and settle it then."""
    await asyncio.sleep(30)
    await request.state.ratelimit.settle("0.03")
    return PlainTextResponse("done")


app = Starlette(routes=[Route("/work", work)])
app.add_middleware(RateLimitMiddleware, settings=SETTINGS)
