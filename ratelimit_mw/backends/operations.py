"""Operations of the script `batch.lua`, as they are queued, put together and answered."""

import asyncio
from collections.abc import Callable, Collection, Generator, Iterable
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

from ratelimit_mw.charge import BackendError, Load
from ratelimit_mw.compiled import core

_FAILED = b"E"


def bulk(data: bytes) -> bytes:
    """`data` as one argument of a command in the Redis protocol."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


class Sender(Protocol):
    """What operations are handed to: the batcher of a server, or what stands before those of several."""

    @property
    def error(self) -> BackendError | None:
        """Why the server is thought to be away; None while it is there or was not asked yet."""

    @property
    def load(self) -> Load:
        """What it has carried, and what waits."""

    def submit(self, operation: "Operation") -> None:
        """Queue an operation; it gets an `Answer`, or a `BackendError`."""

    async def connect(self) -> None:
        """Connect and wait for it, as long as an operation would."""

    async def drain(self, timeout: float) -> int:
        """Wait until everything queued has been answered; how much was left after `timeout` seconds."""

    def close(self) -> None:
        """Close; whoever still waits gets a `BackendError`."""


Orphaned = Callable[[Any, int, bytes | None], None]
Answer = tuple[int, Any]
"""The server's time and what the script says of one operation, as its template reads it."""


class Template:
    """All of an operation but its id: its keys, as arguments in the Redis protocol, and its packed body.

    Operations of one template in a batch are sent as one, which the script decides as if each were its own.
    """

    __slots__ = ("_body", "charges", "head", "keys", "n_keys", "steps", "unpack")

    def __init__(
        self,
        keys: bytes,
        n_keys: int,
        body: bytes,
        id_size: int = 0,
        unpack: Callable[[bytes], Any] = bytes,
        head: bytes | None = None,
    ) -> None:
        """`unpack` makes of an answer what it says; without one it is handed on as it came. `head` is that of
        another template with this body, to share it.
        """
        self.keys = keys
        self.n_keys = n_keys
        self.unpack = unpack
        self.head = head or b"$%d\r\n%b" % (len(body) + id_size, body)
        """The body as an argument of one operation, up to its id."""
        self._body = body
        self.steps: list[int] | None = None
        """Of a charge: by how much the figure of each limit grows with one more of its kind."""
        self.charges: str | None = None
        """The one partition whose windows and slots it charges, "" for none; None for any other."""

    def several(self, ids: Collection[bytes]) -> bytes:
        """The argument that stands for an operation of each id."""
        return bulk(b"".join((self._body, *ids)))

    def unpack_several(self, answer: bytes, number: int) -> Iterable[Any]:
        """What an answer to so many operations says of each, in their order."""
        return repeat(self.unpack(answer), number)


class Operation:
    """One operation of a batch: a template and an id, empty where the template leaves none open.

    To await it is to wait for its `Answer`, or a `BackendError`. Where nobody does, there is no future.
    """

    # What few of them have is not set for each: one is made for every request.
    must_arrive = False
    """Sent again until it arrives: for operations that are idempotent and owed."""
    is_once = False
    """Not sent again where it may have been done: for an operation that is owed and not idempotent."""
    is_asking = False
    """Sent after ASKING: its keys are moving to this node of a cluster."""
    tries = 0
    """How often it was sent again, to another node of a cluster."""
    orphaned: "Orphaned | None" = None
    """Called where the operation may have taken effect and nobody waits for its answer any more: with what
    it was about, the server's time and the answer, or 0 and None where they are lost."""
    about: Any = None
    since = 0.0
    future: "asyncio.Future[Answer] | None" = None
    result: Answer | BackendError | None = None
    """What came of it where nobody waited."""

    def __init__(self, template: Template, own_id: bytes = b"") -> None:
        self.template = template
        self.id = own_id

    def __await__(self) -> Generator[Any, None, Answer]:
        future = self.future
        if future is None:
            future = self.future = asyncio.get_running_loop().create_future()
            if isinstance(self.result, BackendError):
                future.set_exception(self.result)
            elif self.result is not None:
                future.set_result(self.result)
        return future.__await__()

    @property
    def is_over(self) -> bool:
        """Whether it was answered, has failed, or nobody waits for it any more."""
        return self.result is not None if self.future is None else self.future.done()

    def answer(self, answer: Answer) -> None:
        """What came of it."""
        if self.future is None:
            self.result = answer
        elif not self.future.done():
            self.future.set_result(answer)
        elif self.orphaned is not None:
            self.orphaned(self.about, *answer)

    def fail(self, error: BackendError) -> None:
        """Nothing came of it."""
        if self.future is None:
            self.result = error
        elif not self.future.done():
            self.future.set_exception(error)


if core is not None and not TYPE_CHECKING:
    Template, Operation = core.Template, core.Operation


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
        if operation.must_arrive or not operation.is_over:
            batch.append(operation)
    del queue[:taken]
    return batch


def compose(batch: list[Operation]) -> tuple[list[list[Operation]], int, bytes, bytes, bool]:
    """A batch by template, and in the Redis protocol: how many keys, the keys, the operations.

    And whether two charges may have a key in common.
    """
    groups: dict[Template, list[Operation]] = {}
    for operation in batch:
        groups.setdefault(operation.template, []).append(operation)
    arguments = [
        b"%b%b\r\n" % (template.head, members[0].id)
        if len(members) == 1
        else template.several([operation.id for operation in members])
        for template, members in groups.items()
    ]
    n_keys = sum([template.n_keys for template in groups])
    keys = b"".join([template.keys for template in groups])
    charged = [template.charges for template in groups if template.charges != ""]
    is_shared = None in charged or len(set(charged)) < len(charged)
    return list(groups.values()), n_keys, keys, b"".join(arguments), is_shared


def hand_out(
    groups: list[list[Operation]], now: int, answers: list[bytes]
) -> list[tuple[list[Operation], bytes]]:
    """Tell operations what came of each; those that failed, and the reason, are left to the caller."""
    failed = []
    for operations, answer in zip(groups, answers, strict=True):
        template = operations[0].template
        if answer[:1] == _FAILED:
            failed.append((operations, answer[1:]))
        elif len(operations) == 1:
            operations[0].answer((now, template.unpack(answer)))
        else:
            several = template.unpack_several(answer, len(operations))
            for operation, each in zip(operations, several, strict=True):
                operation.answer((now, each))
    return failed


if core is not None and not TYPE_CHECKING:
    take, compose, hand_out = core.take, core.compose, core.hand_out
