"""Refusals in the log: all of them at level DEBUG, and, rarely enough to be read, those of shadow mode."""

import logging
import time
from collections.abc import Callable

from ratelimit_mw._internal.observe.decision_counts import limit_name
from ratelimit_mw._internal.policy.decision import Refusal
from ratelimit_mw._internal.policy.policy import Policy

logger = logging.getLogger("ratelimit_mw")

SHADOW_SECONDS = 1.0
"""Seconds between two log lines about requests that shadow mode let through, by plan and reason."""


class RefusalLog:
    """Logs refusals; the fields are in each record's `ratelimit`, for logs that are read by programs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unsaid: dict[tuple[str, str], tuple[float, int]] = {}
        """Time of the last line, and number of refusals since that time; by plan and reason."""

    def __call__(self, policy: Policy, refusal: Refusal, *, shadow: bool) -> None:
        """Log a refusal, or one that shadow mode let through, if it is time for another line."""
        if not shadow:
            if logger.isEnabledFor(logging.DEBUG):
                fields = _fields(policy, refusal, "refused")
                logger.debug("refused: %s", _text(fields), extra={"ratelimit": fields})
            return
        kind = (policy.identity.plan, refusal.reason)
        said, unsaid = self._unsaid.get(kind, (float("-inf"), 0))
        now = self._clock()
        if now - said < SHADOW_SECONDS:
            self._unsaid[kind] = (said, unsaid + 1)
            return
        self._unsaid[kind] = (now, 0)
        fields = {**_fields(policy, refusal, "shadow"), "count": unsaid + 1}
        text = "would have been refused without shadow mode: %s; %d of this kind since the last line"
        logger.warning(text, _text(fields), unsaid + 1, extra={"ratelimit": fields})


def _fields(policy: Policy, refusal: Refusal, event: str) -> dict[str, object]:
    return {
        "event": event,
        "caller": policy.identity.partition,
        "plan": policy.identity.plan,
        "route": "" if policy.route is None else policy.route.path,
        "reason": refusal.reason,
        "limit": limit_name(policy, refusal),
    }


def _text(fields: dict[str, object]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in fields.items() if name != "event")
