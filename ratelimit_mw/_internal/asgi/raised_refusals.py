"""Answers to refusals that are raised inside the app, and bodies of refusals that are the app's own."""

import logging
from collections.abc import Awaitable, Callable

from starlette.responses import Response as OwnResponse
from starlette.types import Scope, Send

from ratelimit_mw._internal.asgi.answers import TRY_AGAIN_LATER
from ratelimit_mw._internal.asgi.hook_errors import HookError, ask
from ratelimit_mw._internal.policy.decision import Decision
from ratelimit_mw._internal.responses.refusals import Response

logger = logging.getLogger("ratelimit_mw")

RefusalHook = Callable[[Scope, Decision], OwnResponse | Awaitable[OwnResponse | None] | None]
"""A hook that returns a response whose body takes the place of a refusal's; None: the standard body."""

_BODY_HEADERS = (b"content-type", b"content-length")


async def close_accepted(send: Send) -> None:
    """Close a WebSocket that was accepted before a limit refused it."""
    await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": "Rate limit exceeded"})


async def with_own_body(hook: RefusalHook, scope: Scope, decision: Decision, standard: Response) -> Response:
    """Put the body that the app's `refusal=` hook returns in place of the standard one.

    Status and headers stay, but for those that describe the body. A hook that fails changes nothing.
    """
    try:
        own = await ask(hook, scope, decision)
    except HookError:
        logger.exception("refusal= failed; the standard body is sent")
        return standard
    if own is None:
        return standard
    if not isinstance(own, OwnResponse) or not isinstance(getattr(own, "body", None), bytes):
        logger.warning(
            "refusal= returned %.200r, which is not a response with a body; the standard body is sent", own
        )
        return standard
    headers = [header for header in standard.headers if header[0] not in _BODY_HEADERS]
    names = {name for name, _ in headers}
    described = [header for header in own.raw_headers if header[0].lower() not in names]
    return Response(standard.status, [*described, *headers], bytes(own.body))
