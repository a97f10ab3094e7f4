"""Keys that only the app's own database knows: asked for through `resolve=`, and remembered."""

import asyncio
import inspect
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from ratelimit_mw._internal.live.key_entries import sound_entry
from ratelimit_mw._internal.live.rules import Rules
from ratelimit_mw._internal.policy.client_address import Scope
from ratelimit_mw._internal.policy.identity import Identity
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.policy.rate_limited import RateLimited
from ratelimit_mw._internal.runtime.forks import leave_to_parent, renew_after_fork
from ratelimit_mw._internal.settings import Settings, SettingsError

logger = logging.getLogger("ratelimit_mw")

Resolve = Callable[[str], Awaitable[KeyEntry | None] | KeyEntry | None]
"""A hook that looks an API key up, given in the clear: UTF-8, with what is none as surrogates
(`os.fsencode` gives the bytes back). None for a key that the app doesn't know."""

TIME_LIMIT = 1.0
"""Seconds that a request waits for a look-up."""
FOUND_SECONDS = 60.0
"""Seconds that an entry is good for."""
STALE_SECONDS = 60.0
"""Seconds beyond that in which it still serves, while it is looked up again in the background."""
MISS_SECONDS = 5.0
"""Seconds that a key stays unknown, and that pass after a failure before the same key is asked for again."""
MAX_FOUND = 10_000
MAX_MISSED = 10_000
"""Entries and misses remembered; the least recently used are forgotten. Each has its own room, so that
invented keys push out no real ones."""
MAX_STRANGERS = 64
"""Look-ups at once of keys not known from before; one more key counts as unknown. Known ones have as many."""
QUIET_SECONDS = 60.0
"""Seconds between two reports of failing look-ups."""


class _Missed(NamedTuple):
    """A key that the app doesn't know, or wants to answer itself."""

    until: float
    answer: HTTPException | RateLimited | None = None
    """Exception that the hook raised as its answer to whoever sends the key; None without one."""


@dataclass(slots=True)
class _Found:
    """A key that the app knows, and what was made of it."""

    entry: KeyEntry
    fresh_until: float
    made_for: Settings | None = None
    identity: Identity | None = None
    """None where the entry doesn't fit the settings."""


_NOT_MISSED = _Missed(0.0)


class Resolver:
    """Tells who is calling where a look-up may be needed.

    An `HTTPException` that the hook raises is its answer to the key, and raised to all who send it; so is
    `RateLimited`.
    """

    def __init__(self, resolve: Resolve, rules: Callable[[], Rules]) -> None:
        self.hook = resolve
        """The app's function that looks keys up."""
        self._rules = rules
        self._found: OrderedDict[str, _Found] = OrderedDict()
        self._missed: OrderedDict[str, _Missed] = OrderedDict()
        self._calls: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[None]] = {}
        self._strangers: set[asyncio.Task[None]] = set()
        self._quiet_until = 0.0
        self._lock = threading.Lock()  # one resolver serves the event loops of several threads
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the look-ups under way to the parent process."""
        self._lock = threading.Lock()
        leave_to_parent(*self._calls.values())
        self._calls.clear()
        self._strangers.clear()

    async def caller(self, scope: Scope) -> Identity:
        """The caller of an `http` or `websocket` scope. Raises IdentityError."""
        identify = self._rules().identify
        read = identify.read(scope)
        if read is None:
            return identify.anonymous(scope)
        api_key, api_key_hash = read
        known = identify.of_key(api_key_hash) or await self._look_up(api_key, api_key_hash)
        # Asked anew: the rules may have changed meanwhile.
        identify = self._rules().identify
        return known or identify.of_unknown(api_key_hash, identify.hop(scope))

    async def of_key(self, api_key: bytes, api_key_hash: str) -> Identity | None:
        """The caller with a key, None where nobody knows it."""
        return self._rules().identify.of_key(api_key_hash) or await self._look_up(api_key, api_key_hash)

    async def close(self) -> None:
        """End the look-ups of the running event loop."""
        loop = asyncio.get_running_loop()
        calls = [call for (its_loop, _), call in list(self._calls.items()) if its_loop is loop]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _look_up(self, api_key: bytes, api_key_hash: str) -> Identity | None:
        now = time.monotonic()
        found = self._found.get(api_key_hash)
        if found is None:
            if now >= self._missed.get(api_key_hash, _NOT_MISSED).until:
                await self._wait(self._call(api_key, api_key_hash))
        elif now >= found.fresh_until:
            call = self._call(api_key, api_key_hash)
            if now >= found.fresh_until + STALE_SECONDS:
                await self._wait(call)
        return self._remembered(api_key_hash)

    async def _wait(self, call: "asyncio.Task[None] | None") -> None:
        if call is not None:
            # The look-up belongs to everyone who waits: it goes on when one of them is cancelled.
            await asyncio.wait([call], timeout=TIME_LIMIT)

    def _call(self, api_key: bytes, api_key_hash: str) -> "asyncio.Task[None] | None":
        """The look-up of this key that is under way, else a new one; None where there are too many."""
        loop = asyncio.get_running_loop()
        call = self._calls.get((loop, api_key_hash))
        if call is None:
            is_stranger = api_key_hash not in self._found
            if self._at_once(is_stranger) >= MAX_STRANGERS:
                self._forget_ended()
            if self._at_once(is_stranger) >= MAX_STRANGERS:
                self._report(f"more than {MAX_STRANGERS} look-ups at once")
                return None
            call = loop.create_task(self._ask(api_key, api_key_hash), name="ratelimit_mw resolve")
            if is_stranger:
                self._strangers.add(call)
            self._calls[loop, api_key_hash] = call
            call.add_done_callback(lambda done: self._end((loop, api_key_hash), done))
        return call

    def _at_once(self, is_stranger: bool) -> int:
        """Look-ups under way of keys not known from before, or of known ones."""
        return len(self._strangers) if is_stranger else len(self._calls) - len(self._strangers)

    def _end(self, key: tuple[asyncio.AbstractEventLoop, str], call: "asyncio.Task[None]") -> None:
        self._calls.pop(key, None)
        self._strangers.discard(call)

    def _forget_ended(self) -> None:
        """Forget look-ups whose event loop has ended before they did."""
        for key, call in list(self._calls.items()):
            if key[0].is_closed():
                self._end(key, call)

    async def _ask(self, api_key: bytes, api_key_hash: str) -> None:
        limit = asyncio.timeout(TIME_LIMIT)
        entry: Any
        try:
            async with limit:
                found: Any = self.hook(api_key.decode("utf-8", "surrogateescape"))
                entry = await found if inspect.isawaitable(found) else found
        except (HTTPException, RateLimited) as answer:
            with self._lock:
                self._found.pop(api_key_hash, None)
                self._miss(api_key_hash, time.monotonic(), answer)
            return
        except Exception as error:  # noqa: BLE001 - an app's database fails in its own ways
            self._report(f"no answer within {TIME_LIMIT:g} s" if limit.expired() else _told(error))
            self._remember_failure(api_key_hash)
            return
        if entry is None or isinstance(entry, KeyEntry):
            self._remember(api_key_hash, entry)
        else:
            self._report(f"it returned {type(entry).__name__}, neither KeyEntry nor None")
            self._remember_failure(api_key_hash)

    # remembering --------------------------------------------------------------------------------

    def _remember(self, api_key_hash: str, entry: KeyEntry | None) -> None:
        now = time.monotonic()
        with self._lock:
            if entry is None:
                self._found.pop(api_key_hash, None)
                self._miss(api_key_hash, now)
                return
            self._missed.pop(api_key_hash, None)
            before = self._found.get(api_key_hash)
            if before is not None and before.entry == entry:
                before.fresh_until = now + FOUND_SECONDS
                return
            self._found[api_key_hash] = _Found(entry, now + FOUND_SECONDS)
            if len(self._found) > MAX_FOUND:
                self._found.popitem(last=False)

    def _remember_failure(self, api_key_hash: str) -> None:
        """The last known entry goes on; a key that has none is unknown for a moment."""
        now = time.monotonic()
        with self._lock:
            found = self._found.get(api_key_hash)
            if found is None:
                self._miss(api_key_hash, now)
            else:
                found.fresh_until = now + MISS_SECONDS

    def _miss(self, api_key_hash: str, now: float, answer: HTTPException | RateLimited | None = None) -> None:
        seconds = MISS_SECONDS
        if isinstance(answer, RateLimited):  # its promise holds: at that moment the hook is asked again
            seconds = min(seconds, answer.retry_after or seconds)
        self._missed[api_key_hash] = _Missed(now + seconds, answer)
        self._missed.move_to_end(api_key_hash)
        if len(self._missed) > MAX_MISSED:
            self._missed.popitem(last=False)

    def _remembered(self, api_key_hash: str) -> Identity | None:
        with self._lock:
            found = self._found.get(api_key_hash)
            if found is None:
                answer = self._missed.get(api_key_hash, _NOT_MISSED).answer
                if answer is not None:
                    raise answer.with_traceback(None)
                return None
            self._found.move_to_end(api_key_hash)
            rules = self._rules()
            if found.made_for is not rules.settings:
                found.made_for, found.identity = rules.settings, None
                try:
                    key = sound_entry(found.entry, api_key_hash, rules.settings)
                    found.identity = rules.identify.of_settings(key)
                except SettingsError as error:
                    self._report(f"what it returned for {api_key_hash} is ignored: {error.problems[0]}")
            return found.identity

    def _report(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            logger.warning("resolve= failed: %s", text)


def _told(error: Exception) -> str:
    """Return the type and the place of an error, without its text: an app may put the API key into that."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
