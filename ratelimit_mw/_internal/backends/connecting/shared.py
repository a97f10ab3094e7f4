"""Short commands over the connection that requests wait for, so that an idle worker has no other.

They are sent as they come, since a server does one command after the other whatever connection each came
over. They say nothing of whether the server is there: requests alone tell.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis

from ratelimit_mw._internal.backends.connecting.connection import Connection, Reply
from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.model.backend import BackendError

_pack: Callable[[Any], bytes] = hiredis.pack_command
_ELSEWHERE = ("MOVED", "ASK ", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "LOADING", "MASTERDOWN")
"""Beginnings of errors by which a server has done nothing, and another may."""


class SharedConnection:
    """Asks over the connection of the running event loop, where there is one that answers."""

    def __init__(self, find: Callable[[], Awaitable[Connection | None]], timeout: float) -> None:
        """`find` returns the connection, None where there is none; an answer may take `timeout` seconds."""
        self._find = find
        self._timeout = timeout

    async def ask(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Reply | ReplyError] | None:
        """Send commands together; their answers, or None where they have to be asked over another connection.

        Raises `BackendError` where an answer is lost or late.
        """
        connection = await self._find()
        if connection is None or connection.is_stuck:
            return None
        packed = b"".join([_pack(tuple(each)) for each in commands])
        try:
            async with asyncio.timeout(self._timeout):
                answers = await connection.ask(packed, len(commands))
        except TimeoutError:
            connection.is_stuck = True  # until it answers: others are asked over a connection of their own
            raise BackendError("no answer in time") from None
        if any([isinstance(each, Exception) and str(each).startswith(_ELSEWHERE) for each in answers]):
            return None
        return [ReplyError(str(each)) if isinstance(each, Exception) else each for each in answers]
