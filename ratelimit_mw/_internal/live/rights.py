"""Whether live keys may be changed from the dashboard, where the backend keeps its users apart."""

import asyncio
from collections.abc import Awaitable, Callable

from ratelimit_mw._internal.backends.connecting.errors import ReplyError
from ratelimit_mw._internal.backends.rights import missing_rights
from ratelimit_mw._internal.model.backend import BackendError
from ratelimit_mw._internal.runtime.upkeep import Job
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import Finding, say_once

LOOK_SECONDS = 2.0
AGAIN_SECONDS = 30.0
"""Seconds until rights that were missing are looked for again."""


class RightsCheck:
    """Tries out whether the backend lets this process change live keys, and reports where it doesn't."""

    def __init__(self, settings: Callable[[], Settings], try_write: Callable[[], Awaitable[None]]) -> None:
        self._settings = settings
        self._try_write = try_write
        self._is_good = False
        self._not_before = 0.0
        self.missing: str | None = None
        """The command that gives the rights that are missing; None where none is known to be."""

    def job(self) -> Job:
        """Look a while after the start, so that no request waits for it."""
        return Job("checking rights in the backend", LOOK_SECONDS, self.run, waits=True)

    async def run(self) -> None:
        """Look, unless nothing has to be changed or it is known that it can be."""
        settings, now = self._settings(), asyncio.get_running_loop().time()
        operations = settings.operations
        wanted = operations.dashboard_path is not None and operations.dashboard_changes
        if self._is_good or not wanted or now < self._not_before:
            return
        try:
            await self._try_write()
        except ReplyError as error:
            self._not_before = now + AGAIN_SECONDS
            self.missing = missing_rights(str(error), settings.backend)
            if self.missing is not None:
                say_once(_without_rights(self.missing))
        except BackendError:
            return  # it is away, which is told elsewhere
        else:
            self._is_good, self.missing = True, None


def _without_rights(gives_them: str) -> Finding:
    text = (
        "operations.dashboard_changes is on, but the user of backend.url may not change live keys: the "
        f"dashboard can't give anybody another plan. This command gives the rights: {gives_them}"
    )
    return Finding("dashboard-without-rights", text)
