"""Verdicts on answers, of limits that count some answers alone."""

import logging

from ratelimit_mw._internal.model.limits import ANSWERS
from ratelimit_mw._internal.policy.policy import Policy
from ratelimit_mw._internal.runtime.plain_hooks import check_nothing_to_await

logger = logging.getLogger("ratelimit_mw")


def verdicts_of(policy: Policy, status: int) -> dict[str, bool]:
    """Whether an answer of a status counts, for each unit that counts requests by their answers."""
    verdicts = {}
    for unit, counts in (policy.answers or {}).items():
        try:
            verdict = counts(status)
            check_nothing_to_await(verdict, "count", "")
            verdicts[unit] = bool(verdict)
        except Exception:
            logger.exception("count= of limit %s failed; the request is counted", unit.removeprefix(ANSWERS))
            verdicts[unit] = True
    return verdicts
