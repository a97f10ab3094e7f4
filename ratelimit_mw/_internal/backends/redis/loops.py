"""Connections of a backend to its server, in each event loop that uses it, and what ended loops have left.

Connections and futures belong to one event loop. Where a loop ends, the others go on with what it owed.
"""

import asyncio
import logging
import threading
from asyncio import Future, get_running_loop
from collections.abc import Callable
from functools import reduce
from typing import Protocol

from ratelimit_mw._internal.backends.connecting.connection import Connection, end_of_watches
from ratelimit_mw._internal.backends.connecting.loop_end import LoopEnd
from ratelimit_mw._internal.backends.redis.lines import Lines, OrderedOperation
from ratelimit_mw._internal.backends.redis.operations import Operation
from ratelimit_mw._internal.model.backend import BackendError, Load
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork
from ratelimit_mw._internal.runtime.process_end import tell_at_process_end

logger = logging.getLogger("ratelimit_mw")

CLOSE_TIMEOUT = 2.0
"""Seconds that closing waits for what is still owed to the server."""

UNDO_SHARE = 0.25
"""Share of that time for giving back charges whose answers were lost, though the server may have them."""


class OperationSender(Protocol):
    """Receiver of operations: the batcher of one server, or the router before those of several."""

    @property
    def error(self) -> BackendError | None:
        """Error that marks the server as away; None while the server is there or was not asked yet."""

    @property
    def load(self) -> Load:
        """Load of this sender: operations carried, and operations that wait."""

    def submit(self, operation: Operation) -> None:
        """Queue an operation; it gets an answer, or a `BackendError`."""

    async def connect(self) -> None:
        """Connect and wait for it, as long as an operation would."""

    async def connection_to(self, key: bytes) -> Connection | None:
        """The connection to the server that has a key; None where that is away."""

    async def drain(self, timeout: float) -> int:
        """Wait until everything queued has been answered; how much was left after `timeout` seconds."""

    def undo_doubtful(self) -> None:
        """Undo now what may have been done and whose answer was lost, though it may still be on its way."""

    def close(self) -> None:
        """Close; whoever still waits gets a `BackendError`."""

    def bequeath(self) -> list[Operation]:
        """Hand out what is owed, in its order, and what was sent and may have to be undone."""

    def leave_to_parent(self) -> None:
        """Give up the connections in a process that was forked off."""


class LoopSenders:
    """The senders of one backend: one for each event loop that uses it."""

    def __init__(self, new_sender: Callable[[], OperationSender], timeout: float) -> None:
        """`new_sender` makes one for the running event loop; `timeout` is in seconds, for an operation."""
        self._new_sender = new_sender
        self._timeout = timeout
        self.senders: dict[asyncio.AbstractEventLoop, OperationSender] = {}
        self._ends: dict[asyncio.AbstractEventLoop, LoopEnd] = {}
        self._lines: dict[asyncio.AbstractEventLoop, Lines] = {}
        self._past = Load()
        self._was_away = False
        """Whether the latest of the event loops that have ended thought so."""
        self._left: list[Operation] = []
        """Operations left by event loops that have ended: owed to the server, or perhaps to be undone."""
        self._lock = threading.Lock()  # of what ends with an event loop: several may, and others look for it
        renew_after_fork(self)
        tell_at_process_end(self)

    @property
    def error(self) -> BackendError | None:
        """Error that marks the server as away; None while the server is there or was not asked yet."""
        return self.sender().error

    @property
    def load(self) -> Load:
        """Load of the connections of all event loops: operations carried, and operations that wait."""
        waiting = Load(owed=sum([each.waiting for each in list(self._lines.values())]))
        return reduce(
            Load.plus, [each.load for each in list(self.senders.values())], self._past.plus(waiting)
        )

    @property
    def is_away(self) -> bool:
        """Whether any event loop that runs in this process thinks so; where none does, the latest of all."""
        for each in list(self.senders.values()):
            if each.error is not None:
                break
        else:  # nearly always, and soon found
            return self._was_away and not self.senders
        senders = list(self.senders.items())
        running = [each for loop, each in senders if loop.is_running()]
        asked = running or [each for _, each in senders[-1:]]
        return any([each.error is not None for each in asked]) if asked else self._was_away

    async def open(self) -> None:
        """Connect ahead of the first request. A server that is away is not an error: it is tried again."""
        await self.sender().connect()

    async def connection_to(self, key: bytes) -> Connection | None:
        """The running loop's connection to the server that has a key; None where there is none to use."""
        sender = self.senders.get(get_running_loop())
        return None if sender is None else await sender.connection_to(key)

    async def close(self) -> None:
        """Send what is owed, for a bounded time, and close; the backend may be used again."""
        loop = asyncio.get_running_loop()
        end = self._ends.pop(loop, None)
        if end is not None:
            await end.cancel()
        others = [each for each in list(self.senders) if each is not loop]
        await self._leave(loop, CLOSE_TIMEOUT, bequeaths=any([each.is_running() for each in others]))

    async def _close_with_loop(self) -> None:
        """Close where nobody did it before the loop ends; a server that is away is not waited for."""
        loop = asyncio.get_running_loop()
        sender = self.senders.get(loop)
        is_away = sender is not None and sender.error is not None
        await self._leave(loop, 0.0 if is_away else CLOSE_TIMEOUT, bequeaths=True)
        cancelled = [task for task in asyncio.all_tasks() if task.cancelling()]
        if cancelled:  # an attempt to connect, which has a socket to close: nobody else waits for it now
            await asyncio.wait(cancelled, timeout=self._timeout)

    async def _leave(self, loop: asyncio.AbstractEventLoop, timeout: float, *, bequeaths: bool) -> None:
        """Close the connection of an event loop; other loops go on with what it `bequeaths`."""
        sender, lines = self.senders.get(loop), self._lines.get(loop)
        if sender is None:
            return
        deadline = loop.time() + timeout
        if timeout:
            self.take_over()
        await _drain(sender, lines, deadline - UNDO_SHARE * timeout)
        sender.undo_doubtful()  # a charge that reaches the server even later lasts for one lease at most
        await _drain(sender, lines, deadline)
        with self._lock:
            if bequeaths:
                self._inherit(sender, lines)
            if lines is not None:
                lines.close()
            self._forget(loop)
        sender.close()
        await end_of_watches()
        await asyncio.sleep(0)  # in which the transport goes

    def take_over(self) -> None:
        """Send what event loops that have ended owed to the server, and undo what they left half done."""
        for operation in self._take_left():
            operation.forget_loop()
            if isinstance(operation, OrderedOperation):
                self._running_lines().submit(operation)
            elif operation.resend:
                self.submit(operation)
            else:
                operation.orphaned(None)

    def _take_left(self) -> list[Operation]:
        with self._lock:
            for closed in [each for each in list(self.senders) if each.is_closed()]:
                self._inherit(self.senders[closed], self._lines.get(closed))
                self._forget(closed)
            left, self._left = self._left, []
        return left

    def at_process_end(self) -> None:
        """Tell what event loops that have ended owed to the server: no other loop has gone on with it."""
        lost = len([each for each in self._take_left() if each.resend])
        if lost:
            logger.error("%d releases and settles never reached the backend: the process ended", lost)

    def _inherit(self, sender: OperationSender, lines: Lines | None) -> None:
        self._left += sender.bequeath()
        if lines is not None:
            self._left += lines.bequeath()

    def after_fork(self) -> None:
        """Leave connections, and what is owed over them, to the parent process."""
        for sender in self.senders.values():
            sender.leave_to_parent()
        leave_to_parent(*self.senders.values(), *self._lines.values(), *self._left)
        self._lock = threading.Lock()
        self.senders.clear()
        self._left = []
        self._ends.clear()
        self._lines.clear()
        self._past = Load()
        self._was_away = False

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Keep only the figures of an event loop's sender."""
        sender = self.senders.pop(loop, None)
        self._ends.pop(loop, None)
        self._lines.pop(loop, None)
        if sender is not None:
            self._was_away = sender.error is not None
            self._past = self._past.plus(sender.load._replace(owed=0))

    def submit(self, operation: Operation, *, is_awaited: bool = False) -> Operation:
        """Send an operation; it is under way when this returns, whether anybody awaits it or not.

        One that surely `is_awaited` gets its future here.
        """
        loop = get_running_loop()  # once: up to Python 3.11 it is a system call
        if is_awaited:
            # Made as uvloop makes one, for half of what its own way costs.
            operation.future = Future(loop=loop)
        sender = self.senders.get(loop)
        if sender is None:
            sender = self.sender()
        sender.submit(operation)
        return operation

    def submit_in_line(self, operation: OrderedOperation) -> OrderedOperation:
        """Send an operation on money or units until it arrives, after those before it in its line."""
        self._running_lines().submit(operation)
        return operation

    def _running_lines(self) -> Lines:
        """The running loop's own."""
        loop = asyncio.get_running_loop()
        lines = self._lines.get(loop)
        if lines is None:
            lines = self._lines[loop] = Lines(self.sender().submit)
        return lines

    def sender(self) -> OperationSender:
        """The running loop's own: connections and futures belong to one loop."""
        loop = asyncio.get_running_loop()
        sender = self.senders.get(loop)
        if sender is None:
            self._ends[loop] = LoopEnd(self._close_with_loop)
            sender = self.senders[loop] = self._new_sender()
            self.take_over()
        return sender


async def _drain(sender: OperationSender, lines: Lines | None, deadline: float) -> None:
    """Wait until all that is owed has been answered, until `deadline` at most."""
    now = get_running_loop().time
    if lines is not None:
        await lines.drain(deadline - now())
    await sender.drain(deadline - now())
