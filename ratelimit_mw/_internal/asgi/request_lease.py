"""Access to the lease of a request, with its type."""

from starlette.requests import HTTPConnection

from ratelimit_mw._internal.lease.lease import Lease


def get_lease(request: HTTPConnection) -> Lease:
    """Return the lease of a request: `request.state.ratelimit`, typed.

    `request` is a `Request` or a `WebSocket` of Starlette or FastAPI. The function works as a dependency of
    FastAPI, too: `lease: Annotated[Lease, Depends(get_lease)]`. Raises LookupError where no
    `RateLimitMiddleware` has let this request through.
    """
    lease = (request.scope.get("state") or {}).get("ratelimit")
    if not isinstance(lease, Lease):
        raise LookupError("this request has no lease: RateLimitMiddleware is not mounted around this handler")
    return lease
