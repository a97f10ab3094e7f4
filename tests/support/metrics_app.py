"""An app whose figures Prometheus scrapes from whichever worker answers."""

import os

from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from ratelimit_mw import Limiter, RateLimitMiddleware
from ratelimit_mw.prometheus import export

limiter = Limiter.from_settings()
export(limiter)


async def tell_pid(request: Request) -> PlainTextResponse:
    """Say which worker this is."""
    return PlainTextResponse(str(os.getpid()))


def all_workers() -> CollectorRegistry:
    """Adds up the figures of all workers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


app = Starlette(routes=[Route("/pid", tell_pid), Mount("/metrics", make_asgi_app(all_workers()))])
app.add_middleware(RateLimitMiddleware, limiter=limiter)
