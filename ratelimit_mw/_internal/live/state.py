"""Rules in force, kept up to date while requests flow: by the file, the live keys and the app's hook."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ratelimit_mw._internal.backends import open_audit_store, open_key_store
from ratelimit_mw._internal.checks.startup import log_findings
from ratelimit_mw._internal.live import registry, reload
from ratelimit_mw._internal.live.audit import AuditLog
from ratelimit_mw._internal.live.registry import LiveTables, Registry
from ratelimit_mw._internal.live.reload import FileWatch
from ratelimit_mw._internal.live.resolve import Resolve, Resolver
from ratelimit_mw._internal.live.rights import RightsCheck
from ratelimit_mw._internal.live.rules import Rules, free
from ratelimit_mw._internal.model.backend import Backend
from ratelimit_mw._internal.policy.key_entry import KeyEntry
from ratelimit_mw._internal.runtime import threads
from ratelimit_mw._internal.runtime.forks import renew_after_fork
from ratelimit_mw._internal.runtime.plain_hooks import check_hooks
from ratelimit_mw._internal.runtime.printable import printable
from ratelimit_mw._internal.runtime.upkeep import Job, Upkeep
from ratelimit_mw._internal.settings import Settings

if TYPE_CHECKING:
    from ratelimit_mw._internal.observe.sightings import Watch

logger = logging.getLogger("ratelimit_mw")

OPEN_TIMEOUT = 1.0
"""Seconds that opening waits for the live keys. A backend that is away never prevents a start."""


class Live:
    """The rules in force, and what changes them: always as a whole, between two requests."""

    def __init__(
        self,
        settings: Settings,
        resolve: Resolve | None = None,
        others: Iterable[Job] = (),
        *,
        beside: Backend | None = None,
    ) -> None:
        """`others` are jobs to do beside, wherever something is watched. Live keys are asked for over the
        connection of the backend that they are `beside`.
        """
        self._registry = Registry(open_key_store(settings.backend, beside=beside))
        self.rules: Rules = Rules.from_settings(settings, LiveTables())
        self.resolver: Resolver | None = None
        if resolve is not None:
            self.resolve_by(resolve)
        self.watch: Watch | None = None
        """Takes note of where requests come from and go to, while somebody looks."""
        self.audit: AuditLog = AuditLog(open_audit_store(settings.backend))
        """Changes by operators."""
        self.rights: RightsCheck = RightsCheck(lambda: self.rules.settings, self._registry.try_write)
        jobs = [*others]
        if settings.file is not None:
            self._watch = FileWatch(settings.file)
            jobs.append(Job("watching the settings", reload.POLL_SECONDS, self._look_at_file))
        run, close = self._look_at_keys, self._registry.close
        jobs.append(Job("watching the keys", registry.POLL_SECONDS, run, close))
        if self._registry.is_shared:
            jobs.append(self.rights.job())
        self._upkeep = Upkeep(jobs)
        self.ready: set[asyncio.AbstractEventLoop] = set()
        """Event loops in which everything is watched. In any other, `get_ready` comes first."""
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Watch anew: what the parent process watched in its event loops comes to no end here."""
        self.ready.clear()

    @property
    def keys(self) -> Mapping[str, KeyEntry]:
        """The live entries by hash or network, also those that don't fit the settings or are over."""
        return self._registry.entries

    @property
    def in_force(self) -> Mapping[str, KeyEntry]:
        """The live entries that hold now, by hash or network."""
        return self._registry.in_force()

    def resolve_by(self, resolve: Resolve) -> None:
        """Ask this hook about keys that are neither set live nor in the settings."""
        check_hooks(resolve=resolve)
        self.resolver = Resolver(resolve, lambda: self.rules)

    def apply(self, settings: Settings) -> None:
        """Put other settings in force, from the next request on; the backend and the hash secret stay.

        Raises `SettingsError` where that doesn't fit together.
        """
        kept = settings.with_backend_of(self.rules.settings)
        self._put(Rules.from_settings(kept, self._registry.sound_under(kept)))

    async def for_a_while(self, entries: Mapping[str, KeyEntry], seconds: float) -> dict[str, KeyEntry]:
        """Make entries that go back by themselves, after so many seconds, to what is known to hold now.

        Raises `SettingsError` and `BackendError`.
        """
        return await self._registry.for_a_while(entries, seconds)

    async def set_keys(self, entries: Mapping[str, KeyEntry | None]) -> None:
        """Set live entries by hash or network, and remove those that are None, all or none.

        Raises `SettingsError` and `BackendError`.
        """
        await self._registry.set(entries, self.rules.settings)
        await self._relist()

    async def remove_keys(self, hashes: Iterable[str]) -> None:
        """Remove live keys by their hashes. Raises `BackendError`."""
        await self._registry.remove(hashes)
        await self._relist()

    async def read_keys(self) -> None:
        """Read the live keys once, where nothing is watched. Raises `BackendError`."""
        try:
            await self._registry.read()
            await self._relist()
        finally:
            await self._registry.close()

    async def open(self) -> None:
        """Start watching in this event loop and wait, for a bounded time, for the live keys."""
        await self._start(OPEN_TIMEOUT)

    async def get_ready(self) -> None:
        """Start watching on behalf of a first request, which has no time but its own."""
        await self._start(self.rules.settings.backend.timeout / 2)

    async def close(self) -> None:
        """Stop watching in this event loop."""
        self.ready.discard(asyncio.get_running_loop())
        await self._upkeep.stop()
        if self.resolver is not None:
            await self.resolver.close()
        await self._registry.close()
        await self.audit.close()

    async def _start(self, timeout: float) -> None:
        self._upkeep.start()
        await self._upkeep.first_run(timeout)
        self.ready.difference_update([loop for loop in list(self.ready) if loop.is_closed()])
        self.ready.add(asyncio.get_running_loop())

    # changes ------------------------------------------------------------------------------------

    async def _look_at_file(self) -> None:
        settings = await self._watch.check(self.rules.settings)
        if settings is not None:
            await self._swap(lambda _: Rules.from_settings(settings, self._registry.sound_under(settings)))
            await threads.call(partial(log_findings, settings))  # in force already: nobody waits for it

    async def _look_at_keys(self) -> None:
        if await self._registry.poll() or self._registry.is_outdated:
            await self._relist()

    async def _relist(self) -> None:
        await self._swap(lambda rules: rules.with_registered(self._registry.sound_under(rules.settings)))

    async def _swap(self, make: Callable[[Rules], Rules]) -> None:
        """Make new rules in a thread and put them in force; make them again where these changed meanwhile."""
        while True:
            rules, keys = self.rules, self._registry.entries
            made = await threads.call(partial(make, rules), pauses=bool(rules.registered))
            if self.rules is rules and self._registry.entries is keys:
                self._put(made)
                return

    def _put(self, rules: Rules) -> None:
        before, self.rules = self.rules, rules
        if rules.settings is not before.settings:
            threads.start(partial(free, [before]))
            fields = {"event": "settings_in_force", "version": rules.version}
            logger.info(
                "settings in force: version %s of %s",
                rules.version,
                printable(rules.settings.source),
                extra={"ratelimit": fields},
            )
