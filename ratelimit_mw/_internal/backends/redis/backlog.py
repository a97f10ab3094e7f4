"""Operations that one server has not answered yet: their order, and the room that there is for them.

What is owed to the server stays in its order through lost connections, before whatever follows from it.
Upkeep, such as renewals, has a queue of its own and fills the room that requests leave.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ratelimit_mw._internal.backends.redis.doubtful import Doubtful
from ratelimit_mw._internal.backends.redis.operations import IF_UNDONE, NEVER, Operation, take
from ratelimit_mw._internal.model.backend import BackendError

if TYPE_CHECKING:
    from ratelimit_mw._internal.backends.redis.deadlines import Batch

MAX_BATCH = 64
"""Operations in one call of the script, so that none takes the server over a millisecond."""
MAX_UPKEEP = 8
"""Operations of upkeep in one of them; one goes along where requests leave no room."""
MAX_QUEUE = 10_000
"""Operations that may wait; one more is refused at once."""
logger = logging.getLogger("ratelimit_mw")


class Backlog:
    """Operations that wait, that are under way, and that may still be on their way though given up."""

    def __init__(self) -> None:
        self.queue: list[Operation] = []
        self.upkeep: list[Operation] = []
        self.sent: deque[Batch] = deque()
        self.doubtful = Doubtful()

    def __len__(self) -> int:
        return len(self.queue) + len(self.upkeep) + len(self.in_flight()) + len(self.doubtful)

    @property
    def owed(self) -> int:
        """Number of operations owed to the server: those sent until they arrive, and those in doubt."""
        owed = len([operation for operation in [*self.in_flight(), *self.queue] if operation.resend])
        return owed + len(self.doubtful)

    @property
    def is_busy(self) -> bool:
        """Whether anything waits here or is under way."""
        return bool(self.queue or self.upkeep or self.sent or self.doubtful)

    @property
    def overwrites(self) -> bool:
        """Whether anything under way would undo what comes after it, if a server executed it late."""
        return any([operation.template.overwrites for operation in self.in_flight()])

    def make_room(self, newcomer: Operation) -> bool:
        """Whether there is room for one more: for what is owed there is, in place of what waits longest."""
        error = BackendError(f"more than {MAX_QUEUE} operations wait for the backend")
        if not newcomer.resend:
            newcomer.fail(error)
            return False
        oldest = self.queue.pop(0)
        if oldest.resend:
            logger.error("a release or settle is lost: %s", error)
        oldest.fail(error)
        return True

    def take(self) -> list[Operation]:
        """Take what leaves next: requests, and of upkeep what they leave room for, one after the other."""
        batch = take(self.queue, MAX_BATCH)
        if self.upkeep and not any(op.is_upkeep for op in self.in_flight()):
            batch += take(self.upkeep, min(max(MAX_BATCH - len(batch), 1), MAX_UPKEEP))
        return batch

    def put_first(self, operations: Sequence[Operation]) -> None:
        """Have operations that were sent in vain leave before all that wait."""
        self.queue[0:0] = operations

    def in_flight(self) -> list[Operation]:
        """Return the operations of all calls under way, in the order of the calls."""
        return [operation for batch in list(self.sent) for operation in batch.operations]

    def take_unanswered(self) -> list[Operation]:
        """Take out the operations under way that have no answer."""
        unanswered = [operation for operation in self.in_flight() if not operation.is_answered]
        self.sent.clear()
        for operation in unanswered:
            operation.lose_answer()
        return unanswered

    def withdraw(self) -> list[Operation]:
        """Take out what was not sent yet."""
        queued = [*self.queue, *self.upkeep]
        self.queue.clear()
        self.upkeep.clear()
        return queued

    def bequeath(self) -> list[Operation]:
        """Take out what is owed, in its order, and what was sent and may have to be undone."""
        sent, queued = [*self.doubtful.take(), *self.take_unanswered()], self.withdraw()
        _give_up_doubtful(sent)
        return sent + [each for each in queued if each.resend]

    def give_up(
        self, error: BackendError, refused: Sequence[Operation], *, for_good: bool
    ) -> list[Operation]:
        """Fail all that wait, but for what is owed: that is kept, unless it is `for_good`.

        What the server has `refused` goes first. Returns what it may have done or may still do.
        """
        sent = self.take_unanswered()
        _give_up_doubtful(sent)
        left = [*refused, *sent, *self.withdraw()]
        if not for_good:
            # In the order in which they were given, before those that follow from this.
            self.queue += [each for each in left if each.resend]
        for operation in left:
            if for_good or not operation.resend:
                operation.fail(error)
        return [operation for operation in sent if not operation.resend]


def _give_up_doubtful(sent: Iterable[Operation]) -> None:
    """Have nothing sent again that may have been done and must not be done twice."""
    for operation in sent:
        if operation.resend == IF_UNDONE:
            operation.resend = NEVER
