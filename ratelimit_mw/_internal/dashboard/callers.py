"""One caller on the dashboard: how it stands, and what can be done about it."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ratelimit_mw._internal.dashboard.answers import DashboardError
from ratelimit_mw._internal.fleet import FleetView
from ratelimit_mw._internal.limiter.inspect_caller import forget
from ratelimit_mw._internal.limiter.limiter import Limiter
from ratelimit_mw._internal.live.audit import Action, Change, Entries, entries_of
from ratelimit_mw._internal.live.network_entries import network_at, network_of, shown_name
from ratelimit_mw._internal.live.timed_entries import next_end, until_text
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.policy.identity import HASH
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime.bounded import evict_oldest
from ratelimit_mw._internal.settings import SettingsError

KEPT_SECONDS = 1.0
"""Seconds for which an answer serves everybody who has this caller's page open."""
MAX_KEPT = 256
"""Callers whose answers are kept."""


class Callers:
    """Reads and changes single callers. Who did what is recorded."""

    def __init__(self, limiter: Limiter, view: FleetView) -> None:
        self._limiter = limiter
        self._view = view
        self._audit = limiter.engine.live.audit
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

    async def reset(self, caller: str, who: str) -> tuple[int, Change]:
        """Clear what is counted of a caller; returns how many counters. Raises `BackendError`."""
        await self._limiter.engine.live.read_keys()  # its plan may just have been changed, by another worker
        identity = await self._view.identity(caller)
        if identity is None:
            raise DashboardError(404, "This caller is not known.")
        cleared = await forget(self._limiter, identity)
        self._kept.pop(caller, None)
        detail = f"{cleared} counter{'' if cleared == 1 else 's'} cleared"
        return cleared, await self._audit.add(who, "reset", [caller], detail)

    async def set_plan(
        self, names: Sequence[str], plan: str | None, who: str, seconds: float | None = None
    ) -> Change:
        """Give keys or networks a plan, live; None takes back what was set live. Keys keep account and label.

        Limits of their own are replaced by the plan's, as by `keys set`. With `seconds` all goes back by
        itself after so long. Raises `BackendError`.
        """
        if not names or not all(HASH.fullmatch(each) or network_of(each) for each in names):
            raise DashboardError(400, "key must be the hash of an API key, or a network.")
        if plan is None:
            return await self._change(
                dict.fromkeys(names), who, "take-back", "what was set live is taken back"
            )
        return await self._change(
            {each: self._entry(each, plan) for each in names}, who, "plan", f"plan {plan}", seconds
        )

    async def undo(self, change_id: str, who: str) -> Change:
        """Set live keys as they were before a change, unless they were changed again since."""
        change = await self._audit.find(change_id)
        if change is None or change.before is None or change.after is None:
            raise DashboardError(404, "This change is not known, or can't be undone.")
        try:
            before, after = entries_of(change.before), entries_of(change.after)
        except ValueError:
            raise DashboardError(404, "This change is not known, or can't be undone.") from None
        await self._limiter.engine.live.read_keys()
        if any(self._limiter.engine.live.keys.get(each) != entry for each, entry in after.items()):
            raise DashboardError(
                409, "The plan was changed again after this change: look at the latest changes."
            )
        return await self._change(before, who, "undo", f"undone: {change.detail}")

    async def keys_of(self, caller: str) -> tuple[str, ...]:
        """The hashes of all keys that are counted as this caller. Raises `BackendError`."""
        network = network_at(caller)
        if network is not None:
            return (network,)
        hashes = (await self._view.caller(caller)).known_as
        if not hashes:
            raise DashboardError(
                404,
                "Only an API key or an address has a plan of its own, and no key of this caller is known.",
            )
        return hashes

    async def _change(
        self, entries: Entries, who: str, action: Action, detail: str, seconds: float | None = None
    ) -> Change:
        live = self._limiter.engine.live
        await live.read_keys()
        before = {each: live.keys.get(each) for each in entries}
        try:
            if seconds is not None:
                given = {each: entry for each, entry in entries.items() if entry is not None}
                entries = await live.for_a_while(given, seconds)
                detail += until_text(entries)
            await live.set_keys(entries)
        except SettingsError as error:
            raise DashboardError(422, "; ".join(map(str, error.problems))) from None
        self._kept.clear()
        return await self._audit.add(who, action, map(shown_name, entries), detail, (before, entries))

    def _entry(self, api_key_hash: str, plan: str) -> KeyEntry:
        live = self._limiter.engine.live
        if network_of(api_key_hash) is not None:
            known = live.in_force.get(api_key_hash)
            return KeyEntry(plan, label=known.label if known is not None else None)
        rules = live.rules
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
            why = f"the backend is away: {error}; the page shows this caller as last seen"
            return {**known, "partial": why}
        network = network_at(caller)
        entries = self._limiter.engine.live.in_force
        set_live = [each for each in (*detail.known_as, *([network] if network else [])) if each in entries]
        values = {**detail.as_dict(), "network": network, "set_live": set_live}
        values["until"] = _until(entries, set_live)
        if detail.partial is None:
            evict_oldest(self._last, MAX_KEPT)
            self._last[caller] = values
        return values


def _until(entries: Entries, names: Sequence[str]) -> float | None:
    """The time at which the first of these entries goes back by itself."""
    end = next_end({each: entry for each in names if (entry := entries[each]) is not None})
    return end if math.isfinite(end) else None


def _looked_at(task: "asyncio.Task[dict[str, Any]]") -> None:
    """An error is told to those who wait; where they all left, it is nobody's."""
    if not task.cancelled():
        task.exception()


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
