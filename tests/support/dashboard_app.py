"""An app with a dashboard for uvicorn processes: quick and slow answers, and callers with any name."""

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from ratelimit_mw import Identity, RateLimitMiddleware

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>\"'`${window.hacked = 1}",
    "a:\u202egnp.exe\u2066\u200f",
    "<b>" + "x" * 10_000,
    "line\nbreak\x00\x1b[31m",
)
HOSTILE_PLAN = "<svg onload='window.hacked=1'>"


async def quick(request: Request) -> Response:
    """Answer at once."""
    return PlainTextResponse("ok")


async def slow(request: Request) -> Response:
    """Take a second and settle at less than the estimate."""
    await asyncio.sleep(1.0)
    await request.state.ratelimit.settle("0.03")
    return PlainTextResponse("ok")


def hostile(scope: Scope) -> Identity | None:
    """Identify a caller by the hostile name of the number that it sends; nobody else is known."""
    number = dict(scope["headers"]).get(b"x-hostile")
    return (
        None if number is None else Identity(HOSTILE[int(number)], HOSTILE_PLAN, account=HOSTILE[int(number)])
    )


def create(identify: bool = False) -> Starlette:
    """The app behind the middleware."""
    served = Starlette(routes=[Route("/slow", slow), Route("/{rest:path}", quick)])
    served.add_middleware(RateLimitMiddleware, identify=hostile if identify else None)
    return served


app = create()
hostile_app = create(identify=True)
