"""Calls that wait where they are refused: in turn, until the promised moment, and for a bounded time."""

import random
from collections.abc import Awaitable, Callable
from itertools import count

from ratelimit_mw._internal.lease.lease import Lease
from ratelimit_mw._internal.lease.manager import Leases
from ratelimit_mw._internal.lease.token import MAX_TTL
from ratelimit_mw._internal.limiter.decider import Decider
from ratelimit_mw._internal.limiter.questions import Question, ask
from ratelimit_mw._internal.limiter.waiting_lines import Call, LineKey, Refused, WaitingLines

POLL_SECONDS = (0.05, 0.5)
"""The first and the longest wait for what may be free at any moment, such as a slot of another process."""

Again = Callable[[], Awaitable[Question | None]]
"""Returns the same question by the rules in force then; None where nothing limits it any more."""


class Turns:
    """Asks for calls that wait.

    A call that is refused stands in the line of each limit that has refused it. Who comes later and is
    limited by one of these stands behind it, and asks only when nobody is before it. So a line costs the
    backend one question at a time, however long it is, and no call overtakes another.
    """

    def __init__(self, decider: Decider, leases: Leases) -> None:
        self._decider = decider
        self._leases = leases
        self._lines = WaitingLines()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        """Let no call of the running event loop wait any more: each returns its refusal."""
        self._lines.close()

    async def wait(self, question: Question, again: Again, max_wait: float) -> Lease:
        """Decide about a question, and again after each refusal that may be lifted within `max_wait` seconds.

        The lease is the last answer, which alone is counted and told. What `again` raises ends the wait.
        """
        self._leases.freed = self._lines.freed
        call = Call(next(self._numbers), _costs(question), max_wait)
        try:
            refusal = self._lines.join(call)
            if refusal is not None:
                return self._decider.refuse(question.policy, question.identity, refusal)
            return await self._wait(call, question, again)
        finally:
            self._lines.leave(call)

    async def _wait(self, call: Call, question: Question, again: Again) -> Lease:
        lease, is_reported = None, False
        while True:
            call.woken.clear()
            sent = call.now()
            is_over = call.is_closed or sent >= call.deadline
            until = call.deadline
            if self._lines.is_first(call):
                if lease is None or not call.is_closed:
                    asked = question
                    if is_reported:  # limits that only report do so once
                        asked = question._replace(policy=question.policy.enforced or question.policy)
                    lease = await ask(self._decider, asked, may_wait=True)
                    is_reported = is_reported or lease.policy is not asked.policy
                moment = None if is_over or lease.allowed else self._stand(call, lease, sent)
                if moment is None:
                    self._decider.tell_of(lease)
                    return lease
                until = moment
            elif is_over:
                return self._decider.refuse(question.policy, question.identity, self._lines.refusal(call))
            await call.sleep_until(until)
            question = await again() or question

    def _stand(self, call: Call, lease: Lease, sent: float) -> float | None:
        """Have a refused call wait for its moment, and return that; None where waiting is no use."""
        decision, now = lease.decision, call.now()
        if decision.retry_after is None:
            return None
        refusing = [status for status in decision.limits if status.status.refuses]
        refused = [Refused.from_status(status, decision, now) for status in refusing]
        waits = [each.wait for each in refused if each.wait is not None]
        known = max(waits, default=0.0 if refused else decision.retry_after)
        if sent + known > call.deadline:  # the backend has decided after that
            return None
        refused.sort(key=lambda each: each.wait or 0.0)  # of several in one line the longest wait counts
        if not self._lines.stand(call, {each.line_key: each for each in refused}):
            return None
        call.is_open = all([each.is_open for each in refused])
        moment = now + known
        if len(waits) < len(refused):
            moment = max(moment, min(now + _poll(call.polls), call.deadline))
            call.polls += 1
        return moment


def check_max_wait(max_wait: object) -> float:
    """Return how many seconds a call may wait, 0 for none. Raises ValueError for anything else."""
    if max_wait is None:
        return 0.0
    if not isinstance(max_wait, int | float) or isinstance(max_wait, bool) or not 0 <= max_wait <= MAX_TTL:
        raise ValueError(f"max_wait must be a number of seconds from 0 to {MAX_TTL}, not {max_wait!r:.60}")
    return float(max_wait)


def _poll(tries: int) -> float:
    """Seconds until the next try, spread so that processes don't ask in step."""
    first, longest = POLL_SECONDS
    return random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(tries, 10))  # noqa: S311 - no secret


def _costs(question: Question) -> dict[LineKey, int]:
    """Return what a question costs in each line that it may have to stand in."""
    policy = question.policy.enforced or question.policy
    if policy.is_decided or policy.shadow:
        return {}
    price = policy.price if question.price is None else question.price
    charge = policy.charge if price is None else policy.priced_charge
    return {(each.partition, each.scope): charge.cost_at(n) for n, each in enumerate(charge.counters)}
