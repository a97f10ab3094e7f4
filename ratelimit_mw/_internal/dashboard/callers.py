"""One caller on the dashboard: how it stands, and the two things that can be done about it."""

import asyncio
import logging
import time
from collections import OrderedDict
from typing import Any

from ratelimit_mw._internal.dashboard.answers import DashboardError
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.limiter.inspect_caller import forget
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.live.key_entries import KeyEntry
from ratelimit_mw._internal.model.charge import BackendError
from ratelimit_mw._internal.policy.identity import HASH, key_partition
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings import SettingsError

logger = logging.getLogger("ratelimit_mw")

KEPT_SECONDS = 1.0
"""How long an answer serves everybody who has this caller's page open."""
MAX_KEPT = 256
"""Callers whose answers are kept."""


class Callers:
    """Reads and changes single callers. Who did what is logged, by address."""

    def __init__(self, limiter: Limiter, view: FleetView) -> None:
        self._limiter = limiter
        self._view = view
        self._last: dict[str, dict[str, Any]] = {}
        """The last whole answers, to be shown while the backend is away."""
        self._kept: OrderedDict[str, tuple[float, asyncio.Task[dict[str, Any]]]] = OrderedDict()

    async def read(self, caller: str) -> dict[str, Any]:
        """The page of one caller, by its partition. Raises `BackendError`."""
        now = time.monotonic()
        kept = self._kept.get(caller)
        if kept is None or now - kept[0] > KEPT_SECONDS or kept[1].get_loop() is not _loop():
            kept = self._kept[caller] = (now, _loop().create_task(self._read(caller)))
            kept[1].add_done_callback(_looked_at)
            self._kept.move_to_end(caller)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        # One who leaves must not take the answer from the others.
        return await asyncio.shield(kept[1])

    async def reset(self, caller: str, by: str) -> int:
        """Clear what is counted of a caller; returns how many counters. Raises `BackendError`."""
        identity = await self._view.identity(caller)
        if identity is None:
            raise DashboardError(404, "Nobody knows this caller.")
        cleared = await forget(self._limiter, identity)
        self._kept.pop(caller, None)
        logger.warning("dashboard: counters of %r cleared, by %s", caller, by)
        return cleared

    async def set_plan(self, api_key_hash: str, plan: str | None, by: str) -> None:
        """Give a key a plan, live; None takes back what was set live. It keeps its account and its label.

        Limits of its own are replaced by the plan's, as by `keys set`. Raises `BackendError`.
        """
        if not HASH.fullmatch(api_key_hash):
            raise DashboardError(400, "key must be the hash of an API key.")
        live = self._limiter.live
        try:
            if plan is None:
                await live.remove_keys([api_key_hash])
            else:
                await live.set_keys({api_key_hash: self._entry(api_key_hash, plan)})
        except SettingsError as error:
            raise DashboardError(422, "; ".join(map(str, error.problems))) from None
        self._kept.clear()
        what = "what was set live is taken back" if plan is None else f"plan {plan}"
        logger.warning("dashboard: %s: %s, by %s", key_partition(api_key_hash), what, by)

    def _entry(self, api_key_hash: str, plan: str) -> KeyEntry:
        rules = self._limiter.live.rules
        key = rules.registered.get(api_key_hash)
        key = key or next((each for each in rules.settings.keys if each.hash == api_key_hash), None)
        return KeyEntry(plan) if key is None else KeyEntry(plan, key.account, label=key.label)

    async def _read(self, caller: str) -> dict[str, Any]:
        try:
            detail = await self._view.caller(caller)
        except BackendError as error:
            known = self._last.get(caller)
            if known is None:
                raise
            why = f"the backend is away: {error}; this is how it was last seen"
            return {**known, "partial": why}
        snapshot = await self._view.read()
        set_live = [each for each in detail.known_as if each in self._limiter.live.keys]
        values = {**detail.as_dict(), "now": snapshot.now, "bucket": snapshot.bucket, "set_live": set_live}
        if detail.partial is None:
            evict_oldest(self._last, MAX_KEPT)
            self._last[caller] = values
        return values


def _looked_at(task: "asyncio.Task[dict[str, Any]]") -> None:
    """An error is told to those who wait; where they all left, it is nobody's."""
    if not task.cancelled():
        task.exception()


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
