"""Checks that run once when a process starts, before its first request, and soon after its start."""

import asyncio
from collections.abc import Callable

from ratelimit_mw._internal.checks.plain import findings
from ratelimit_mw._internal.checks.surroundings import server_findings, worker_findings
from ratelimit_mw._internal.settings import Settings
from ratelimit_mw._internal.settings.findings import say_once

LOOK_SECONDS = 2.0
"""Seconds between two looks at the processes that serve with this one: a server starts them one by one."""
LOOKS = 10


def log_findings(settings: Settings) -> None:
    """Log what the start-up checks find, each the first time that this process meets it."""
    for finding in (*findings(settings), *server_findings(settings)):
        say_once(finding)


class WorkerCheck:
    """Looks for other workers a few times after the start."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._left = LOOKS

    async def run(self) -> None:
        """Look once more, unless that was done often enough."""
        settings = self._settings()
        if not self._left:
            return
        self._left -= 1
        # In a thread: a process may have thousands of open files.
        for finding in await asyncio.to_thread(lambda: list(worker_findings(settings))):
            say_once(finding)
            self._left = 0
