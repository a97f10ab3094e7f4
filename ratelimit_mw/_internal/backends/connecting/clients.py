"""A client for each event loop: connections belong to the loop that opened them."""

import asyncio
from typing import TYPE_CHECKING

from ratelimit_mw._internal.runtime.event_loop import take_ended
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from ratelimit_mw._internal.backends.connecting.client import Client  # which redis-py comes with


class Clients:
    """Makes a client when an event loop first asks for one."""

    def __init__(self, new_client: "Callable[[], Client]") -> None:
        self._new_client = new_client
        self._clients: dict[asyncio.AbstractEventLoop, Client] = {}
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the parent process its connections."""
        for client in self._clients.values():
            client.leave_to_parent()
        leave_to_parent(*self._clients.values())
        self._clients.clear()

    def get(self) -> "Client":
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            take_ended(self._clients)
            client = self._clients[loop] = self._new_client()
        return client

    async def close(self) -> None:
        """Close the connection of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()
