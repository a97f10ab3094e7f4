"""Keys that a limit in code counts by: a caller, an address, everyone, a part of the path, a header.

    Limit("uploads", "10/minute", by=by.path("project_id"))

A function of the app's own takes their place: it is called with the ASGI scope and the caller's `Identity`,
may be async, and returns text, bytes, a whole number or a UUID; None where the limit doesn't apply.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

from ratelimit_mw._internal.policy.identity import Identity

__all__ = ["address", "caller", "everyone", "header", "path"]

Key = str | bytes | int | UUID
"""A value that a limit counts by, such as an e-mail address."""
KeyFunction = Callable[[MutableMapping[str, Any], Identity], "Key | Awaitable[Key | None] | None"]
"""A function of scope and identity that returns a key; None: the limit doesn't apply."""


class Whose(Enum):
    """Keys that need no look into the request."""

    CALLER = "caller"
    ADDRESS = "address"
    EVERYONE = "everyone"


@dataclass(frozen=True, slots=True)
class PathPart:
    """Value of a parameter in the path of the app's own route."""

    name: str


@dataclass(frozen=True, slots=True)
class HeaderValue:
    """First value of a header."""

    name: str


By = Whose | PathPart | HeaderValue | KeyFunction
"""Everything that a limit may count by."""

caller: Whose = Whose.CALLER
"""Each caller has a count of its own, as with the limits of its plan."""
address: Whose = Whose.ADDRESS
"""Each client address has a count of its own, with an API key or without."""
everyone: Whose = Whose.EVERYONE
"""All callers have one count together."""


def path(name: str) -> PathPart:
    """Count by a parameter of the route's path, such as `id` of `/projects/{id}`, as it is written there."""
    return PathPart(_named(name, "a path parameter"))


def header(name: str) -> HeaderValue:
    """Count by the first value of a header. The limit doesn't apply to a request without the header."""
    return HeaderValue(_named(name, "a header").lower())


def _named(name: object, what: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"the name of {what} must be text, not {name!r:.40}")
    return name
