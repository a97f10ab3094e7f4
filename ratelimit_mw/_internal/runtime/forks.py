"""Renewal of objects that a process must not share with the one that it was forked from.

A server may make the limiter, and use it, before it forks its workers (`gunicorn --preload`). A worker has
none of its parent's threads, so that nobody ever does their work or releases their locks. The event loops and
connections that it finds are its parent's, and so are the counts until then.
"""

import os
from typing import Any, Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Something that lives on in a process that is forked off."""

    def after_fork(self) -> None:
        """Begin anew, in the process that was forked off, before anything else happens there."""


_all: WeakSet[Any] = WeakSet()
_inherited: list[object] = []


def renew_after_fork(owner: Forked) -> None:
    """Have `owner.after_fork` called in each process that is forked off, as long as `owner` exists."""
    _all.add(owner)


def leave_to_parent(*inherited: object) -> None:
    """Keep what belongs to the parent process from being cleaned up here.

    A task or a connection that is dropped ends itself through its event loop, and the system's part of that
    loop is the parent's, too.
    """
    _inherited.extend(inherited)


def _renew() -> None:
    for owner in list(_all):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
