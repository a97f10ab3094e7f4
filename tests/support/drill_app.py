"""The app that drills run under uvicorn: it says who decided, and settles what it sells."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ratelimit_mw import RateLimitMiddleware


async def ok(request: Request) -> PlainTextResponse:
    """Say which policy decided."""
    lease = request.state.ratelimit
    return PlainTextResponse("ok", headers={"x-decided-by": lease.decision.policy})


async def paid(request: Request) -> PlainTextResponse:
    """Sell something for a cent."""
    await request.state.ratelimit.settle("0.01")
    return await ok(request)


app = Starlette(routes=[Route("/", ok), Route("/paid", paid)])
app.add_middleware(RateLimitMiddleware)
