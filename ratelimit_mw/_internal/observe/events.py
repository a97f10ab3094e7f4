"""Events that an app can be told about as they happen: frozen values, handed to `on_event`."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.runtime.plain_hooks import check_nothing_to_await, check_plain

logger = logging.getLogger("ratelimit_mw")


@dataclass(frozen=True, slots=True)
class BudgetWarning:
    """A caller's budget has reached its `warn_at`. Comes once per period, from one process of all."""

    identity: Identity
    period: Literal["daily", "monthly"]
    currency: str
    limit: str
    """The budget, as a decimal string; so is `remaining`."""
    remaining: str
    ends: int
    """End of the period, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class SettleIgnored:
    """A settle changed nothing: `different`, it was settled at another amount; `unknown`, no record left."""

    lease_id: str
    amount: str
    reason: Literal["different", "unknown"]


@dataclass(frozen=True, slots=True)
class SlotLost:
    """A slot was not renewed in time, or reached its `max_hold`. Its work runs on uncounted."""

    lease_id: str


Event = BudgetWarning | SettleIgnored | SlotLost
OnEvent = Callable[[Event], object]


class Notifier:
    """Hands events to the app, which can neither delay nor break a request by what it does with them."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._hooks: tuple[OnEvent, ...] = ()
        if on_event is not None:
            self.add(on_event)

    def add(self, on_event: OnEvent) -> None:
        """Hand every event to this hook, too. Raises TypeError for one that would have to be awaited."""
        check_plain(on_event, "on_event")
        self._hooks += (on_event,)

    @property
    def hooks(self) -> tuple[OnEvent, ...]:
        """The hooks that events are handed to."""
        return self._hooks

    def __call__(self, event: Event) -> None:
        """Hand `event` over at the end of this turn of the event loop."""
        for on_event in self._hooks:
            asyncio.get_running_loop().call_soon(self._hand_over, on_event, event)

    def _hand_over(self, on_event: OnEvent, event: Event) -> None:
        try:
            check_nothing_to_await(on_event(event), "on_event")
        except Exception:
            logger.exception("on_event failed for %r", event)
