"""Answers to exceptions of the app's hooks, made by the app's own exception handlers.

The middleware stands outside of the app's exception handlers. Without this module, an exception of a hook
would pass them by, and an `HTTPException` of Starlette or FastAPI would become a 500.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from types import NoneType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_mw._internal.policy.identity import Identity

MAX_LAYERS = 50
"""Wrappers around an app beyond which no handlers are looked for."""
POLICY_VIOLATION = 1008
"""Code of a WebSocket that is closed because of who asks for it."""


_COMMON = (NoneType, Identity, str, int, Decimal, dict)
"""Types of the answers of hooks that are plain functions."""


class HookError(Exception):
    """A hook of the app raised its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def ask(hook: Callable[..., Any], *about: object) -> Any:
    """Call a hook, sync or async, and return its answer. Raises `HookError` if the hook raises."""
    try:
        answer = hook(*about)
    except Exception as error:
        raise HookError(error) from error
    return await awaited(answer)


def may_be_awaitable(answer: object) -> bool:
    """Whether what a hook returned has to be awaited, or to be looked at again: false for common answers."""
    return not isinstance(answer, _COMMON)


async def awaited(answer: Any) -> Any:
    """Return the answer of a hook, awaited if need be. Raises `HookError` if the hook raises."""
    if not inspect.isawaitable(answer):
        return answer
    try:
        return await answer
    except Exception as error:
        raise HookError(error) from error


async def answer_as(app: ASGIApp, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what a hook raised by the handlers of `app`; raise it where that has none for it."""

    async def fail(*_: object) -> None:
        raise error

    if scope["type"] == "websocket" and isinstance(error, HTTPException):
        await receive()  # the handshake, which a server wants to be asked for first
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
            return
    owner, handlers = _handlers(app, scope)
    # Of a copy, in which Starlette keeps the handlers; they may ask for the app.
    own = {**scope, "app": owner} if owner is not None else {**scope}
    is_answered = False

    async def answer(message: Message) -> None:
        nonlocal is_answered
        is_answered = True
        await send(message)

    await ExceptionMiddleware(fail, handlers)(own, receive, answer)
    if (
        scope["type"] == "websocket" and not is_answered
    ):  # by a Starlette that sends no response to a handshake
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})


def _handlers(app: ASGIApp, scope: Scope) -> tuple[Any, Mapping[Any, Any]]:
    """The app that has handlers of exceptions, and those of them that don't belong to its outermost layer."""
    for candidate in (scope.get("app"), *_inside(app)):
        handlers = getattr(candidate, "exception_handlers", None)
        if isinstance(handlers, Mapping):
            return candidate, {
                what: handler for what, handler in handlers.items() if what not in (500, Exception)
            }
    return scope.get("app"), {}


def _inside(app: Any) -> Iterator[Any]:
    for _ in range(MAX_LAYERS):
        if app is None:
            return
        yield app
        app = getattr(app, "app", None)
