"""Exception for refusals that a handler meets, and how it is found behind other exceptions."""

import sys

from ratelimit_mw._internal.policy.decision import Decision

MAX_CAUSES = 20
"""Exceptions behind an exception among which a refusal is looked for."""


class RateLimited(Exception):  # noqa: N818 - the name of the answer, as an app's own handlers are registered for it
    """A limit refused. Raised by `Lease.charge` and `Lease.raise_for_refusal`.

    A handler need not catch it: `RateLimitMiddleware` answers it as it answers any refusal. An app may
    register an exception handler of its own for it.
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision)
        self.decision: Decision = decision
        """The decision that refused."""

    @property
    def retry_after(self) -> float | None:
        """Seconds until the same may be admitted; None where waiting is no use."""
        return self.decision.retry_after

    def __str__(self) -> str:
        refusal = self.decision.refusal
        if refusal is None or refusal.limit is None:
            return "refused: rate limits cannot be checked at the moment"
        wait = "" if refusal.retry_after is None else f"; retry after {refusal.retry_after:.3f} s"
        return f"refused by {refusal.limit.name}{wait}"


def refusal_in(error: BaseException | None) -> RateLimited | None:
    """Find the refusal that an exception is, or was raised because of; None where there is none."""
    waiting = [] if error is None else [error]
    for _ in range(MAX_CAUSES):
        if not waiting:
            return None
        error = waiting.pop()
        if isinstance(error, RateLimited):
            return error
        if isinstance(error, BaseExceptionGroup):  # of a task group, such as that of a BaseHTTPMiddleware
            waiting += error.exceptions
        elif error.__cause__ is not None:
            waiting.append(error.__cause__)
    return None


def refusal_being_handled() -> RateLimited | None:
    """Find the refusal whose handler runs just now: what it sends is an answer to that."""
    return refusal_in(sys.exception())
