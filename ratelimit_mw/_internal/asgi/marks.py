"""Marks that put limits in code on routes: a decorator that wraps nothing, and a dependency of FastAPI's."""

import inspect
from collections.abc import Awaitable, Iterator
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar, overload
from weakref import WeakSet

from ratelimit_mw._internal.policy.code_limits import KeyedLimit, Limit, rates_of

T = TypeVar("T")

MARK = "__ratelimit_limits__"
"""Attribute of an endpoint with its marks."""
MAX_WRAPPERS = 50
"""Decorators around an endpoint beyond which no marks are looked for."""

_numbers = count(1)


class MarkReader(Protocol):
    """Middleware that has read the marks of its app's routes."""

    def forget_marks(self) -> None:
        """Read them anew, since another mark was made."""


readers: "WeakSet[MarkReader]" = WeakSet()
"""Every middleware of this process."""


async def _nothing() -> None:
    """Do nothing: the limits were decided about before the app was called."""


class Mark:
    """Limits for routes. See `limited`."""

    made: int = 0
    """Number of marks that this process has made."""

    __signature__: inspect.Signature = inspect.Signature()
    """Parameters of the dependency, for FastAPI: there are none."""

    def __init__(self, limits: tuple[Limit | str, ...]) -> None:
        self.limits = limits
        """Limits, and rates of which each route makes a limit of its own."""
        Mark.made = next(_numbers)
        for reader in list(readers):
            reader.forget_marks()
        # FastAPI looks here to see that the dependency need not be run in a thread.
        self.__dict__["__call__"] = _nothing

    @overload
    def __call__(self) -> Awaitable[None]: ...

    @overload
    def __call__(self, endpoint: T) -> T: ...

    def __call__(self, endpoint: T | None = None) -> T | Awaitable[None]:
        """Mark an endpoint and return it as it is. Without one, do nothing, as a dependency."""
        if endpoint is None:
            return _nothing()
        try:
            setattr(endpoint, MARK, (*getattr(endpoint, MARK, ()), self))
        except (AttributeError, TypeError):
            raise TypeError(f"{endpoint!r} can't be marked with limits: mark the function itself") from None
        return endpoint

    def __repr__(self) -> str:
        return f"limited({', '.join(map(repr, self.limits))})"


def limited(*limits: Limit | str) -> Mark:
    """Put limits on a route, or on all routes of a router or an app.

        @app.post("/login")
        @limited(login_address)
        async def login(form: Login) -> Token: ...

        router = APIRouter(dependencies=[Depends(limited("10/minute"))])

    The decorator marks an endpoint and wraps nothing. `RateLimitMiddleware` finds the marks on the app's
    routes and decides about these limits together with all others, before the app is called. A rate such as
    "10/minute" stands for a limit of each caller that is named by the route's methods and path. Raises
    ValueError for what is neither a limit nor a rate.
    """
    if not limits:
        raise ValueError("limited() needs a Limit or a rate, such as '10/minute'")
    for limit in limits:
        if isinstance(limit, str):
            rates_of(limit, "requests", "limited")
        else:
            _check_limit(limit)
    return Mark(limits)


def _check_limit(limit: object) -> None:
    if not isinstance(limit, Limit):
        hint = (
            "; charge a limit with its key in the handler: await request.state.ratelimit.charge(...)"
            if isinstance(limit, KeyedLimit)
            else ""
        )
        raise ValueError(f"limited() takes a Limit or a rate such as '10/minute', not {limit!r:.80}{hint}")


def marks_of(route: Any) -> tuple[Mark, ...]:
    """The marks of a route: on its endpoint, and among its dependencies; each once."""
    found = [*marks_on(getattr(route, "endpoint", None)), *_among(getattr(route, "dependant", None))]
    return tuple(dict.fromkeys(found))


def marks_on(endpoint: Any) -> tuple[Mark, ...]:
    """Return the marks of an endpoint, or of what its decorators have wrapped."""
    for _ in range(MAX_WRAPPERS):
        marks = getattr(endpoint, MARK, None)
        if isinstance(marks, tuple):
            return tuple([mark for mark in marks if isinstance(mark, Mark)])
        endpoint = endpoint.func if isinstance(endpoint, partial) else getattr(endpoint, "__wrapped__", None)
    return ()


def _among(dependant: Any) -> Iterator[Mark]:
    """The marks among FastAPI's dependencies of a route, and of those themselves."""
    for dependency in getattr(dependant, "dependencies", None) or ():
        call = getattr(dependency, "call", None)
        if isinstance(call, Mark):
            yield call
        yield from _among(dependency)
