"""Operations of the script `lua/batch.lua`, as they are queued and answered."""

import asyncio
from asyncio import InvalidStateError
from collections.abc import Callable, Collection, Generator
from typing import Any

from ratelimit_mw._internal.backends.redis.letters import DONE
from ratelimit_mw._internal.model.backend import BackendError


def bulk(data: bytes) -> bytes:
    """`data` as one argument of a command in the Redis protocol."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def done(answer: bytes) -> bytes:
    """Read the answer of an operation that says no more than that it was done."""
    if answer != DONE:
        raise ValueError(f"{answer!r} does not say that the operation was done")
    return answer


NEVER = 0
"""Not sent again: it fails where the server goes away."""
IF_UNDONE = 1
"""Sent again if it was surely not done: done twice, it would change what others have counted."""
ALWAYS = 2
"""Sent again until it is answered: done twice, it changes no more than done once."""


class Template:
    """All of an operation but its id: its keys, as arguments in the Redis protocol, and its packed body.

    Operations of one template in a batch are sent as one, which the script decides as if each were its own;
    not where each has a record, a key of its own that is named by its id.
    """

    __slots__ = (
        "_body",
        "charges",
        "command",
        "head",
        "is_apart",
        "keys",
        "n_keys",
        "overwrites",
        "record",
        "slot",
        "tag",
        "unpack",
    )

    def __init__(  # noqa: PLR0913 - a value
        self,
        keys: bytes,
        n_keys: int,
        body: bytes,
        id_size: int = 0,
        unpack: Callable[[bytes], Any] = done,
        *,
        head: bytes | None = None,
        record: bytes = b"",
    ) -> None:
        """`unpack` makes of an answer what it says, and raises for one that it cannot be. `head` is that of
        another template with this body, to share it.
        """
        self.keys = keys
        self.n_keys = n_keys
        self.unpack = unpack
        self.head = head or b"$%d\r\n%b" % (len(body) + id_size, body)
        """The body as an argument of one operation, up to its id."""
        self._body = body
        self.record = record
        """The argument of an operation's record up to the id, the last of its keys; empty for none."""
        self.tag: bytes | None = None
        """Hash tag of the keys, and their hash slot, once the router of a cluster has looked for them."""
        self.slot = 0
        self.charges: str | None = None
        """The one partition whose windows and slots it charges, "" for none; None for any other."""
        self.command = b""
        """A command's name and first arguments that does the same, followed by the ids; empty for none.

        It has to be exact: done whole or not at all, in a batch and out of it, and answered by a number.
        """
        self.is_apart = False
        """Whether it is never a part of a call of the main script."""
        self.overwrites = False
        """Puts a value in place of another. Executed late, it would undo what came after it."""

    def several(self, ids: Collection[bytes]) -> bytes:
        """The argument that stands for an operation of each id."""
        return bulk(b"".join((self._body, *ids)))

    def read(self, answer: bytes, number: int) -> Any:
        """Read the script's answer to so many operations; raises for an answer that can't be one."""
        return self.unpack(answer)

    def call_apart(self, operations: "list[Operation]", by_digest: bool) -> bytes:
        """The call that does these operations without the main script, in the Redis protocol.

        Here it is the command. Ids are of one length.
        """
        size = b"\r\n$%d\r\n" % len(operations[0].id)
        ids = size.join([each.id for each in operations])
        return b"".join((b"*%d\r\n" % (2 + len(operations)), self.command, size[2:], ids, b"\r\n"))

    def take_reply(self, operations: "list[Operation]", reply: Any) -> "list[Operation]":
        """Tell operations what came of them by the reply to that; those which the main script has to do.

        Raises ValueError for a reply that can't be one.
        """
        if reply.__class__ is not int:
            raise ValueError(f"{reply!r} instead of a number")
        self.deliver(operations, 0, DONE)
        return []

    def deliver(self, operations: "list[Operation]", now: int, answer: Any) -> None:
        """Hand an answer that was read to operations of this template; `now` is the server's time."""
        for operation in operations:
            operation.answer(answer)


class Operation:
    """One operation of a batch: a template and an id, empty where the template leaves none open.

    Awaiting it waits for its answer, or raises a `BackendError`. Where nobody does, there is no future.
    """

    __slots__ = (
        "future",
        "id",
        "is_asking",
        "is_upkeep",
        "listener",
        "resend",
        "result",
        "since",
        "template",
        "tries",
    )

    def __init__(self, template: Template, own_id: bytes = b"", resend: int = NEVER) -> None:
        self.template = template
        self.id = own_id
        self.resend = resend
        """Whether it is sent again when the server is back: `NEVER`, `IF_UNDONE` or `ALWAYS`."""
        self.is_upkeep = False
        """Not waited for by a request: it leaves when requests leave room, and may wait longer than they."""
        self.is_asking = False
        """Sent after ASKING: its keys are moving to this node of a cluster."""
        self.tries = 0
        """Number of times that it was sent again: to another node of a cluster, or with other periods."""
        self.since = 0.0
        """Time of its submission, by the event loop's clock."""
        self.future: asyncio.Future[Any] | None = None
        self.result: Any = None
        """Answer or error, where nobody waited."""
        self.listener: Callable[[Any], object] | None = None
        """Is called with it, where nobody waits; see `tell`."""

    def __await__(self) -> Generator[Any, None, Any]:
        future = self.future
        if future is None:
            future = self.future = asyncio.get_running_loop().create_future()
            if isinstance(self.result, BackendError):
                future.set_exception(self.result)
            elif self.result is not None:
                future.set_result(self.result)
        return future.__await__()

    def tell(self, listener: Callable[[Any], object]) -> None:
        """Call `listener` with the answer, or with the error in its place, once that is there.

        In place of awaiting it. The listener must not raise.
        """
        if self.result is None:
            self.listener = listener
        else:
            listener(self.result)

    @property
    def is_over(self) -> bool:
        """Whether it was answered, has failed, or nobody waits for it any more."""
        return self.result is not None if self.future is None else self.future.done()

    @property
    def is_answered(self) -> bool:
        """Whether somebody was told its answer."""
        if self.future is None:
            return self.result is not None and not isinstance(self.result, BackendError)
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None

    def answer(self, answer: Any) -> None:
        """Deliver the result to whoever waits."""
        if self.future is None:
            self.result = answer
            self._tell()
            return
        try:
            self.future.set_result(answer)
        except InvalidStateError:
            self.orphaned(answer)

    def fail(self, error: BackendError) -> None:
        """Deliver an error in place of the result."""
        if self.future is None:
            self.result = self.result or error
            self._tell()
        elif not self.future.done():
            self.future.set_exception(error)

    def lose_answer(self) -> None:
        """Take in that it may have been done, since its answer was lost."""

    def leave_to_script(self) -> None:
        """Be a part of calls of the main script from now on."""

    def orphaned(self, answer: Any) -> None:
        """Undo what was done though nobody waits any more; `answer` is None where it is lost."""

    def forget_loop(self) -> None:
        """Forget who waits for it: the event loop that they were in has ended."""
        self.future = self.listener = None

    def _tell(self) -> None:
        listener = self.listener
        if listener is not None:
            self.listener = None
            listener(self.result)


def nothing_to_do() -> Operation:
    """Return an operation that is over: nothing was to be sent."""
    operation = Operation(Template(b"", 0, b""))
    operation.answer(b"")
    return operation


def probe_of(key: bytes) -> Operation:
    """A small write that changes nothing: the deletion of a key that is never written."""
    return Operation(Template(bulk(key), 1, b"D\x01"))


def take(queue: list[Operation], most: int) -> list[Operation]:
    """Up to so many operations from the front of a queue, without those that are over."""
    batch: list[Operation] = []
    taken = 0
    for operation in queue:
        if len(batch) == most:
            break
        taken += 1
        if operation.resend or not operation.is_over:
            batch.append(operation)
    del queue[:taken]
    return batch
